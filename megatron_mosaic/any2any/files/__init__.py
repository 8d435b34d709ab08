"""Samples in files, of which a rank reads what its lanes need."""
