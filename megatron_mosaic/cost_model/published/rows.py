"""A row of a published table -> workload, plan, cluster and set-up, or the reason why it cannot be predicted."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosaic.cost_model.effects.counts import count_flops, module_parameters
from megatron_mosaic.cost_model.hardware.catalogue import load_gpu_type
from megatron_mosaic.cost_model.hardware.profile import Part
from megatron_mosaic.cost_model.published.model_cards import is_gated, model_card
from megatron_mosaic.errors import ConfigError, MosaicError
from megatron_mosaic.plan import Layout, ModulePlan, Plan, RankSet, Recompute, ScheduleChoice
from megatron_mosaic.plan.cluster import Cluster, GpuType, Link
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from megatron_mosaic.plan.workload import Edge, ModuleConfig, Role, Workload
from megatron_mosaic.plan.yaml_text import MAX_COUNT
from megatron_mosaic.text_file import FileKind, read_text_file, show_path

Row = Mapping[str, str]


class Refusal(Exception):
    """A row that the model cannot represent; the text is the reason."""


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
    fills_bubbles: bool  # encoders ran in the pipeline's bubbles


# (word of the table's GPU name, GPU type, ranks that NVLink joins, intra and inter bytes/s of a rank), of datasheets;
# of the 72 ranks in a rack the tables use 64
_GPUS = (
    ("gb300", "gb300", 64, 900e9, 100e9),
    ("gb200", "gb200", 64, 900e9, 50e9),
    ("b300", "b300_sxm", 8, 900e9, 100e9),
    ("b200", "b200_sxm", 8, 900e9, 50e9),
    ("h200", "h200_sxm", 8, 450e9, 50e9),
    ("h800", "h100_sxm", 8, 200e9, 50e9),
    ("h100", "h100_sxm", 8, 450e9, 50e9),
    ("hopper", "h100_sxm", 8, 450e9, 50e9),
    ("a100_40gb", "a100_sxm_40gb", 8, 300e9, 25e9),
    ("a800", "a100_sxm_80gb", 8, 200e9, 25e9),
    ("a100", "a100_sxm_80gb", 8, 300e9, 25e9),
)
TABLE = FileKind(what="a CSV table in UTF-8", error=ConfigError, fix="correct the file, or move it away")
_LARGE = 1e9  # parameters
_MAX_MEASURED = 1e15  # of seconds, tokens, TFLOPs or bytes in a cell; its inverse is the least
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


def parse_measured(text: str) -> float | None:
    """The number of a cell that something was measured for: above 0 and not absurd, else nothing."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 1 / _MAX_MEASURED <= value <= _MAX_MEASURED else None


def build_case(row: Row, gpus: Mapping[str, GpuType] | None = None) -> Case:
    """The case of a row. Refusal says why there is none."""
    number = _Numbers(row)
    cluster = _cluster(row, number.need("n_gpus"), gpus or {})
    backbone = _backbone(row, number)
    encoder = _encoder(row, number) if row.get("enc_layers") else None
    modules = (encoder, backbone) if encoder else (backbone,)
    edges = (
        (Edge(source="vision", target="llm", rows_per_item=encoder.tokens_per_item, width=backbone.hidden_size),)
        if encoder
        else ()
    )
    gbs = number.need("gbs")
    workload = Workload(name="published", modules=modules, edges=edges, global_batch_size=gbs)
    setup = _setup(row, backbone)
    plan = _plan(row, number, backbone, encoder, gbs)
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
        fills_bubbles=row.get("notes", "").startswith("Optimus"),
    )


class _Numbers:
    def __init__(self, row: Row) -> None:
        self.row = row

    def get(self, key: str, default: int) -> int:
        """The number in a cell, `default` where it is empty."""
        text = self.row.get(key, "")
        try:
            value = float(text) if text else default
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise Refusal(f"{key} is {text[:40]!r}, not a number")
        if value < 0:
            raise Refusal(f"{key} is {text[:40]}, below 0")
        if text and value > MAX_COUNT:
            raise Refusal(f"{key} is {text[:40]}, beyond the {MAX_COUNT} that this model takes")
        return int(value)

    def degree(self, key: str, default: int = 1, most: int = MAX_COUNT) -> int:
        value = self.get(key, default)
        if not 1 <= value <= most:
            raise Refusal(f"{key} is {value}, not a degree of parallelism from 1 to {most}")
        return value

    def positive(self, key: str) -> float:
        """0 where the cell is empty."""
        text = self.row.get(key, "")
        if not text:
            return 0.0
        value = parse_measured(text)
        if value is None:
            raise Refusal(f"{key} is {text[:40]!r}, not a number above 0, or none that can be measured")
        return value

    def need(self, key: str) -> int:
        value = self.get(key, 0)
        if value < 1:
            raise Refusal(f"{key} is not stated")
        return value


def _cluster(row: Row, n_gpus: int, gpus: Mapping[str, GpuType]) -> Cluster:
    name = row.get("gpu", "").lower()
    found = next((entry for entry in _GPUS if entry[0] in name), None)
    if found is None:
        raise Refusal(f"GPU {row.get('gpu')!r} has no file in gpu_types")
    _, gpu_name, per_node, intra, inter = found
    if stated := re.search(r"inter (\d+)Gbps/node", row.get("notes", "")):
        inter = float(stated[1]) / 8 * 1e9 / per_node
    if stated := re.search(r"(\d+)x(\d+)Gb RoCE per node", row.get("notes", "")):
        inter = float(stated[1]) * float(stated[2]) / 8 * 1e9 / per_node
    gpu = gpus.get(gpu_name) or load_gpu_type(gpu_name)
    source = "bandwidth: datasheet of the system, or what the row states; latency: NCCL tuning.cc, ring, simple"
    return Cluster(
        name=gpu_name,
        gpu=gpu,
        num_nodes=-(-n_gpus // per_node),
        gpus_per_node=min(n_gpus, per_node),
        intra=Link(name="nvlink", bytes_per_s=intra, latency_s=3.4e-6, source=source),
        inter=Link(name="network", bytes_per_s=inter, latency_s=14e-6, source=source),
    )


def _backbone(row: Row, number: _Numbers) -> ModuleConfig:
    name, family = row.get("model", ""), row.get("family", "")
    if family in ("hybrid", "t5", "nemotron"):
        raise Refusal(f"family {family}: state-space, encoder-decoder or hybrid layers are not modelled")
    layers = number.need("num_layers")
    hidden = number.need("hidden")
    ffn = number.get("ffn_hidden", 4 * hidden)
    card = model_card(name, layers)
    sparse = family in ("moe", "mixtral") or "experts" in name
    if sparse and card is None:
        found = re.search(r"(?<!\d)(\d{1,4})experts", name)
        if not found:
            raise Refusal("a mixture of experts whose number of experts is not stated")
        card = {"num_experts": int(found[1]), "moe_top_k": 2}
    fields: dict[str, Any] = {
        "name": "llm",
        "role": Role.backbone,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": number.need("heads"),
        "ffn_hidden_size": ffn,
        "tokens_per_item": number.need("seq_len"),
        "num_query_groups": number.get("kv_heads", 0),
        "vocab_size": 0 if family == "dit" else number.get("vocab", 51200),
        "gated": is_gated(name),
        "causal": family not in ("dit", "bert"),
        "untied_output": is_gated(name),
    }
    try:
        return ModuleConfig(**fields | (card or {}))
    except ConfigError as error:
        raise Refusal(str(error).splitlines()[0]) from error


def _encoder(row: Row, number: _Numbers) -> ModuleConfig:
    if row.get("enc_frozen") == "1":
        raise Refusal("frozen encoder before padded samples: the true sequence length is not stated")
    hidden = number.need("enc_hidden")
    return ModuleConfig(
        name="vision",
        role=Role.encoder,
        num_layers=number.need("enc_layers"),
        hidden_size=hidden,
        num_heads=number.need("enc_heads"),
        ffn_hidden_size=4 * hidden,
        tokens_per_item=number.get("enc_tokens_per_image", number.need("seq_len")),  # else as long as the text
        items_per_sample=number.get("images_per_sample", 1),
        output_size=number.need("hidden"),
    )


def _plan(row: Row, number: _Numbers, backbone: ModuleConfig, encoder: ModuleConfig | None, gbs: int) -> Plan:
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
    mbs = number.degree("mbs")
    if gbs % (mbs * dp):
        raise Refusal(f"global batch {gbs} is not a multiple of micro batch {mbs} x dp {dp}")
    text = row.get("recompute", "")
    recompute = Recompute.full if "full" in text or "per layer" in text else Recompute.none
    recompute = Recompute.selective if "selective" in text or "--recompute-activations" in text else recompute
    # Not stated: on for a language model (every published recipe has it), off beside an encoder (Megatron's default)
    stated = {"1": True, "0": False}.get(row.get("seq_parallel", ""), encoder is None)
    split = tp > 1 and (stated or bool(backbone.num_experts))
    ep = number.degree("ep") if backbone.num_experts else 1
    stage = on // pp
    ranks = RankSet.block(n_gpus - on, on)
    layout = Layout(tp=tp, cp=cp, pp=pp, vpp=number.degree("vpp"), dp=dp, ep=ep if stage % ep == 0 else 1)
    modules = {"llm": ModulePlan(ranks=ranks, layout=layout, recompute=recompute, sequence_parallel=split)}
    if encoder:
        if own > n_gpus:
            raise Refusal("its encoder's degrees need more GPUs than it names")
        if enc_pp > 1 and not apart:
            raise Refusal("an encoder's pipeline on the backbone's GPUs: its schedule is not stated")
        enc = ModulePlan(
            ranks=RankSet.block(0, own),
            layout=Layout(tp=enc_tp, dp=enc_dp, pp=enc_pp),
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


def _setup(row: Row, backbone: ModuleConfig) -> TrainingSetup:
    text = row.get("precision", "").lower()
    number_format = next((value for word, value in _FORMATS if word in text), None)
    if number_format is None:
        raise Refusal(f"precision {row.get('precision')!r} is not modelled")
    if "lora" in row.get("model", "").lower():
        raise Refusal("LoRA: adapters inside frozen layers are not modelled")
    zero = row.get("zero_or_fsdp", "")
    modern = not any(word in row.get("gpu", "").lower() for word in ("a100", "a800"))
    if not zero:  # not stated: what recipes of models of this size do since the distributed optimizer is there
        large = module_parameters(backbone) >= _LARGE
        sharding = Sharding.optimizer if modern and large else Sharding.none
    elif "FULL" in zero or "ZeRO-3" in zero or re.fullmatch(r"FSDP(=[1-9]\d*)?", zero):
        sharding = Sharding.parameters
    elif "GRAD_OP" in zero or "ZeRO-2" in zero:
        sharding = Sharding.gradients
    else:
        sharding = Sharding.none if zero == "DDP" else Sharding.optimizer
    # fp16 marks Megatron as it was before fused attention: unfused softmax, dropout
    old = number_format is Format.fp16
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
        offloads_encoders="offload" in row.get("source_url", ""),  # the name of the campaign
    )


def _measured_s(number: _Numbers, workload: Workload) -> float:
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


def _measured_bytes(row: Row, number: _Numbers) -> float:
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
