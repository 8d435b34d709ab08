"""Starts the ranks of a plan on this machine and says which one failed, where."""
