"""Messages between lanes as part of a schedule, and whether they can block each other."""
