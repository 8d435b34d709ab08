"""Rows between modules: who holds which items, which rows go where, and the messages that carry them."""
