"""Whole plans by arithmetic: every option of every module priced once, composed in arrays, before any schedule."""
