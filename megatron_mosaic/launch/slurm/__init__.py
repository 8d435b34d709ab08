"""Ranks that Slurm starts: which rank a process is, and a job that goes on where its time limit ended it."""
