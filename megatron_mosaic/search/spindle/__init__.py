"""Plans in waves for several tasks: Spindle (arXiv 2409.03365) and what it is compared with."""
