"""Modules side by side on one device: pairs of blocks measured, and what they cost each other."""
