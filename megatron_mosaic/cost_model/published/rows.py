"""A row of a published table -> workload, plan, cluster and set-up, or the reason why it cannot be predicted."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosaic.cost_model.effects.counts import count_flops, module_parameters
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.published.cells import Cells, Refusal, Row
from megatron_mosaic.cost_model.published.gpu_names import build_cluster
from megatron_mosaic.cost_model.published.model_cards import encoder_columns, is_gated, model_card
from megatron_mosaic.cost_model.published.recompute_cells import Recomputation, read_recompute
from megatron_mosaic.errors import ConfigError, MosaicError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, Recompute, ScheduleChoice
from megatron_mosaic.plan.cluster import Cluster, GpuType
from megatron_mosaic.plan.training import Dispatcher, Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload
from megatron_mosaic.text_file import FileKind, read_text_file, show_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measured run, ready to be predicted."""

    row_id: str
    family: str
    gpu: str
    workload: Workload
    plan: Plan
    cluster: Cluster
    setup: TrainingSetup
    measured_s: float  # 0: not measured
    measured_bytes: float
    is_incomplete: bool  # it says that its recomputation is not stated: none is taken


_Recomputations = tuple[Recomputation, Recomputation]  # of the backbone and of encoders
TABLE = FileKind(what="a CSV table in UTF-8", error=ConfigError, fix="correct the file, or move it away")
_LARGE = 1e9  # parameters
_MAX_STAGES = 1024  # the time of a prediction grows with them
_FORMATS = (
    ("nvfp4", Format.nvfp4),
    ("mx", Format.mxfp8),
    ("fp8", Format.fp8),
    ("bf16", Format.bf16),
    ("fp16", Format.fp16),
    ("amp", Format.bf16),
)


def load_table(path: Path) -> tuple[list[str], list[Row]]:
    """Column names and rows of a CSV file; a byte order mark is no part of them. ConfigError if it cannot be read."""
    lines = io.StringIO(read_text_file(path, TABLE), newline="")
    try:
        names = [name.strip() for name in next(csv.reader(lines), ())]
        table = csv.DictReader(lines, names)
        rows: list[Row] = [{key: (value or "").strip() for key, value in row.items() if key} for row in table]
    except csv.Error as error:
        raise ConfigError(show_path(path), got=str(error), expected=TABLE.what, fix=TABLE.fix) from error
    return names, rows


def load_rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV file. ConfigError if it cannot be read or lacks one of `columns`."""
    names, rows = load_table(path)
    missing = [name for name in columns if name not in names]
    if missing:
        raise ConfigError(
            str(path),
            got=f"no column {', '.join(missing)}",
            expected=f"the columns {', '.join(columns)}",
            fix="add what is missing, or move the file away",
        )
    return rows


def build_case(row: Row, gpus: Mapping[str, GpuType] | None = None) -> Case:
    """The case of a row. Refusal says why there is none."""
    name = row.get("model", "")
    card = model_card(name)
    number = Cells(row, {**(card.columns if card else {}), **encoder_columns(name)})
    cluster = build_cluster(row, number.need("n_gpus"), gpus or {})
    backbone = _backbone(row, number)
    encoder = _encoder(number) if row.get("enc_layers") or encoder_columns(name) else None
    modules = (encoder, backbone) if encoder else (backbone,)
    edges = (
        (Edge(source="vision", target="llm", rows_per_item=encoder.tokens_per_item, width=backbone.hidden_size),)
        if encoder
        else ()
    )
    gbs = number.need("gbs")
    workload = Workload(name="published", modules=modules, edges=edges, global_batch_size=gbs)
    again = read_recompute(row.get("recompute", ""), -(-backbone.num_layers // number.degree("pp", most=_MAX_STAGES)))
    setup = _setup(row, backbone, again if encoder else again[:1])
    plan = _plan(row, number, backbone, encoder, gbs, again)
    if cluster.num_ranks < plan.world_size:
        raise Refusal("its degrees need more GPUs than it names")
    return Case(
        row_id=row.get("row_id", "?"),
        family=row.get("family", "") or "?",
        gpu=cluster.gpu.name,
        workload=workload,
        plan=plan,
        cluster=cluster,
        setup=setup,
        measured_s=_measured_s(number, workload),
        measured_bytes=_measured_bytes(row, number),
        is_incomplete="not stated" in row.get("recompute", "").lower(),
    )


def _backbone(row: Row, number: Cells) -> ModuleConfig:
    name, family = row.get("model", ""), row.get("family", "")
    if family in ("hybrid", "t5", "nemotron") or "nemotron_3" in name.lower():
        raise Refusal("state-space, encoder-decoder or hybrid layers are not modelled")
    if "grpo" in name.lower() or "lora" in name.lower():
        raise Refusal("reinforcement learning or adapters inside frozen layers are not modelled")
    if (family == "vlm" or "multimodal" in name) and not (row.get("enc_layers") or encoder_columns(name)):
        raise Refusal("its encoder's dimensions are not stated")
    layers, hidden = number.need("num_layers"), number.need("hidden")
    card = model_card(name, layers)
    fields: dict[str, Any] = {
        "name": "llm",
        "role": Role.backbone,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": number.need("heads"),
        "ffn_hidden_size": number.get("ffn_hidden", 4 * hidden),
        "tokens_per_item": number.need("seq_len"),
        "num_query_groups": number.get("kv_heads", 0),
        "vocab_size": 0 if family == "dit" else number.get("vocab", 51200),
        "gated": is_gated(name),
        "causal": family not in ("dit", "bert"),
        "untied_output": is_gated(name) or "untie" in name,
    }
    fields |= card.fields if card else {}
    if (family in ("moe", "mixtral") or "experts" in name) and "num_experts" not in fields:
        found = re.search(r"(?<!\d)(\d{1,4})experts", name)
        if not found:
            raise Refusal("a mixture of experts whose number of experts is not stated")
        fields |= {"num_experts": int(found[1]), "moe_top_k": 2}
    try:
        return ModuleConfig(**fields)
    except ConfigError as error:
        raise Refusal(str(error).splitlines()[0]) from error


def _encoder(number: Cells) -> ModuleConfig:
    if number.row.get("enc_frozen") == "1":
        raise Refusal("frozen encoder before padded samples: the true sequence length is not stated")
    hidden = number.need("enc_hidden")
    return ModuleConfig(
        name="vision",
        role=Role.encoder,
        num_layers=number.need("enc_layers"),
        hidden_size=hidden,
        num_heads=number.need("enc_heads"),
        ffn_hidden_size=number.get("enc_ffn", 4 * hidden),
        tokens_per_item=number.need("enc_tokens_per_image"),
        items_per_sample=number.need("images_per_sample"),
        output_size=number.need("hidden"),
    )


def _micro_batch(number: Cells, gbs: int, dp: int) -> int:
    """Samples of a microbatch. Refusal where cells contradict each other: some tables call the local batch so."""
    count = number.get("num_microbatches", 0)
    if not number.row.get("mbs"):
        if not count or gbs % (count * dp):
            raise Refusal("the micro batch is not stated")
        return gbs // (count * dp)
    mbs = number.degree("mbs")
    if gbs % (mbs * dp):
        raise Refusal(f"global batch {gbs} is not a multiple of micro batch {mbs} x dp {dp}")
    if count and mbs * count * dp != gbs:
        raise Refusal(
            f"micro batch {mbs} x {count} microbatches x dp {dp} is not the global batch {gbs}: a local batch?"
        )
    return mbs


def _plan(
    row: Row, number: Cells, backbone: ModuleConfig, encoder: ModuleConfig | None, gbs: int, again: _Recomputations
) -> Plan:
    n_gpus = number.need("n_gpus")
    if encoder and not row.get("tp"):
        raise Refusal("its parallel layout is not stated")
    tp, pp, cp = number.degree("tp"), number.degree("pp", most=_MAX_STAGES), number.degree("cp")
    enc_tp, enc_pp = number.degree("enc_tp", tp), number.degree("enc_pp", most=_MAX_STAGES)
    enc_dp = number.degree("enc_dp", max(1, n_gpus // (enc_tp * enc_pp)))
    own = enc_tp * enc_dp * enc_pp if encoder else 0
    apart = own > 0 and own + tp * pp * cp * number.get("dp", 0) == n_gpus  # the encoder on GPUs of its own
    on = n_gpus - own if apart else n_gpus
    dp = on // (tp * pp * cp)
    if dp < 1 or on % (tp * pp * cp):
        raise Refusal(f"{on} GPUs are not a multiple of tp {tp} x pp {pp} x cp {cp}")
    if backbone.num_heads % tp:
        raise Refusal(f"{backbone.num_heads} heads cannot be split over tp {tp}")
    mbs = _micro_batch(number, gbs, dp)
    # Not stated: on for a language model (every published recipe has it), off beside an encoder (Megatron's default)
    stated = {"1": True, "0": False}.get(row.get("seq_parallel", ""), encoder is None)
    split = tp > 1 and (stated or bool(backbone.num_experts))
    ep = number.degree("ep") if backbone.num_experts else 1
    stage = on // pp
    ranks = RankSet.block(n_gpus - on, on)
    ep = ep if stage % ep == 0 else 1
    # not stated: Megatron splits experts like everything else where there are ranks enough
    etp = tp if backbone.num_experts and "etp1" not in row.get("model", "") and stage % (ep * tp) == 0 else 1
    layout = Layout(tp=tp, cp=cp, pp=pp, vpp=number.degree("vpp"), dp=dp, ep=ep, etp=etp)
    modules = {"llm": ModulePlan(ranks=ranks, layout=layout, recompute=again[0].kind, sequence_parallel=split)}
    if encoder:
        if own > n_gpus:
            raise Refusal("its encoder's degrees need more GPUs than it names")
        if enc_pp > 1 and not apart:
            raise Refusal("an encoder's pipeline on the backbone's GPUs: its schedule is not stated")
        enc = ModulePlan(
            ranks=RankSet.block(0, own),
            layout=Layout(tp=enc_tp, dp=enc_dp, pp=enc_pp),
            recompute=again[1].kind,
            sequence_parallel=split and enc_tp > 1,
            # beside a pipelined backbone MIMO runs it once for the whole batch, before and after the pipeline
            unit=1 if apart or pp == 1 else gbs // (mbs * dp),
        )
        modules = {"vision": enc, **modules}
    return Plan(
        workload="published",
        world_size=n_gpus,
        global_batch_size=gbs,
        micro_batch_size=mbs,
        schedule=ScheduleChoice("interleaved" if layout.vpp > 1 else "1f1b"),
        modules=modules,
    )


def _setup(row: Row, backbone: ModuleConfig, again: Sequence[Recomputation]) -> TrainingSetup:
    text = row.get("precision", "").lower()
    number_format = next((value for word, value in _FORMATS if word in text), None)
    if number_format is None:
        raise Refusal(f"precision {row.get('precision')!r} is not modelled")
    zero = row.get("zero_or_fsdp", "")
    # fp16 marks Megatron as it was before fused attention and the distributed optimizer: unfused softmax, dropout
    old = number_format is Format.fp16
    if not zero:  # not stated: what recipes of models of this size do since the distributed optimizer is there
        large = module_parameters(backbone) >= _LARGE
        sharding = Sharding.none if old or not large else Sharding.optimizer
    elif "FULL" in zero or "ZeRO-3" in zero or re.fullmatch(r"FSDP(=[1-9]\d*)?", zero):
        sharding = Sharding.parameters
    elif "GRAD_OP" in zero or "ZeRO-2" in zero:
        sharding = Sharding.gradients
    else:
        sharding = Sharding.none if zero == "DDP" else Sharding.optimizer
    overlap = 0.9 if sharding is not Sharding.none else 0.0
    return TrainingSetup(
        format=Format.bf16 if old else number_format,
        sharding=sharding,
        fused_attention=not old,
        dropout=old,
        scatters_messages=old,
        gradient_overlap_frac=overlap,
        tp_overlap_frac=0.8 if number_format.is_low else 0.0,
        expert_overlap_frac=0.5 if number_format.is_low else 0.0,
        optimizer_shards=_optimizer_shards(row),
        loss_copies=_loss_copies(row),
        offloads_encoders=_says_offload(row.get("notes", "")),
        expert_dispatcher=Dispatcher.flex if number_format.is_low else Dispatcher.alltoall,
        recomputed=_common([each.parts for each in again if each.kind is Recompute.selective], Recomputation().parts),
        full_recompute_frac=_common([each.layers_frac for each in again if each.kind is Recompute.full], 1.0),
    )


def _optimizer_shards(row: Row) -> int:
    """Ranks that share an optimizer, where the row says how many; 0: all."""
    if stated := re.search(r"zero\d?=(\d+)", row.get("zero_or_fsdp", "").lower()):
        return int(stated[1])
    replicas = int(row["dp"]) if row.get("dp", "").isdigit() else 0
    return replicas // 2 if "multi_dist_optimizer_instances" in row.get("model", "") else 0


def _loss_copies(row: Row) -> int:
    """fp32 copies of the logits: those of torch's loss where its FSDP shards (Megatron's own is written FSDP=8)."""
    if re.search(r"fsdp(?!=)|full_shard|fully_shard", row.get("zero_or_fsdp", "").lower()):
        return 3
    return 2 if "cross_entropy_loss_fusion" in row.get("model", "") else 1


def _common[T](said: list[T], default: T) -> T:
    """What all modules say that say it. Refusal where they differ: a set-up has one."""
    if any(each != said[0] for each in said):
        raise Refusal("modules recompute different parts of their layers")
    return said[0] if said else default


def _says_offload(notes: str) -> bool:
    """Whether activations were offloaded: said of the run, not denied."""
    text = notes.lower()
    return "offload" in text and not re.search(r"(no|without|w/o|not|offload\w*\s*=\s*(false|none|0)\b)[^;,.]*", text)


def _measured_s(number: Cells, workload: Workload) -> float:
    if seconds := number.positive("iter_time_s"):
        return seconds
    tokens = workload.global_batch_size * workload.backbone.tokens_per_item
    n_gpus = number.need("n_gpus")
    if rate := number.positive("tokens_per_s_per_gpu"):
        return tokens / rate / n_gpus
    if (rate := number.positive("tflops_per_gpu")) and len(workload.modules) == 1:
        # model FLOPs as these tables count them: three forwards, the full attention square
        whole = replace(workload.backbone, causal=False)
        forward = whole.num_layers * count_flops(whole, Part.layer) + count_flops(whole, Part.post)
        return 3 * forward * workload.global_batch_size / (rate * 1e12 * n_gpus)
    return 0.0


def _measured_bytes(row: Row, number: Cells) -> float:
    if "device-used" in row.get("peak_mem_unit", ""):
        return 0.0  # what a device reports includes the context and the allocator's cache
    return number.positive("peak_mem_gb") * (2**30 if "GiB" in row.get("peak_mem_unit", "") else 1e9)


def try_case(row: Row, gpus: Mapping[str, GpuType] | None = None) -> Case | str:
    """The case, or the reason against it."""
    try:
        return build_case(row, gpus)
    except Refusal as refusal:
        return str(refusal)
    except MosaicError as error:
        return " ".join(str(error).split())[:160]
