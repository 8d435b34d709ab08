"""Markdown table of `mosaic check` over the layouts of docs/parity.md."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HEAD = "mosaic_plan: 1\nworkload: any2any-digits\nworld_size: 4\nglobal_batch_size: 16\nschedule: 1f1b\n"
TEXT = ["--digits-text-only-frac", "0.65", "--digits-two-image-frac", "0"]
# micro-batch, then ranks and layout of vision, llm and generator, then arguments
CASES = [
    (2, "0-3 dp4", "0-3 tp2 dp2", "0-3 dp4", []),
    (4, "0-1 dp2", "2-3 tp2", "2-3 dp2", []),
    (2, "0-2 dp3", "0-3 dp2 pp2", "0-3 dp4", []),
    (2, "0-2 dp3", "0-3 dp2 pp2", "0-3 dp4", TEXT),
    (2, "0-1 tp2", "0-1 tp2", "3 dp1", []),
    (2, "0-3 pp4", "0-3 tp2 pp2", "1-3 dp3", []),
    (2, "0-1 pp2", "0-1 pp2", "2-3 dp2", []),
]


def module(placement: str) -> str:
    """`0-3 tp2 dp2` as a plan's entry."""
    ranks, *degrees = placement.split()
    layout = ", ".join(f"{degree[:2]}: {degree[2:]}" for degree in degrees)
    return f"{{ranks: '{ranks}', layout: {{{layout}}}}}"


def main() -> int:
    print("| vision | llm | generator | loss error | gradient error | units without an image (most on a rank) |")
    print("|---|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        for micro_batch_size, vision, llm, generator, arguments in CASES:
            path = Path(directory) / "plan.yaml"
            modules = {"vision": vision, "llm": llm, "generator": generator}
            lines = [f"  {name}: {module(placement)}\n" for name, placement in modules.items()]
            path.write_text(f"{HEAD}micro_batch_size: {micro_batch_size}\nmodules:\n{''.join(lines)}")
            command = [sys.executable, "-m", "megatron_mosaic.cli", "check", str(path), "--json", *arguments]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            result = json.loads(run.stdout)
            if "error" in result:
                print(run.stderr, file=sys.stderr)
                return run.returncode
            failed += not result["ok"]
            note = ", mostly text" if arguments else ""
            empty = result["empty_units_by_module"]["vision"]
            errors = f"{result['loss_rel_err']:.1e} | {result['grad_rel_err_max']:.1e}"
            print(f"| {vision}{note} | {llm} | {generator} | {errors} | {empty} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
