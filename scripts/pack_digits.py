"""Writes samples of the reference model into files, for `--digits-files DIR`.

python scripts/pack_digits.py DIR [--samples N] [--seq-length S] [--digits-seed N]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_mosaic.any2any.data import DigitsDataset, Split
from megatron_mosaic.any2any.files.packed import write_packed
from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix


def pack(directory: Path, num_samples: int, seq_length: int, seed: int) -> None:
    """A folder of every split in the directory: `num_samples` to train on, a tenth of that of the others."""
    sizes = replace(Any2AnySizes(), seq_length=seq_length)
    for split in Split:
        count = num_samples if split is Split.train else max(1, num_samples // 10)
        dataset = DigitsDataset(split, sizes=sizes, mix=DigitsMix(), num_samples=count, seed=seed)
        write_packed(dataset, directory / split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--samples", type=int, default=2000, help="of the training split")
    parser.add_argument("--seq-length", type=int, default=Any2AnySizes().seq_length, help="of training")
    parser.add_argument("--digits-seed", type=int, default=1234, help="which samples are drawn")
    given = parser.parse_args()
    pack(given.directory, given.samples, given.seq_length, given.digits_seed)


if __name__ == "__main__":
    main()
