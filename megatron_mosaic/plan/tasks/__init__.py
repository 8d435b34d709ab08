"""Several tasks over shared modules: what they are, plans in waves for them, and the files of those."""
