"""Timelines as people see them: text, and a trace for Perfetto."""
