"""What megatron-core needs to run on a CPU with gloo. `install()` does nothing where CUDA exists.

megatron-core names "cuda" in tensor factories, device queries, RNG state and type checks. Each of those names gets
a CPU stand-in here; no Megatron source is changed. Groups asked for as nccl become gloo.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_mosaic.parallel_state_ext.rebound import gloo

CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "empty_like", "zeros_like")

# Defaults of Megatron's own arguments that a CPU needs: local layers, no fused kernels, gloo.
ARGUMENT_DEFAULTS: dict[str, object] = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
    "ckpt_format": "torch_dist",
}

_installed = False


def is_cpu() -> bool:
    """True where training runs on the CPU."""
    return _installed or not torch.cuda.is_available()  # the query takes its time


def device() -> torch.device:
    """This process's training device."""
    return CPU if is_cpu() else torch.device("cuda", torch.cuda.current_device())


def to_device(tensor: torch.Tensor, target: torch.device | None = None) -> torch.Tensor:
    """A host tensor on the training device (or `target`). From pinned memory, so that a GPU's host thread does not
    stall: it has to launch the work of other lanes meanwhile."""
    if target is None and is_cpu():  # it is there already
        return tensor
    target = device() if target is None else target
    if target.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)


class _Moment:
    """Stands in for torch.cuda.Stream and Event: everything on a CPU has already happened."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> None:
        return None

    record = wait = synchronize = wait_stream = wait_event = _nothing

    def record_event(self, *args: object, **kwargs: object) -> _Moment:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def __enter__(self) -> _Moment:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _Properties:
    name, total_memory, major, minor, multi_processor_count = "cpu", 8 << 30, 9, 0, 1


def install() -> None:
    """Make megatron-core importable and runnable without CUDA. Idempotent; call it before models are built."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    torch.compiler.set_stance("force_eager")  # Megatron's fused functions: minutes of C++ builds, no gain on small CPUs
    _replace_device_queries()
    _replace_rng()
    _replace_tensor_names()
    dist.new_group = _with_gloo(dist.new_group)
    dist.new_subgroups_by_enumeration = _with_gloo(dist.new_subgroups_by_enumeration)
    _replace_initialisation()
    _replace_host_copies()
    gloo.install()


def _replace_host_copies() -> None:
    """Experts' token counts come to the host as numpy arrays; on a CPU they are there already, but as tensors."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _replace_device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU  # accepted wherever Megatron uses it: device=..., .to(...)
    cuda.device_count = lambda: 1
    cuda.get_device_properties = lambda *args, **kwargs: _Properties()
    cuda.get_device_capability = lambda *args, **kwargs: (_Properties.major, _Properties.minor)
    cuda.memory_stats = lambda *args, **kwargs: collections.defaultdict(int)
    cuda.Stream = cuda.Event = _Moment
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    # A function object of its own for every name: torch._dynamo refuses shared ones.
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Moment())
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)


def _replace_rng() -> None:
    """The CUDA RNG tracker with the same logic on the CPU generator."""
    import megatron.core.tensor_parallel.random as random

    cuda: Any = torch.cuda
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise RuntimeError(f"RNG state {name!r} was never added to the tracker")
        outer, outer_name = torch.get_rng_state(), self._current_state_name
        nested = outer_name != "default-rng"
        if nested:
            self.states_[outer_name] = outer
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_[outer_name] if nested else outer)
            self._current_state_name = outer_name

    random.CudaRNGStatesTracker.fork = fork


def _replace_tensor_names() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    real_type = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # megatron.core.optimizer compares tensor.type() with 'torch.cuda.*Tensor'
        result = real_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and isinstance(result, str) and caller.startswith("megatron.core.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]


def _replace_initialisation() -> None:
    """`initialize_megatron` asserts CUDA and compiles kernels; neither applies here."""
    import megatron.training as package
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    stock = initialize.initialize_megatron

    @functools.wraps(stock)
    def without_cuda(*args: Any, **kwargs: Any) -> Any:
        kwargs["allow_no_cuda"] = True
        return stock(*args, **kwargs)

    for module in (initialize, training, package):
        if hasattr(module, "initialize_megatron"):
            module.initialize_megatron = without_cuda
    initialize._compile_dependencies = lambda *args, **kwargs: None


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """`factory(..., device="cuda")` -> on the CPU, unpinned."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _with_gloo(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return function(*args, **kwargs)

    return wrapped
