"""The `mosaic` command: plans, compares, shows, simulates; calibrates, checks and trains through the runtime."""

from megatron_mosaic.cli.main import main

__all__ = ["main"]
