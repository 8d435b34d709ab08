"""`mosaic completion`: a script that makes bash complete subcommands, options, models, clusters and file names.

eval "$(mosaic completion bash)"
"""

from __future__ import annotations

import argparse
from importlib.resources import files

from megatron_mosaic.cli.main import COMMANDS
from megatron_mosaic.cli.words import build_parser

SCRIPT = """\
_mosaic() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words
    if [[ "${{COMP_WORDS[COMP_CWORD-1]}}" == "=" ]]; then
        word="${{COMP_WORDS[COMP_CWORD-2]}}=$word"
    elif [[ "$word" == "=" ]]; then
        word="${{COMP_WORDS[COMP_CWORD-1]}}="
    fi
    if ((COMP_CWORD == 1)); then
        words="{commands}"
    elif [[ "$word" == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
    elif [[ "$word" == *=* ]]; then
        words="{values}"
        COMPREPLY=($(compgen -W "$words" -- "$word"))
        COMPREPLY=("${{COMPREPLY[@]#*=}}")
        return
    else
        COMPREPLY=($(compgen -W "model= cluster=" -- "$word") $(compgen -f -- "$word"))
        [[ "${{COMPREPLY[0]-}}" == *= ]] && compopt -o nospace
        return
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o filenames -F _mosaic mosaic
"""


def main(_: argparse.Namespace) -> int:
    """Print the script."""
    print(render_script(), end="")
    return 0


def render_script() -> str:
    """Text for bash: everything is listed in it, so that completing a word starts no Python."""
    named = [f"{group}={name}" for group in ("model", "cluster") for name in _names_of(group)]
    options = [f"        {name}) words='{' '.join(found)}' ;;" for name, found in options_by_command().items()]
    return SCRIPT.format(
        commands=" ".join((*COMMANDS, "--version")), options="\n".join(options), values=" ".join(named)
    )


def options_by_command() -> dict[str, list[str]]:
    """Subcommand -> its options."""
    (commands,) = [each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    return {
        name: [option for action in command._actions for option in action.option_strings if option.startswith("--")]
        for name, command in commands.choices.items()
    }


def _names_of(group: str) -> list[str]:
    folder = files("megatron_mosaic") / "conf" / group
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))
