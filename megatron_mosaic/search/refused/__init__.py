"""When no plan fits: which came nearest, and what would make one fit."""
