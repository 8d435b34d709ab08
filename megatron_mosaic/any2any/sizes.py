"""How large the reference model is, and what its data brings to it. No torch: the sizes describe a Workload.

digit images --> vision --16 rows/image--> llm --16 rows/drawing--> generator --> digit images
                            text <-------->
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload

VISION, LLM, GENERATOR = "vision", "llm", "generator"

IMAGE_SIZE = 8  # pixels a side
PATCH_SIZE = 2  # pixels a side
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
PATCH_PIXELS = PATCH_SIZE**2


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSizes:
    """Sizes of one module's transformer layers."""

    num_layers: int = 4
    hidden_size: int = 64
    num_heads: int = 4
    ffn_hidden_size: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Any2AnySizes:
    """Sizes of the whole model. By default tp, cp and pp of every module may be 1, 2 or 4."""

    vision: StackSizes = StackSizes(hidden_size=32, ffn_hidden_size=128)
    llm: StackSizes = StackSizes()
    generator: StackSizes = StackSizes(hidden_size=32, ffn_hidden_size=128)
    seq_length: int = 64
    vocab_size: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsMix:
    """What share of the samples is of each kind; the rest is one image with its caption.

    Half of the samples that ask for a drawing start with an image and its caption as well.
    """

    text_only_frac: float = 0.2
    two_image_frac: float = 0.2
    generate_frac: float = 0.3

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("text_only_frac", "two_image_frac", "generate_frac")}
        if min(shares.values()) < 0 or sum(shares.values()) > 1:
            raise ConfigError("digits mix", got=shares, expected="shares of at least 0, 1 in sum", fix="lower a share")
        if not self.generate_frac:
            raise ConfigError(
                "digits mix: generate_frac",
                got=self.generate_frac,
                expected="a share above 0: the generator would never run",
                fix="set --digits-generate-frac",
            )

    @property
    def one_image_frac(self) -> float:
        return max(0.0, 1.0 - self.text_only_frac - self.two_image_frac - self.generate_frac)

    @property
    def images_per_sample(self) -> float:
        """The mean number of images that enter the vision module."""
        return self.one_image_frac + 2 * self.two_image_frac + self.generate_frac / 2


def workload(sizes: Any2AnySizes, global_batch_size: int, mix: DigitsMix | None = None) -> Workload:
    """The model as the planner sees it; `mix` (its default: the default mix) gives the items per sample."""
    mix = mix or DigitsMix()
    llm_width = sizes.llm.hidden_size
    return Workload(
        name="any2any-digits",
        modules=(
            _module(
                VISION,
                Role.encoder,
                sizes.vision,
                NUM_PATCHES,
                items_per_sample=mix.images_per_sample,
                input_size=PATCH_PIXELS,
                output_size=llm_width,
            ),
            _module(LLM, Role.backbone, sizes.llm, sizes.seq_length, vocab_size=sizes.vocab_size, causal=True),
            _module(
                GENERATOR,
                Role.generator,
                sizes.generator,
                NUM_PATCHES,
                items_per_sample=mix.generate_frac,
                input_size=PATCH_PIXELS,
                output_size=PATCH_PIXELS,
            ),
        ),
        edges=(
            Edge(source=VISION, target=LLM, rows_per_item=NUM_PATCHES, width=llm_width),
            Edge(source=LLM, target=GENERATOR, rows_per_item=NUM_PATCHES, width=llm_width),
        ),
        global_batch_size=global_batch_size,
    )


def _module(name: str, role: Role, stack: StackSizes, tokens_per_item: int, **more: object) -> ModuleConfig:
    return ModuleConfig(
        name=name,
        role=role,
        num_layers=stack.num_layers,
        hidden_size=stack.hidden_size,
        num_heads=stack.num_heads,
        ffn_hidden_size=stack.ffn_hidden_size,
        tokens_per_item=tokens_per_item,
        **more,  # type: ignore[arg-type]
    )


def require_query_groups(num_groups: int, num_heads: int, tp: int) -> None:
    """ConfigError unless heads fall into so many groups that share keys and values, and the groups over tp ranks."""
    if num_groups < 1 or num_heads % num_groups or num_groups % tp:
        raise ConfigError(
            "--num-query-groups",
            got=f"{num_groups} for {num_heads} heads and tp {tp}",
            expected="a divisor of the heads, and a multiple of tp",
            fix="change --num-query-groups, or the backbone's tp in the plan",
        )


def require_rotated_channels(channels: int, percent: float) -> None:
    """ConfigError unless so many of a head's channels fall into pairs that can be rotated."""
    rotated = int(channels * percent)
    if not 2 <= rotated <= channels or rotated % 2:
        raise ConfigError(
            "--rotary-percent",
            got=f"{percent} of {channels} channels: {rotated}",
            expected="an even number of channels, 2 or more",
            fix="change --rotary-percent or --kv-channels",
        )
