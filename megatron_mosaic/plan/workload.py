"""What is trained: the DAG of modules, their sizes, and how many tokens each sample brings to each of them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import lru_cache

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.tasks.histogram import NO_HISTOGRAM, Histogram
from megatron_mosaic.plan.tasks.task import TaskConfig, validate_tasks

MODULE_NAME = re.compile(r"[a-z][a-z0-9_]*")
_NOT_IN_DIGEST = ("items_per_sample", "items_histogram", "tokens_histogram", "frozen", "trains_projector")


class Role(StrEnum):
    """The part a module plays; exactly one module of a workload of one flow is the backbone."""

    encoder = "encoder"
    backbone = "backbone"
    generator = "generator"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleConfig:
    """Sizes of one module, a stack of transformer layers.

    `tokens_per_item` is the length of one item (an image's patches; for the backbone: a sample's sequence),
    `items_per_sample` the mean number of items a sample brings (1 for the backbone). Their histograms, where known, say
    how both vary; one mean then is the histogram's, the other its mean rounded.
    """

    name: str
    role: Role
    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_hidden_size: int
    tokens_per_item: int
    items_per_sample: float = 1.0
    num_query_groups: int = 0  # 0: as many as heads
    vocab_size: int = 0  # 0: no token embedding and no logits
    input_size: int = 0  # features per token that enter from the data (pixels of a patch); 0: none
    output_size: int = 0  # features per token that leave the module (projector or pixel head); 0: none
    gated: bool = False  # SwiGLU-like: two input matrices in the MLP
    causal: bool = False
    num_experts: int = 0  # 0: a dense MLP; else every layer's MLP is a mixture of experts of `ffn_hidden_size` each
    moe_top_k: int = 2  # experts a token goes to; without effect on a dense MLP
    shared_expert_size: int = 0  # width of the expert that sees every token; 0: none
    num_dense_layers: int = 0  # of a mixture of experts: layers that keep a dense MLP, of `dense_ffn_size`
    dense_ffn_size: int = 0
    kv_channels: int = 0  # of one head; 0: hidden_size / num_heads
    q_latent_size: int = 0  # multi-head latent attention (DeepSeek-V2, 2024): rank of the queries; 0: ordinary heads
    kv_latent_size: int = 0  # and of keys and values
    untied_output: bool = False  # logits have a matrix of their own
    num_mtp_layers: int = (
        0  # multi-token prediction (DeepSeek-V3, 2024, section 2.2): layers behind the last, with loss
    )
    merge_tokens: int = (
        1  # tokens that leave as one row (spatial merge, pixel shuffle): the projector reads them together
    )
    projector_size: int = 0  # width between the two matrices of the projector; 0: it has one
    attention_window: int = 0  # tokens that one attends to (causal: the last so many); 0: all of its item
    num_full_attention_layers: int = 0  # of a module with a window: layers that attend to all the same
    frozen: bool = False  # no parameter is trained; gradients still flow through to trained modules before it
    trains_projector: bool = False  # of a frozen module: what makes its output rows is trained all the same
    items_histogram: Histogram = NO_HISTOGRAM
    tokens_histogram: Histogram = NO_HISTOGRAM

    def __post_init__(self) -> None:
        where = f"module {self.name!r}"
        if MODULE_NAME.fullmatch(self.name) is None:
            raise ConfigError(
                where, got=self.name, expected="lower-case letters, digits and _", fix="rename the module"
            )
        for key in ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "tokens_per_item"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{where}: {key}", got=getattr(self, key), expected="at least 1", fix=f"set {key}")
        if self.items_per_sample <= 0:
            raise ConfigError(
                f"{where}: items_per_sample",
                got=self.items_per_sample,
                expected="a mean above 0",
                fix="count the items of your data",
            )
        if not self.kv_channels and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"{where}: num_heads",
                got=self.num_heads,
                expected=f"a divisor of hidden_size {self.hidden_size}",
                fix="change num_heads or hidden_size",
            )
        if self.query_groups < 1 or self.num_heads % self.query_groups:
            raise ConfigError(
                f"{where}: num_query_groups",
                got=self.num_query_groups,
                expected=f"a divisor of num_heads {self.num_heads}",
                fix="change num_query_groups",
            )
        if self.num_experts < 0 or (self.num_experts and not 1 <= self.moe_top_k <= self.num_experts):
            raise ConfigError(
                f"{where}: moe_top_k",
                got=f"{self.moe_top_k} of {self.num_experts} experts",
                expected="1 to num_experts",
                fix="change moe_top_k or num_experts",
            )
        self._validate_shape(where)
        self._validate_histograms(where)
        if self.trains_projector and not (self.frozen and self.output_size):
            raise ConfigError(
                f"{where}: trains_projector",
                got="set",
                expected="a frozen module with output_size",
                fix="set frozen: true, or leave trains_projector out",
            )

    def _validate_shape(self, where: str) -> None:
        for key, got, expected, right in (
            ("num_dense_layers", self.num_dense_layers, "at most num_layers", self.num_dense_layers <= self.num_layers),
            (
                "num_full_attention_layers",
                self.num_full_attention_layers,
                "at most num_layers",
                self.num_full_attention_layers <= self.num_layers,
            ),
            (
                "merge_tokens",
                self.merge_tokens,
                f"a divisor of tokens_per_item {self.tokens_per_item}",
                self.merge_tokens >= 1 and self.tokens_per_item % self.merge_tokens == 0,
            ),
        ):
            if not right:
                raise ConfigError(f"{where}: {key}", got=got, expected=expected, fix=f"change {key}")

    def _validate_histograms(self, where: str) -> None:
        items, tokens = self.items_histogram, self.tokens_histogram
        for key, got, expected, right in (
            (
                "items_per_sample",
                f"a histogram over {items.values}",
                "1 for the backbone: a sample is its item",
                not items or self.role is not Role.backbone,
            ),
            (
                "items_per_sample",
                f"mean {self.items_per_sample} beside a histogram of mean {items.mean:g}",
                "one mean",
                not items or math.isclose(items.mean, self.items_per_sample, rel_tol=1e-6),
            ),
            (
                "tokens_per_item",
                f"a histogram over {tokens.values}",
                f"multiples of merge_tokens {self.merge_tokens}, from 1 on",
                all(value >= 1 and value % self.merge_tokens == 0 for value in tokens.values),
            ),
            (
                "tokens_per_item",
                f"{self.tokens_per_item} beside a histogram of mean {tokens.mean:g}",
                "its mean, rounded",
                not tokens or self.tokens_per_item == round_tokens(tokens, self.merge_tokens),
            ),
        ):
            if not right:
                raise ConfigError(f"{where}: {key}", got=got, expected=expected, fix=f"change {key}")

    @property
    def attended_tokens(self) -> float:
        """Tokens that a token attends to, mean over tokens and layers."""
        tokens, window = self.tokens_per_item, min(self.attention_window or self.tokens_per_item, self.tokens_per_item)
        within = window * (1 - window / (2 * tokens)) if self.causal else window
        all_of_them = tokens / 2 if self.causal else tokens
        full_frac = self.num_full_attention_layers / self.num_layers
        return full_frac * all_of_them + (1 - full_frac) * within

    @property
    def is_trained(self) -> bool:
        """Whether any of its parameters is."""
        return not self.frozen or self.trains_projector

    @property
    def dense_frac(self) -> float:
        """Of its layers, those without experts."""
        return self.num_dense_layers / self.num_layers if self.num_experts else 1.0

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_heads

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_heads


def round_tokens(tokens: Histogram, merge_tokens: int) -> int:
    """The mean, to the nearest number of tokens that leave as whole rows."""
    return max(1, round(tokens.mean / merge_tokens)) * merge_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Rows that flow from one module to another: `rows_per_item` rows of `width` values for each item.

    The items are those of whichever end is not the backbone.
    """

    source: str
    target: str
    rows_per_item: int
    width: int

    def __post_init__(self) -> None:
        for key in ("rows_per_item", "width"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    f"edge {self.source}->{self.target}: {key}",
                    got=getattr(self, key),
                    expected="at least 1",
                    fix=f"set {key}",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A multimodal model and its batch: modules in topological order, edges between them.

    Without tasks every sample takes all edges to and from the one backbone; with tasks no module need be one.
    """

    name: str
    modules: tuple[ModuleConfig, ...]
    edges: tuple[Edge, ...] = ()
    global_batch_size: int = 1  # samples per optimizer step
    tasks: tuple[TaskConfig, ...] = ()
    by_name: Mapping[str, ModuleConfig] = field(init=False, repr=False, compare=False)
    _backbone: ModuleConfig | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = f"workload {self.name!r}"
        names = [module.name for module in self.modules]
        if len(set(names)) != len(names) or not names:
            raise ConfigError(f"{where}: modules", got=names, expected="unique names, at least one", fix="rename one")
        if self.global_batch_size < 1:
            raise ConfigError(
                f"{where}: global_batch_size", got=self.global_batch_size, expected="at least 1", fix="raise it"
            )
        backbones = [module.name for module in self.modules if module.role is Role.backbone]
        if len(backbones) != 1 and not self.tasks:
            raise ConfigError(
                f"{where}: backbone", got=backbones, expected="exactly one", fix="set role: backbone on one"
            )
        for edge in self.edges:
            for end in (edge.source, edge.target):
                if end not in names:
                    raise ConfigError(
                        f"{where}: edge {edge.source}->{edge.target}",
                        got=end,
                        expected=f"one of {names}",
                        fix="name an existing module",
                    )
            if names.index(edge.source) >= names.index(edge.target):
                raise ConfigError(
                    f"{where}: edge {edge.source}->{edge.target}",
                    got="an edge that points backwards",
                    expected="modules listed before those they feed (no cycles)",
                    fix="reorder the modules, or remove the cycle",
                )
        object.__setattr__(self, "by_name", {module.name: module for module in self.modules})
        object.__setattr__(self, "_backbone", None if self.tasks else self.by_name[backbones[0]])
        if self.tasks:
            validate_tasks(where, self.tasks, self.by_name, self.edges, self.global_batch_size)

    @property
    def backbone(self) -> ModuleConfig:
        """Of a workload of one flow. ConfigError where there are tasks: what asks for it knows of one flow only."""
        if self._backbone is None:
            raise ConfigError(
                f"workload {self.name!r}: tasks",
                got=", ".join(task.name for task in self.tasks),
                expected="no tasks: this works on one flow through one backbone only",
                fix="use a model without tasks",
            )
        return self._backbone

    @property
    def edge_pairs(self) -> tuple[tuple[str, str], ...]:
        """(source, target) of every edge, as the schedule wants them."""
        return tuple((edge.source, edge.target) for edge in self.edges)

    @property
    def digest(self) -> str:
        """Twelve hex digits over modules and edges: two workloads with the same digest accept the same plans.

        Batch size, item statistics and freezing are left out: they change the best plan, not its legality. Sizes at
        their defaults are too, so that a size that is added later leaves old digests alone.
        """
        return _digest(self)

    @property
    def has_backward(self) -> frozenset[str]:
        """Modules that run backward: those with trained parameters, and those that stand behind one."""
        found: set[str] = set()
        for module in self.modules:  # in topological order
            if module.is_trained or any(e.target == module.name and e.source in found for e in self.edges):
                found.add(module.name)
        return frozenset(found)

    def hidden_has_gradient(self, name: str) -> bool:
        """Whether gradients flow between the pipeline stages of a module."""
        behind = any(edge.target == name and edge.source in self.has_backward for edge in self.edges)
        return behind or not self.by_name[name].frozen

    def items_of(self, edge: Edge) -> str:
        """The module whose items the edge carries: the end that is not the backbone (else the source)."""
        return edge.target if self.by_name[edge.source].role is Role.backbone else edge.source


@lru_cache(maxsize=64)
def _digest(workload: Workload) -> str:
    """Worked out once: a search asks for it with every plan."""
    defaults = {f.name: f.default for f in fields(ModuleConfig)}
    modules = [
        {k: v for k, v in asdict(m).items() if k not in _NOT_IN_DIGEST and v != defaults[k]} for m in workload.modules
    ]
    flow: list[object] = [workload.name, modules, [asdict(e) for e in workload.edges]]
    text = json.dumps(flow + [[task.as_digest for task in workload.tasks]] * bool(workload.tasks), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
