"""Every command block of README.md and docs/ runs as it stands, or says why it does not.

Blocks of a page run one after the other in one directory, as a reader would type them. `-m slow` runs all of a page;
every other run those without a mark, which must not need the others.
"""

import pytest

from megatron_mosaic.plan.plan_file import load_plan
from tests.docs.pages import LANGUAGES, MARKS, PAGES, ROOT, Block, blocks_of, read_blocks
from tests.docs.sandbox import build_sandbox, is_found, run_block

BLOCKS = {path.relative_to(ROOT).as_posix(): blocks_of(path) for path in PAGES}
COMMANDS = {name: [block for block in blocks if block.language == "bash"] for name, blocks in BLOCKS.items()}
FAST = [name for name, blocks in COMMANDS.items() if any(not block.mark for block in blocks)]
RUN = [name for name, blocks in COMMANDS.items() if any(block.mark != "suite" for block in blocks)]
PROGRAMS = ("mosaic ", "bash ", "python ", "torchrun ", "pytest ", "pip ", "sbatch ", "git ")


def faults_of(blocks: list[Block], text: str) -> list[str]:
    """What is wrong with the blocks of a page as they are written."""
    found = [f"{block.where}: language {block.language!r}" for block in blocks if block.language not in LANGUAGES]
    found += [f"{block.where}: mark {block.mark!r}" for block in blocks if block.mark and block.mark not in MARKS]
    for block in blocks:
        commands = [line for line in block.text.splitlines() if line and not line.startswith("#")]
        is_of_suite = all(" pytest " in f" {line} " or line.startswith("bash scripts/test.sh") for line in commands)
        if block.mark == "suite" and not is_of_suite:
            found.append(f"{block.where}: marked `suite`, and runs something else")
    fenced = {line for block in blocks for line in block.text.splitlines()}
    hidden = [line for line in text.splitlines() if line.startswith("    ") and line.strip().startswith(PROGRAMS)]
    return found + [f"a command in no block: {line.strip()}" for line in hidden if line not in fenced]


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_say_what_they_are(page: str):
    faults = faults_of(BLOCKS[page], (ROOT / page).read_text(encoding="utf-8"))
    assert not faults, f"known languages {sorted(LANGUAGES)}, marks {MARKS}"


def test_marks_are_read_and_wrong_ones_found():
    page = "<!-- block: slow: trains -->\n```bash\nmosaic train plan.yaml\n```\n```bash\nls\n```\n"
    marked, plain = read_blocks(page, "page.md")
    assert (marked.mark, marked.reason, marked.line, plain.mark) == ("slow", "trains", 2, "")
    for wrong in ("<!-- block: later: no time -->\n```bash\nls\n```", "```console\nls\n```", "    mosaic plan a=b"):
        assert len(faults_of(read_blocks(wrong, "page.md"), wrong)) == 1, wrong
    cheat = "<!-- block: suite: no -->\n```bash\nmosaic plan a=b\n```"
    assert "something else" in faults_of(read_blocks(cheat, "page.md"), cheat)[0]


def test_a_command_that_fails_is_found(tmp_path):
    (block,) = read_blocks("```bash\nmosaic show none.yaml | cat\necho done\n```", "page.md")
    with pytest.raises(AssertionError, match=r"page.md:1 ended with status 2:\n.*none.yaml"):
        run_block(block, build_sandbox(tmp_path), timeout_s=60)


@pytest.mark.parametrize("page", FAST)
def test_blocks_run(page, tmp_path):
    directory = build_sandbox(tmp_path)
    for block in COMMANDS[page]:
        if not block.mark:
            run_block(block, directory, timeout_s=300)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_all_blocks_run(page, tmp_path):
    directory = build_sandbox(tmp_path)
    left_out = []
    for block in COMMANDS[page]:
        if block.mark in ("", "slow") or is_found(block.mark):
            run_block(block, directory, timeout_s=1800)
        else:
            left_out.append(f"{block.where}: {block.mark}, {block.reason}")
    print(f"{page}: {len(COMMANDS[page]) - len(left_out)} of {len(COMMANDS[page])} blocks run", *left_out, sep="\n  ")


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(b.language == "yaml" for b in blocks)])
def test_plans_in_yaml_blocks_are_plans(page, tmp_path):
    for block in BLOCKS[page]:
        if block.language == "yaml" and "mosaic_plan:" in block.text:
            path = tmp_path / "plan.yaml"
            path.write_text(block.text)
            assert load_plan(str(path)).modules, block.where
