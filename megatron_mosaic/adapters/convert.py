"""Weights of a stock script's checkpoint for plans of several modules, and back: a directory of Megatron's for another.

    SAVED/iter_N/mp_rank_00/model_optim_rng.pt    format `torch`, of one process: names of the whole model
    SAVED/iter_N/*.distcp                         format `torch_dist`, of any plan: MODULE.model.NAME, layers stacked

What is written is a *release*, as of Megatron's own converters: weights without optimizer and iteration. Numbers are
copied, none is computed. To be run where the script runs: layers have other names with Transformer Engine.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch import Tensor

from megatron_mosaic.adapters.script import ADAPTERS
from megatron_mosaic.adapters.single_process import world_of_one
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.parallel_state_ext.rebound.checkpoint_io import RefusedPickle, load_metadata, load_object
from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind_results_queue

_OF_ONE_PROCESS = "mp_rank_00/model_optim_rng.pt"
_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.*)$")
_STACKED = re.compile(r"^(.*\blayers)\.(?!\d)(.*)$")
_OWN = re.compile(r"^(\w+)\.model\.(.*)$")  # a parameter of a plan's module; its optimizer's has more before it
# Names of norms that megatron-core's local layers may take in a sharded checkpoint: those of Transformer Engine's.
_FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
_EXTRA = "_extra_state"  # of layers; local ones have none


def convert(source: str, target: str) -> str:
    """Write the last checkpoint of the directory `source` into `target`, in the other format, and return which.

    ConfigError if it is neither of a model that an adapter knows, in one file, nor of a plan of one.
    """
    whole, sharded = _find(Path(source))
    tracker = Path(get_checkpoint_tracker_filename(target))
    release = Path(get_checkpoint_name(target, 0, release=True, return_base_dir=True))
    for path in (tracker, release):  # the tracker is written last: an interrupted conversion leaves none
        if path.exists():
            raise ConfigError(
                target, got=f"it holds {path.name}", expected="a new directory", fix="name another, or remove it"
            )
    if whole is not None:
        with whole.open("rb") as stream:
            state = _shard(_load(stream, whole))
        _make_directory(release)
        rebind_results_queue()
        with world_of_one():
            dist_checkpointing.save(state, str(release))
    else:
        assert sharded is not None
        model = _join(*_load_plan(sharded), sharded)
        file = release / _OF_ONE_PROCESS
        _make_directory(file.parent)
        torch.save({"model": model, "checkpoint_version": 3.0, "iteration": 0}, file)
    tracker.write_text("release")
    return "torch" if whole is None else "torch_dist"


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(str(path), got=str(error), expected="a writable path", fix="name another") from error


def _load_plan(sharded: Path) -> tuple[dict[str, Tensor], list[str]]:
    """(parameters of a plan's checkpoint by their names in the model, names of all that was saved). No optimizer state
    is read."""
    with (sharded / ".metadata").open("rb") as stream:
        names = list(load_metadata(stream).state_dict_metadata)
    with world_of_one():
        wanted = {
            key: each for key, each in dist_checkpointing.load_tensors_metadata(str(sharded)).items() if _OWN.match(key)
        }
        found = dist_checkpointing.load(wanted, str(sharded), validate_access_integrity=False)
    return {key.partition(".model.")[2]: found[key] for key in wanted}, names


def _find(source: Path) -> tuple[Path, None] | tuple[None, Path]:
    """(the one file of format torch, None) or (None, the directory of format torch_dist)."""
    tracker = Path(get_checkpoint_tracker_filename(str(source)))
    named = tracker.read_text().strip() if tracker.is_file() else ""
    if named != "release" and not named.isdecimal():
        raise ConfigError(
            str(tracker), got=named or "nothing", expected="the checkpoint to convert", fix="name a --save directory"
        )
    iteration, is_release = (0, True) if named == "release" else (int(named), False)
    directory = Path(get_checkpoint_name(str(source), iteration, release=is_release, return_base_dir=True))
    if (directory / ".metadata").is_file():
        return None, directory
    files = sorted(directory.glob("mp_rank_*/model_optim_rng.pt"))
    if files != [directory / _OF_ONE_PROCESS]:
        raise ConfigError(
            str(directory),
            got=f"{len(files)} files of ranks",
            expected="a checkpoint of one process in format torch, or one of a plan in torch_dist",
            fix="save it with tp 1 and pp 1",
        )
    return files[0], None


def _load(stream: Any, path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = load_object(stream, str(path))
    except RefusedPickle as error:
        raise ConfigError(
            str(path), got=str(error), expected="weights of a known model", fix="use a file that you trust"
        ) from error
    if "model" not in state:
        raise ConfigError(str(path), got=sorted(state), expected="one model, without virtual stages", fix="save it so")
    return state


def _shard(state: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded state of a checkpoint of format torch, under the names of a plan's modules."""
    names = list(state["model"])
    module_of = _module_of(names)
    counts: dict[str, set[int]] = defaultdict(set)
    for found in filter(None, map(_LAYER.match, names)):
        counts[found[1]].add(int(found[2]))
    sharded: dict[str, Any] = {}
    for name, value in state["model"].items():
        layer, module = _LAYER.match(name), module_of(name)
        number, count = (int(layer[2]), len(counts[layer[1]])) if layer else (0, 1)
        key = f"{module}.model.{f'{layer[1]}.{layer[3]}' if layer else name}"
        if name.endswith(_EXTRA):
            sharded[name] = ShardedObject(key, value, (count,), (number,))
        elif layer:
            for each in _names_in_files(key):  # which one is asked for is the script's layers' to say
                place = (0, number, count)
                sharded[f"{number}.{each}"] = ShardedTensor.from_rank_offsets(each, value, place, prepend_axis_num=1)
        else:
            sharded[name] = ShardedTensor.from_rank_offsets(key, value)
    common = {key: state[key] for key in ("args", "checkpoint_version") if key in state}
    return {**sharded, **common, "iteration": 0, "num_floating_point_operations_so_far": 0}


def _join(tensors: Mapping[str, Tensor], names: list[str], directory: Path) -> dict[str, Tensor | None]:
    """The model's state as the stock script loads it, from a plan's tensors and the `names` of all that was saved."""
    found: dict[str, Tensor | None] = {}
    for name, tensor in tensors.items():
        stacked = _STACKED.match(name)
        if stacked:
            rest = _name_in_layer(stacked[2])
            found |= {f"{stacked[1]}.{i}.{rest}": part.clone() for i, part in enumerate(tensor)}
        else:
            found[name] = tensor
    for name in names:
        key, _, place = name.partition("/shard_")
        own = _OWN.match(key)
        if own is not None and key.endswith(_EXTRA):
            stacked = _STACKED.match(own[2])
            number = place.partition("_")[0]
            found[f"{stacked[1]}.{number}.{stacked[2]}" if stacked else own[2]] = None
    _module_of(list(found), str(directory))
    return found


def _names_in_files(key: str) -> list[str]:
    """The key, and what else it may be called."""
    return [
        key,
        *(key.replace(f".layers.{own}", f".layers.{fused}") for own, fused in _FUSED if f".layers.{own}" in key),
    ]


def _name_in_layer(name: str) -> str:
    """What a layer's parameter is called in the model: without Transformer Engine, no norm is part of a matrix."""
    for own, fused in _FUSED:
        if not HAVE_TE and name.startswith(fused):
            return own + name.removeprefix(fused)
    return name


def _module_of(names: list[str], where: str = "checkpoint") -> Any:
    """Name of a parameter -> module, as the one adapter says whose model has such names."""
    tops = {name.partition(".")[0] for name in names}
    for adapter in ADAPTERS.values():
        if tops and tops <= set(adapter.tops):
            return adapter.module_of
    raise ConfigError(
        where,
        got=f"parameters of {sorted(tops)[:5]}",
        expected=f"a model of {', '.join(kind.__name__ for kind in ADAPTERS)}",
        fix="convert checkpoints of their scripts alone",
    )
