"""Command-line arguments of the reference model. The backbone is described by Megatron's own arguments."""

from __future__ import annotations

from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace

from megatron_mosaic.any2any.sizes import Any2AnySizes, DigitsMix, StackSizes, workload
from megatron_mosaic.errors import ConfigError
from megatron_mosaic.plan.workload import Workload
from megatron_mosaic.plan.workload_file import load_workload_file

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
    "max_position_embeddings": SIZES.seq_length,
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
}


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
    if args.workload is None:
        return _frozen(workload(sizes_from_args(args), batch, mix_from_args(args)), args.freeze)
    model = replace(load_workload_file(args.workload), global_batch_size=batch)
    backbone = model.backbone
    for name, value in {
        "num_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "num_attention_heads": backbone.num_heads,
        "ffn_hidden_size": backbone.ffn_hidden_size,
        "seq_length": backbone.tokens_per_item,
        "max_position_embeddings": backbone.tokens_per_item,
        "vocab_size": backbone.vocab_size,
    }.items():
        setattr(args, name, value)
    return _frozen(model, args.freeze)


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


def workload_of_command_line(arguments: Sequence[str]) -> Workload:
    """The workload that these command-line arguments describe, without importing Megatron: to check a plan early."""
    parser = add_any2any_arguments(ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False))
    for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length", "vocab_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=MEGATRON_DEFAULTS[name])
    parser.add_argument("--global-batch-size", type=int, default=None)
    return workload_from_args(parse_known(parser, arguments))


def parse_known(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """What the parser (made with `exit_on_error=False`) knows of the arguments; ConfigError for a wrong value."""
    try:
        return parser.parse_known_args(list(arguments))[0]
    except ArgumentError as error:
        raise ConfigError(
            error.argument_name or "arguments", got=error.message, expected="a value of its type", fix="correct it"
        ) from error


def _stack_from_args(args: Namespace, prefix: str) -> StackSizes:
    hidden_size = getattr(args, f"{prefix}hidden_size")
    return StackSizes(
        num_layers=getattr(args, f"{prefix}num_layers"),
        hidden_size=hidden_size,
        num_heads=getattr(args, f"{prefix}num_attention_heads"),
        ffn_hidden_size=getattr(args, f"{prefix}ffn_hidden_size") or 4 * hidden_size,
    )
