"""`mosaic convert`: weights of a stock script's checkpoint for plans of several modules, and back."""

from __future__ import annotations

import argparse

from megatron_mosaic.cli.imports import import_runtime
from megatron_mosaic.cli.output import print_json


def main(arguments: argparse.Namespace) -> int:
    """Write the other format."""
    import_runtime()
    from megatron_mosaic.adapters.convert import convert

    written = convert(arguments.source, arguments.target)
    if arguments.json:
        print_json({"out": arguments.target, "format": written})
    else:
        print(f"{arguments.target}: weights in format {written}, to be given to --load")
    return 0
