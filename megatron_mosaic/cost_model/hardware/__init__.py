"""GPU types, profiles of machines, and the lines that are fitted to them."""
