"""Layers of megatron-core where it has them only with Transformer Engine, and for every layout of a module."""
