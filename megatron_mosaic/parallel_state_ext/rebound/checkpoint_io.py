"""What torch and Megatron unpickle of a checkpoint: nothing but listed classes, in the very call that loads.

    .metadata              torch's reader     pickle.load                      -> load_metadata: the classes below
    objects in *.distcp    torch's planner    torch.load(weights_only=False)   -> load_object: torch's, Megatron's list
    common.pt (old ones)   Megatron           torch.load, as environment says  -> load_object
    extra state            TransformerEngine  pickle.loads of such an object   -> load_object reads it first
    tensors in *.distcp    torch's reader     torch.load(weights_only=True)    stock

Who may write to the directory can still give wrong numbers, or a file that eats memory. What a class outside the list
does when it is built never happens, whenever the file was changed.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import PosixPath, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata, MCoreSavePlan
from megatron.core.safe_globals import SafeUnpickler
from torch.distributed._shard.sharded_tensor import metadata as sharded_tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint._nested_dict import set_element

from megatron_mosaic.parallel_state_ext.rebound.rebind import rebind

_IN_METADATA: tuple[Any, ...] = (  # torch's checkpoint format, with what older releases of torch and Megatron wrote
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    planner.BytesIOWriteData,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
    planner.WriteItemType,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    sharded_tensor.MEM_FORMAT_ENCODING,
    sharded_tensor.TensorProperties,
    MCoreMetadata,
    MCoreSavePlan,
    torch.Size,
    torch.serialization._get_layout,
    OrderedDict,
    PosixPath,
    PurePosixPath,
)
_BY_NAME = {(found.__module__, found.__qualname__): found for found in _IN_METADATA}
_BY_NAME |= {("torch", name): found for name, found in vars(torch).items() if isinstance(found, torch.dtype)}
_CLASSES = [found for found in _IN_METADATA if isinstance(found, type)]
_SHARED = [*_CLASSES, *(member for found in _CLASSES if issubclass(found, Enum) for member in found)]

_PLANNER = "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner"
_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
_REFUSED_BY_TORCH = re.compile(r"GLOBAL (\S+) (?:was not|whose module)")


class RefusedPickle(pickle.UnpicklingError):
    """A pickle names what no checkpoint needs."""


def install() -> None:
    """Let the stock loads build listed classes only. May be called again."""
    rebind("torch.distributed.checkpoint.filesystem.pickle", SimpleNamespace(load=load_metadata, dump=pickle.dump))
    rebind(f"{_PLANNER}.load_bytes", _load_bytes, must_accept=("read_item", "value"))
    rebind("megatron.core.dist_checkpointing.serialization.load_common", _load_common, must_accept=("checkpoint_dir",))


def load_metadata(stream: IO[bytes]) -> metadata.Metadata:
    """What is pickled in `.metadata`. RefusedPickle before anything that is not listed is built."""
    before = [dict(vars(shared)) for shared in _SHARED]
    try:
        loaded = _MetadataUnpickler(stream).load()
    finally:  # a pickle can set attributes of whatever it was given, of a class too
        changed = [shared for shared, then in zip(_SHARED, before, strict=True) if _restore(shared, then)]
    if changed:
        raise RefusedPickle(f"it changes {changed[0]!r}, which is not its own")
    if not isinstance(loaded, metadata.Metadata):
        raise RefusedPickle(f"a {type(loaded).__name__} where torch's Metadata was expected")
    return loaded


def load_object(stream: IO[bytes], name: str) -> Any:
    """What `torch.save` wrote, if it holds only what torch and Megatron have listed (`add_safe_globals`).

    `name` in the checkpoint: extra state of a module is bytes that TransformerEngine will unpickle again.
    """
    try:
        loaded = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = _REFUSED_BY_TORCH.search(str(error))
        if refused is None:
            raise
        raise RefusedPickle(_not_listed(refused[1])) from None
    if "_extra_state" in name:
        for value in loaded if isinstance(loaded, list) else [loaded]:
            _read_extra_state(value)
    return loaded


@contextlib.contextmanager
def write_errors() -> Iterator[list[Exception]]:
    """What this rank's writing of tensors raised within the body: Megatron passes on only that something did."""
    errors: list[Exception] = []

    def write(*args: Any, **kwargs: Any) -> Any:
        outcome = stock(*args, **kwargs)
        errors.extend(part for part in outcome if isinstance(part, Exception))
        return outcome

    stock: Callable[..., Any] = rebind(f"{_WRITER}.write_preloaded_data", staticmethod(write))
    try:
        yield errors
    finally:
        rebind(f"{_WRITER}.write_preloaded_data", staticmethod(stock))


class _MetadataUnpickler(pickle.Unpickler):
    """Imports nothing: every name is looked up in the list."""

    def find_class(self, module: str, name: str) -> Any:
        """The listed object. RefusedPickle for any other."""
        if (module, name) not in _BY_NAME:
            raise RefusedPickle(_not_listed(f"{module}.{name}"))
        return _BY_NAME[module, name]


def _load_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
    """DefaultLoadPlanner's own, with `load_object` for `torch.load(weights_only=False)`."""
    name = read_item.dest_index.fqn
    loaded = load_object(value, name)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def _load_common(checkpoint_dir: str) -> Any:
    with open(os.path.join(checkpoint_dir, COMMON_STATE_FNAME), "rb") as stream:
        return load_object(stream, COMMON_STATE_FNAME)


def _read_extra_state(value: Any) -> None:
    """As TransformerEngine will, with Megatron's list of what can be in there."""
    if isinstance(value, io.BytesIO):  # before its version 2
        load_object(value, "")
        value.seek(0)
    elif isinstance(value, torch.Tensor) and value.numel():
        try:
            SafeUnpickler(io.BytesIO(value.numpy().tobytes())).load()
        except pickle.UnpicklingError as error:
            raise RefusedPickle(str(error)) from None


def _restore(shared: Any, then: dict[str, Any]) -> bool:
    """Put back the attributes that a class or a member of an enumeration had; whether that was needed."""
    now = dict(vars(shared))
    added = now.keys() - then.keys()
    replaced = [name for name in then if now.get(name) is not then[name]]
    for name in added:
        delattr(shared, name)
    for name in replaced:
        setattr(shared, name, then[name])
    return bool(added or replaced)


def _not_listed(name: str) -> str:
    return f"it builds {name}, which no checkpoint needs"
