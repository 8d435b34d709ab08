"""This machine, or its GPU, measured into what the cost model reads."""
