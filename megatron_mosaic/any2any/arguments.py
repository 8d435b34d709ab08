"""Command-line arguments of the reference model. The backbone is described by Megatron's own arguments."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_mosaic.any2any.sizes import (
    Any2AnySizes,
    DigitsMix,
    StackSizes,
    require_query_groups,
    require_rotated_channels,
    workload,
)
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan import Plan, validate_plan
from megatron_mosaic.plan.workload import ModuleConfig, Workload
from megatron_mosaic.plan.workload_file import load_workload_file
from megatron_mosaic.runtime.flags.command_line import CommandLine, read_command_line
from megatron_mosaic.runtime.flags.judge import Purpose, decided_by, facts_of, judge
from megatron_mosaic.runtime.flags.learning_rate import require_learning_rate
from megatron_mosaic.runtime.flags.mosaic import lr_mults_from_args
from megatron_mosaic.runtime.flags.training import apply_training, decide_arguments

SIZES = Any2AnySizes()
MIX = DigitsMix()

# For `parser.set_defaults(**MEGATRON_DEFAULTS)`: Megatron's own arguments then describe the default backbone.
# Dropout is off because its random numbers would depend on the layout.
MEGATRON_DEFAULTS: dict[str, object] = {
    "num_layers": SIZES.llm.num_layers,
    "hidden_size": SIZES.llm.hidden_size,
    "num_attention_heads": SIZES.llm.num_heads,
    "ffn_hidden_size": SIZES.llm.ffn_hidden_size,
    "seq_length": SIZES.seq_length,
    "max_position_embeddings": None,  # as many as --seq-length
    "position_embedding_type": "learned_absolute",
    "untie_embeddings_and_output_weights": True,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": SIZES.vocab_size,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.1,
    "micro_batch_size": 4,
    "global_batch_size": 16,
    "train_iters": 600,
    "lr": 3e-3,
    "min_lr": 3e-4,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.05,
    "weight_decay": 0.01,
    "clip_grad": 1.0,
    "log_interval": 10,
    "eval_interval": 100,
    "eval_iters": 4,
    # What the layers are built with, whatever Megatron's default is (blocks.config_from_args)
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
_STACK = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
_SHARES = ("digits_text_only_frac", "digits_two_image_frac", "digits_generate_frac")
_OF_DIGITS = (  # without effect where a model file describes the modules
    *(f"{module}_{size}" for module in ("vision", "generator") for size in _STACK),
    *(*_SHARES, "digits_files"),
)
_OF_DRAWING = (*_SHARES, "digits_seed")  # without effect where samples come from files
_NOT_BUILT = ("shared_expert_size", "num_dense_layers", "q_latent_size", "kv_latent_size")  # of a model file
_ACTIVATIONS = ("swiglu", "squared_relu", "quick_geglu")  # Megatron takes one of them


def add_any2any_arguments(parser: ArgumentParser) -> ArgumentParser:
    """The parser, with the arguments of vision, generator and data added."""
    group = parser.add_argument_group("any2any", "the reference model on handwritten digits")
    for module, stack in (("vision", SIZES.vision), ("generator", SIZES.generator)):
        group.add_argument(f"--{module}-num-layers", type=int, default=stack.num_layers)
        group.add_argument(f"--{module}-hidden-size", type=int, default=stack.hidden_size)
        group.add_argument(f"--{module}-num-attention-heads", type=int, default=stack.num_heads)
        group.add_argument(f"--{module}-ffn-hidden-size", type=int, default=None, help="default: 4 x hidden size")
    group.add_argument(
        "--generator-loss-weight", type=float, default=4.0, help="weight of the pixel loss next to the text loss"
    )
    group.add_argument(
        "--digits-text-only-frac", type=float, default=MIX.text_only_frac, help="share of samples without any image"
    )
    group.add_argument(
        "--digits-two-image-frac", type=float, default=MIX.two_image_frac, help="share of samples with two images"
    )
    group.add_argument(
        "--digits-generate-frac", type=float, default=MIX.generate_frac, help="share of samples that ask for a drawing"
    )
    group.add_argument(
        "--workload", metavar="FILE", help="a model file like those in conf/model: trained on made-up data, not digits"
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="train nothing of these modules; MODULE+projector: but what makes its output rows",
    )
    group.add_argument(
        "--loss-mean-over",
        choices=("tokens", "samples"),
        default="tokens",
        help="every loss token counts the same, or every sample (and drawing)",
    )
    group.add_argument(
        "--digits-files", metavar="DIR", help="samples of scripts/pack_digits.py: each rank reads what its lanes need"
    )
    group.add_argument("--digits-seed", type=int, default=1234, help="which samples are drawn; not the weights")
    return parser


def sizes_from_args(args: Namespace) -> Any2AnySizes:
    """The model's sizes, the backbone's from Megatron's own arguments."""
    return Any2AnySizes(
        vision=_stack_from_args(args, "vision_"),
        llm=_stack_from_args(args, ""),
        generator=_stack_from_args(args, "generator_"),
        seq_length=args.seq_length,
        vocab_size=args.vocab_size,
    )


def workload_from_args(args: Namespace) -> Workload:
    """The model that the arguments describe. With `--workload` Megatron's own arguments are set to its backbone."""
    batch = args.global_batch_size or 1
    _require_one_activation(args)
    if args.workload is None:
        _obey_samples(args)
        args.max_position_embeddings = args.max_position_embeddings or args.seq_length
        return _frozen(workload(sizes_from_args(args), batch, mix_from_args(args)), args.freeze)
    model = replace(load_workload_file(args.workload), global_batch_size=batch)
    _require_buildable(args.workload, model)
    _obey_file(args, model)
    return _frozen(model, args.freeze)


def _require_buildable(path: str, model: Workload) -> None:
    """Refuse a model file whose layers the reference model would leave out."""
    for module in model.modules:
        for key in _NOT_BUILT:
            if getattr(module, key):
                raise ConfigError(
                    f"{path}: module {module.name!r}: {key}",
                    got=getattr(module, key),
                    expected="0: the reference model does not build it",
                    fix=f"leave {key} out, or plan without running",
                )


def _obey_file(args: Namespace, model: Workload) -> None:
    """Set Megatron's arguments to the backbone of a model file; refuse what says otherwise."""
    backbone, untouched = model.backbone, read_words([]).defaults
    sizes = {
        "num_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "num_attention_heads": backbone.num_heads,
        "ffn_hidden_size": backbone.ffn_hidden_size,
        "kv_channels": backbone.head_size,
        "group_query_attention": backbone.query_groups != backbone.num_heads,
        "num_query_groups": backbone.query_groups,
        "seq_length": backbone.tokens_per_item,
        "vocab_size": backbone.vocab_size,
    }
    for name, value in {**dict.fromkeys(_OF_DIGITS), **sizes}.items():
        if getattr(args, name) not in (untouched[name], value):
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                got=getattr(args, name),
                expected=f"left out beside --workload: {args.workload} describes the modules and their data",
                fix="write it into the file, or leave --workload out",
            )
    for name, value in sizes.items():
        setattr(args, name, value)
    args.max_position_embeddings = max(args.max_position_embeddings or 0, args.seq_length)
    if any(module.gated for module in model.modules) and args.squared_relu:
        raise ConfigError(
            "--squared-relu",
            got="set",
            expected=f"not set: modules of {args.workload} are gated",
            fix="leave it out, or set gated: false in the file",
        )


def _obey_samples(args: Namespace) -> None:
    """Refuse what says how samples are drawn beside files of them."""
    if args.digits_files is None:
        return
    untouched = read_words([]).defaults
    for name in _OF_DRAWING:
        if getattr(args, name) != untouched[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')}",
                got=getattr(args, name),
                expected=f"left out beside --digits-files: the samples of {args.digits_files} are drawn",
                fix="leave it out, or leave --digits-files out",
            )


def _require_one_activation(args: Namespace) -> None:
    chosen = [f"--{name.replace('_', '-')}" for name in _ACTIVATIONS if getattr(args, name)]
    if len(chosen) > 1:
        raise ConfigError(chosen[1], got=" with ".join(chosen), expected="one activation", fix=f"leave {chosen[1]} out")


def _frozen(model: Workload, names: Sequence[str]) -> Workload:
    """The workload with these modules frozen; `NAME+projector` trains what makes its rows all the same."""
    modules = {module.name: module for module in model.modules}
    for word in names:
        name, _, kept = word.partition("+")
        if name not in modules or kept not in ("", "projector"):
            raise ConfigError(
                "--freeze", got=word, expected=f"one of {list(modules)}, or NAME+projector", fix="name a module"
            )
        modules[name] = replace(modules[name], frozen=True, trains_projector=bool(kept))
    return replace(model, modules=tuple(modules.values()))


def mix_from_args(args: Namespace) -> DigitsMix:
    """The shares of the kinds of samples."""
    return DigitsMix(
        text_only_frac=args.digits_text_only_frac,
        two_image_frac=args.digits_two_image_frac,
        generate_frac=args.digits_generate_frac,
    )


def read_words(words: Sequence[str], defaults: Mapping[str, Any] | None = None) -> CommandLine:
    """The words of a command line of the reference model, read without Megatron; `defaults` win over its own."""
    return read_command_line(words, add_any2any_arguments, {**MEGATRON_DEFAULTS, **(defaults or {})})


def workload_of_command_line(words: Sequence[str]) -> Workload:
    """The workload that these command-line arguments describe, without importing Megatron: to check a plan early."""
    return workload_from_args(read_words(words).values)


def judge_words(line: CommandLine, plan: Plan, purpose: Purpose) -> tuple[Workload, tuple[str, ...]]:
    """(workload, sentences on arguments without effect). ConfigError, PlanError for what cannot run under the plan."""
    model = workload_from_args(line.values)
    validate_plan(plan, model)
    apply_training(Namespace(), plan.training, line.typed)
    decided = {**decided_by(plan, model.backbone.name), **decide_arguments(plan.training)}
    notes = judge(line, purpose=purpose, decided=decided, facts=facts_of(model))
    lr_mults_from_args(line.values, [module.name for module in model.modules])
    _require_attention(line.values, model.backbone, plan)
    require_learning_rate(line.values)
    return model, notes


def _require_attention(args: Namespace, backbone: ModuleConfig, plan: Plan) -> None:
    """What the backbone's layers would refuse, before a rank starts."""
    if args.group_query_attention:
        require_query_groups(args.num_query_groups, backbone.num_heads, plan.modules[backbone.name].layout.tp)
    if args.use_rotary_position_embeddings or args.position_embedding_type == "rope":
        require_rotated_channels(args.kv_channels or backbone.head_size, args.rotary_percent)


def refuse_given(typed: Mapping[str, Any], given: Sequence[str], command: str) -> None:
    """Refuse arguments that the command gives its processes itself."""
    for dest in given:
        if dest in typed:
            flag = f"--{dest.replace('_', '-')}"
            raise ConfigError(flag, got="set", expected=f"left out: `{command}` gives it", fix=f"leave {flag} out")


def _stack_from_args(args: Namespace, prefix: str) -> StackSizes:
    hidden_size = getattr(args, f"{prefix}hidden_size")
    return StackSizes(
        num_layers=getattr(args, f"{prefix}num_layers"),
        hidden_size=hidden_size,
        num_heads=getattr(args, f"{prefix}num_attention_heads"),
        ffn_hidden_size=getattr(args, f"{prefix}ffn_hidden_size") or 4 * hidden_size,
    )
