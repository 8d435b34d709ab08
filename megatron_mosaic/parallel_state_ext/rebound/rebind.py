"""Which Megatron this code knows, and the only place that replaces names inside it.

Official seams come first (`pg_collection=`, `skip_model_parallel_init=`, `cfg_container.model`). What has none is
rebound here by exact qualified name, and a name that is gone is an error, never a silent no-op.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import pkgutil
import queue
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import torch.distributed as dist
from packaging.version import Version

from megatron_mosaic.errors import ConfigError, VersionError

SUPPORTED = ("0.19.2", "0.20")  # megatron-core: from (inclusive), to (exclusive)


def require_supported_megatron() -> str:
    """The installed megatron-core version. VersionError if it is not one this code knows."""
    installed = version("megatron-core")
    low, high = (Version(bound).release for bound in SUPPORTED)
    if not low <= Version(installed).release < high:  # a release candidate counts as its release
        raise VersionError(
            "megatron-core",
            got=installed,
            expected=f">= {SUPPORTED[0]}, < {SUPPORTED[1]}",
            fix=f"pip install 'megatron-core>={SUPPORTED[0]},<{SUPPORTED[1]}'",
        )
    return installed


def rebind(qualified_name: str, replacement: Any, *, must_accept: tuple[str, ...] = ()) -> Any:
    """Put `replacement` in the place of `package.module.name`, or of a class's method, and return what stood there.

    `must_accept` names parameters that the original has to have, so that a changed signature is found here and not
    in the middle of a training step.
    """
    owner_name, _, name = qualified_name.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    if not hasattr(owner, name):
        raise VersionError(
            qualified_name,
            got=f"no such name in megatron-core {version('megatron-core')}",
            expected="the name this code replaces",
            fix="use a supported megatron-core, or adapt parallel_state_ext/rebound/rebind.py",
        )
    original = getattr(owner, name)
    if must_accept:
        missing = [key for key in must_accept if key not in inspect.signature(original).parameters]
        if missing:
            raise VersionError(
                qualified_name,
                got=f"no parameters {missing}",
                expected=f"a function that takes {list(must_accept)}",
                fix="use a supported megatron-core, or adapt parallel_state_ext/rebound/rebind.py",
            )
    setattr(owner, name, replacement)
    return original


@contextlib.contextmanager
def rebound(qualified_name: str, replacement: Any, *, must_accept: tuple[str, ...] = ()) -> Iterator[Any]:
    """`rebind` for as long as the body runs, which gets what stood there."""
    original = rebind(qualified_name, replacement, must_accept=must_accept)
    try:
        yield original
    finally:
        rebind(qualified_name, original)


def rebind_training(
    *, get_megatron_optimizer: Callable[..., Any], get_forward_backward_func: Callable[..., Any]
) -> None:
    """Let `megatron.training.training` use our optimizer and our executor (no official seam in 0.19)."""
    rebind(
        "megatron.training.training.get_megatron_optimizer",
        get_megatron_optimizer,
        must_accept=("config", "model_chunks", "config_overrides"),
    )
    rebind(
        "megatron.training.training.get_forward_backward_func",
        get_forward_backward_func,
        must_accept=("schedule_pg_collection",),
    )
    # NVIDIA's fault tolerance is refused under a plan; to find it switched off, it would parse all arguments again.
    rebind("megatron.training.ft_integration.setup", lambda: None)


@functools.cache
def remember_docstrings() -> None:
    """Megatron reads the source of every configuration class for help texts, at every parse: once will do.

    Forked ranks inherit what the process that forks them has read.
    """
    found: dict[type, dict[str, str]] = {}

    def get_field_docstrings(factory: Any, config_class: type) -> dict[str, str]:
        if config_class not in found:
            found[config_class] = original(factory, config_class)
        return found[config_class]

    original = rebind(
        "megatron.training.argument_utils.ArgumentGroupFactory._get_field_docstrings",
        get_field_docstrings,
        must_accept=("src_cfg_class",),
    )


def rebind_rng_tracker(tracker: Any) -> None:
    """Let everybody who asks for Megatron's RNG tracker get this one."""
    rebind("megatron.core.tensor_parallel.random._CUDA_RNG_STATE_TRACKER", tracker)


def rebind_scratch_memory(memory: Any) -> None:
    """Let everybody who asks for Megatron's global memory buffer get this one."""
    rebind("megatron.core.parallel_state._GLOBAL_MEMORY_BUFFER", memory)


def rebind_results_queue() -> None:
    """Let the threads that write a checkpoint hand over their results in this process.

    Megatron's queue is another process, started anew from the script: seconds on every rank, and a hang if that has no
    main guard.
    """
    rebind("megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue", queue.Queue())


def rebind_checkpointing(*, save: Callable[..., Any], load: Callable[..., Any]) -> None:
    """Let `megatron.training.training` save and load with these.

    Files are written by threads of this process (async saving is refused).
    """
    rebind_results_queue()
    rebind("megatron.training.training.save_checkpoint", save, must_accept=("iteration", "model"))
    rebind("megatron.training.training.load_checkpoint", load, must_accept=("ddp_model", "optimizer"))


def rebound_sharded_save(save: Callable[..., Any]) -> contextlib.AbstractContextManager[Any]:
    """`save` writes a checkpoint's sharded state while the body runs, which gets Megatron's own."""
    wanted = ("sharded_state_dict", "checkpoint_dir")
    return rebound("megatron.core.dist_checkpointing.save", save, must_accept=wanted)


def rebind_arguments(
    *, add: Callable[[ArgumentParser], ArgumentParser], validate: Callable[[Namespace, Any], Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Let Megatron add and validate arguments with these. Returns its own two."""
    return (
        rebind("megatron.training.arguments.add_megatron_arguments", add, must_accept=("parser",)),
        rebind("megatron.training.arguments.validate_args", validate, must_accept=("args", "defaults")),
    )


@contextlib.contextmanager
def rebound_parallel_state(group: Any) -> Iterator[None]:
    """Every global group that does not exist is this one, which is of this rank alone, while the body runs."""
    from megatron.core import parallel_state

    state, ranks = vars(parallel_state), dist.get_process_group_ranks(group)
    before: dict[str, Any] = {}
    for name, value in list(state.items()):
        if value is None and name.startswith("_") and name.isupper() and "MEMORY" not in name:
            if "GLOBAL_RANKS" in name:
                before[name], state[name] = None, ranks
            elif "GROUP" in name:
                before[name], state[name] = None, group
    try:
        yield
    finally:
        state.update(before)


def rebind_vocabulary_padding() -> None:
    """Let a vocabulary be padded to a multiple that does not depend on tp: a model must not."""
    name = "megatron.core.tokenizers.utils.build_tokenizer.vocab_size_with_padding"

    def padded(orig_vocab_size: int, args: Namespace, logging_enabled: bool = True) -> int:
        alone = Namespace(**{**vars(args), "tensor_model_parallel_size": 1})
        found: int = stock(orig_vocab_size, alone, logging_enabled)
        if found % args.tensor_model_parallel_size:
            multiple = math.lcm(args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
            raise ConfigError(
                "--make-vocab-size-divisible-by",
                got=f"{args.make_vocab_size_divisible_by}: a vocabulary of {found}",
                expected=f"a vocabulary that tp {args.tensor_model_parallel_size} divides",
                fix=f"pass --make-vocab-size-divisible-by {multiple}, for every layout alike",
            )
        return found

    stock = rebind(name, padded, must_accept=("orig_vocab_size", "args"))


def rebind_uncaught(hook: Callable[..., None]) -> None:
    """Let exceptions that nobody catches end this process by this hook."""
    rebind("sys.excepthook", hook)


def rebind_pretrain(pretrain: Callable[..., Any]) -> Callable[..., Any]:
    """Let scripts that are run from now on call this in place of Megatron's `pretrain`. Returns Megatron's.

    A Megatron with patches/ takes it as a plugin, also of a script that has bound its `pretrain` already.
    """
    from megatron.training import training

    if hasattr(training, "PRETRAIN_PLUGINS"):
        training.PRETRAIN_PLUGINS.append(pretrain)
        return training.pretrain  # type: ignore[no-any-return]
    wanted = ("cfg_container", "train_valid_test_dataset_provider", "forward_step_func", "model_provider")
    stock: Callable[..., Any] = rebind("megatron.training.training.pretrain", pretrain, must_accept=wanted)
    rebind("megatron.training.pretrain", pretrain)
    return stock


@contextlib.contextmanager
def rebound_construction(inits: Mapping[type, Callable[..., None]], otherwise: Callable[..., None]) -> Iterator[None]:
    """While the body runs, these classes are constructed by their function, and all other Megatron modules by
    `otherwise`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(rebound("megatron.core.transformer.module.MegatronModule.__init__", otherwise))
        for kind, init in inits.items():
            stack.enter_context(rebound(f"{kind.__module__}.{kind.__qualname__}.__init__", init))
        yield


@functools.cache
def install_vision_norm(norm: type) -> None:
    """Let CLIP be built without Transformer Engine, where upstream falls back to a norm that takes no `config`."""
    import torch
    from megatron.core.models.vision import clip_vit_model as clip
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    found = clip.NORM_IMPL
    if found in (torch.nn.LayerNorm, WrappedTorchNorm):  # the second with patches/
        rebind("megatron.core.models.vision.clip_vit_model.NORM_IMPL", norm)
        init = clip.CLIPViTModel.__init__
        init.__defaults__ = tuple(norm if value is found else value for value in init.__defaults__)


def watch_steps(
    take: Callable[[Any], None], before_step: Callable[[Any], None], after_step: Callable[[dict[str, Any]], None]
) -> None:
    """Of Megatron's own loop: call the first with the model's chunks before an optimizer is built for them, the second
    with the optimizer when gradients are ready, the third with a training step's losses."""

    def build(config: Any, model_chunks: Any, *args: Any, **kwargs: Any) -> Any:
        take(model_chunks)
        optimizer = stock_build(config, model_chunks, *args, **kwargs)
        stock_step = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            before_step(optimizer)
            return stock_step(*args, **kwargs)

        optimizer.step = step
        return optimizer

    def train_step(*args: Any, **kwargs: Any) -> Any:
        result = stock_train_step(*args, **kwargs)
        after_step(result[0])
        return result

    stock_build = rebind("megatron.training.training.get_megatron_optimizer", build, must_accept=("model_chunks",))
    stock_train_step = rebind("megatron.training.training.train_step", train_step, must_accept=("optimizer",))


def install_local_layers(*, mark: Callable[[Any, Any], Any], attention: type | None) -> None:
    """What megatron-core's layers have with Transformer Engine only: norms under sequence parallelism, whose parameters
    `mark(norm, config)` marks, and `attention`, in the place of its own, over cp ranks."""
    from dataclasses import replace

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        return mark(stock(cls, replace(config, sequence_parallel=False), *args, **kwargs), config)

    stock = rebind("megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__", build, must_accept=("config",))
    if attention is not None:
        rebind("megatron.core.models.backends.LocalSpecProvider.core_attention", lambda self: attention)
