"""What a shell offers after `eval "$(mosaic completion bash)"`, asked of a real bash; and `mosaic --version`."""

import subprocess

import pytest

import megatron_mosaic
from megatron_mosaic.cli.completion import options_by_command, render_script
from megatron_mosaic.cli.main import COMMANDS, main


def complete(*words: str) -> list[str]:
    """What bash offers for the last word. bash cuts words at `=`, so do these."""
    quoted = " ".join(f"'{word}'" for word in ("mosaic", *words))
    ask = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _mosaic; printf "%s\\n" "${{COMPREPLY[@]}}"'
    script = f"compopt() {{ :; }}\n{render_script()}\n{ask}"
    shown = subprocess.run(["bash", "-uc", script], capture_output=True, text=True, check=True)
    assert shown.stderr == ""
    return shown.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["sim"], ["simulate"]),
        (["--v"], ["--version"]),
        (["simulate", "--t"], ["--trace"]),
        (["report", "--no"], ["--no-search"]),
        (["plan", "mod"], ["model="]),
        (["plan", "model", "=", "vlm"], ["vlm_7b"]),
        (["plan", "cluster", "=", "h100_12"], ["h100_12800x8", "h100_1280x8"]),
        (["show", "/etc/host"], ["/etc/hostname", "/etc/hosts"]),
    ],
)
def test_words_are_completed(words, offered):
    assert set(offered) <= set(complete(*words))
    assert all(each.startswith(words[-1]) for each in complete(*words))


def test_every_model_is_offered_behind_the_sign():
    assert {"vlm_7b", "qwen2_vl_72b"} <= set(complete("plan", "model", "="))


def test_every_command_has_its_options():
    assert options_by_command().keys() == COMMANDS.keys()
    assert "--json" in options_by_command()["plan"]


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"mosaic {megatron_mosaic.__version__} (Python 3.")
