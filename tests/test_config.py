"""Overrides -> task: good words compose, typos are refused with the place, the choices and a way out."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mosaic.any2any.sizes import Any2AnySizes
from megatron_mosaic.any2any.sizes import workload as any2any_workload
from megatron_mosaic.config import GROUPS, compose_sections, group_options, load_task, load_workload, resolve_names
from megatron_mosaic.cost_model.hardware.profile import save_profile
from megatron_mosaic.errors import ConfigError, ProfileError
from megatron_mosaic.plan.training import Format, Sharding, TrainingSetup
from tests.cases import make_profile

H100 = "cluster=h100_8x8"


def test_any2any_agrees_with_the_model_that_is_trained():
    ours = load_workload(["model=any2any-digits"])
    theirs = any2any_workload(Any2AnySizes(), 32)
    assert ours.modules == theirs.modules or [m.items_per_sample for m in ours.modules] == pytest.approx(
        [m.items_per_sample for m in theirs.modules]
    )
    assert ours.digest == theirs.digest
    assert ours.global_batch_size == 32


GPU_CLUSTERS = [name for name in group_options("cluster") if name != "local"]


@pytest.mark.parametrize(
    ("model", "cluster"),
    [(model, "h100_8x8") for model in group_options("model")] + [("vlm_7b", cluster) for cluster in GPU_CLUSTERS],
)
def test_every_file_of_conf_loads(model, cluster):
    task = load_task([f"model={model}", f"cluster={cluster}"])
    assert (task.workload.name, task.cluster.name) == (model, cluster)
    assert task.profile is None


def test_overrides_reach_the_task():
    words = ["model=vlm_7b", "cluster=h100_8x8", "workload.global_batch_size=64", "search.max_tp=4"]
    words += ["+workload.items_per_sample.vision=3.5", "model.modules.llm.num_layers=16", "cluster.num_nodes=2"]
    task = load_task(words)
    assert task.workload.global_batch_size == 64
    assert task.search.max_tp == 4
    assert task.workload.by_name["vision"].items_per_sample == 3.5
    assert task.workload.by_name["llm"].num_layers == 16
    assert task.cluster.num_ranks == 16


def test_local_takes_the_profile(tmp_path, monkeypatch):
    workload = load_workload(["model=any2any-digits"])
    path = tmp_path / "profile.yaml"
    save_profile(make_profile(workload), path)
    task = load_task(["cluster=local", "cluster.num_ranks=2"], profile_path=path)
    assert (task.cluster.num_ranks, task.cluster.shared_cores) == (2, 2)
    assert task.said[1] == TrainingSetup(format=Format.fp32)
    assert load_task(["workload.training.format=fp32"], profile_path=path).said[1] == task.said[1]
    assert task.cost_model().name == "profile of made up, 2026-11-20"
    monkeypatch.setenv("MOSAIC_PROFILE", str(path))
    assert load_task([]).cluster.num_ranks == 4
    monkeypatch.setenv("MOSAIC_PROFILE", str(tmp_path / "none"))
    with pytest.raises(ProfileError, match="mosaic calibrate"):
        load_task([])


@pytest.mark.parametrize(
    ("words", "where", "expected"),
    [
        (["cluster=b200"], "override 'cluster=b200'", "'h100_8x8', 'h200_1x8', 'local']"),
        (["model="], "override 'model='", "any2any-digits"),
        (["vlm_7b"], "override 'vlm_7b'", "key=value"),
        (["search.max_tq=4"], "override 'search.max_tq=4'", "keys of the groups"),
        (["+search.max_tq=4"], "search.max_tq", "a key of this group"),
        (["+serch.max_tp=4"], "override '+serch.max_tp=4'", "a key of model, cluster, workload, search"),
        (["++model.modules.vision.hiden_size=4"], "model.modules.vision.hiden_size", "a key of this group"),
        (["+cluster.gpuz=4"], "cluster.gpuz", "a key of this group"),
        (["search.max_tp=four"], "search.max_tp", "valid integer"),
        (["search.max_tp=0"], "search.max_tp", "greater than or equal to 1"),
        (["search.memory_frac=2"], "search.memory_frac", "in (0, 1]"),
        (["~search.max_tp"], "override '~search.max_tp'", "nothing can be deleted"),
        (["~model=3"], "override '~model=3'", "nothing can be deleted"),
        (["+++search.max_tp=3"], "override '+++search.max_tp=3'", "group.key=value"),
        (["=1"], "override '=1'", "group.key=value"),
        ([""], "override ''", "key=value"),
        (["hydra.run.dir=x"], "override 'hydra.run.dir=x'", "a key of model"),
        (["hydra/launcher=basic"], "override 'hydra/launcher=basic'", "group.key=value"),
        (["+model@x=vlm_7b"], "override '+model@x=vlm_7b'", "group.key=value"),
        (["+search=default"], "override '+search=default'", "search=NAME"),
        (["search.max_tp=1,2"], "override 'search.max_tp=1,2'", "keys of the groups"),
        (["search.max_tp=range(1,9)"], "override 'search.max_tp=range(1,9)'", "keys of the groups"),
        (["search.max_tp=" + "9" * 5_000], "override 'search.max_tp=999", "at most 2000"),
        (["search." + "a" * 300 + "=1"], "override 'search.aaa", "group.key=value"),
        (["search.max_tp=1"] * 2_000, "overrides", "at most 20000 characters"),
        (["search.max_tp=["], "", "keys of the groups"),
        (["model.modules.vision.role=chef"], "model.modules.vision.role", "'encoder', 'backbone' or 'generator'"),
        (["model.modules.llm.num_heads=5"], "module 'llm': num_heads", "a divisor of hidden_size"),
        (["+workload.items_per_sample.audio=2"], "workload.items_per_sample.audio", "one of ['vision', 'llm'"),
        (["cluster.gpu=v100"], "cluster.gpu", "h100_sxm"),
        (["cluster.inter=null"], "cluster.inter", "a section"),
        (["cluster.intra.bytes_per_s=0"], "cluster.intra.bytes_per_s", "greater than or equal to 1"),
        (["cluster.intra.latency_s=0"], "cluster.intra.latency_s", "greater than 0"),
        (["cluster.intra.latency_s=1e308"], "cluster.intra.latency_s", "less than or equal to 10"),
        (["cluster.inter.latency_s=1e400"], "cluster.inter.latency_s", "finite number"),
        (["cluster.inter.bytes_per_s=nan"], "cluster.inter.bytes_per_s", "finite number"),
        (["model.modules.llm.num_layers=0"], "model.modules.llm.num_layers", "greater than or equal to 1"),
        (["cluster.gpus_per_node=1000000000"], "cluster.gpus_per_node", "less than or equal to 1048576"),
        (["cluster.gpus_per_node=1000000", "cluster.num_nodes=1000000"], "cluster.num_nodes", "at most 1048576 GPUs"),
        (["cluster=local", "cluster.num_ranks=1000000000"], "cluster.num_ranks", "less than or equal to 1048576"),
        (["workload.global_batch_size=1000000000"], "workload.global_batch_size", "less than or equal to 1048576"),
        (["search.max_tp=" + "[" * 1_500], "", "keys of the groups"),
        (["+workload.items_per_sample.vision=1e9"], "workload.items_per_sample.vision", "less than or equal to 10000"),
        (["+workload.items_per_sample.vision=-1"], "workload.items_per_sample.vision", "greater than or equal to 0.00"),
        (["+workload.items_per_sample.vision=inf"], "workload.items_per_sample.vision", "finite number"),
        (["model.modules.vision.items_per_sample=nan"], "model.modules.vision.items_per_sample", "finite number"),
        (["model.modules.vision.items_per_sample=1e9"], "model.modules.vision.items_per_sample", "or equal to 10000"),
        (["search.memory_frac=nan"], "search.memory_frac", "finite number"),
        (["workload.training.tp_overlap_frac=inf"], "workload.training.tp_overlap_frac", "finite number"),
        (["workload=tiny"], "override 'workload=tiny'", "one of ['default']"),
    ],
)
def test_refuses(words, where, expected):
    given = [] if any(w.startswith("cluster=") for w in words) else [H100]
    with pytest.raises(ConfigError) as caught:
        load_task([*given, *words])
    assert caught.value.where.startswith(where)
    assert expected in caught.value.expected
    assert caught.value.got and caught.value.fix


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1) | st.text("\\${}'a:", min_size=1))
@settings(max_examples=30)
def test_values_of_a_plan_are_taken_literally(text):
    link = {"name": text, "bytes_per_s": 1e9, "latency_s": 1e-6, "source": text}
    values = {"kind": "gpu", "name": text, "gpu": "h100_sxm", "num_nodes": 1, "gpus_per_node": 8}
    values |= {"intra": link, "inter": link}
    found = compose_sections(["cluster.num_nodes=2"], values).cluster
    assert found.model_dump() == values | {"num_nodes": 2}


@pytest.mark.parametrize(
    "word",
    [
        "search.max_tp=${oc.env:SECRET}",
        "search.max_tp=$\\{oc.env\\:SECRET\\}",  # Hydra's grammar would take the backslashes away
        "model.name=${oc.env:SECRET}",
        "model.modules.vision=${oc.env:SECRET}",
        "+model@x=${oc.env:SECRET}",
        "search=${oc.env:SECRET}",
        "search.max_tp=${search.max_pp}",
        "search.max_tp=${",
    ],
)
def test_no_word_reads_the_environment(word, monkeypatch):
    monkeypatch.setenv("SECRET", "opensesame")
    with pytest.raises(ConfigError) as caught:
        load_task([H100, word])
    assert "opensesame" not in str(caught.value)
    assert "interpolation" in caught.value.got


@pytest.mark.parametrize("word", ["model=audio", "cluster=tpu"])
def test_advice_on_an_unknown_name_names_what_there_is(word):
    with pytest.raises(ConfigError) as caught:
        load_workload([word])
    group = word.partition("=")[0]
    assert all(name in caught.value.expected for name in group_options(group))
    assert "or a file: FILE.yaml" in caught.value.expected


@pytest.mark.parametrize("word", ["model=/path/x", "model=mine.yaml", "cluster=../x/y"])
def test_a_file_that_is_not_there_is_named(word):
    with pytest.raises(ConfigError) as caught:
        load_workload([word])
    assert (caught.value.where, caught.value.got) == (word.partition("=")[2], "no such file")


def _own_files(folder):
    """A model and a cluster of one's own: those of conf with other numbers."""
    for group, name, changes in (("model", "vlm_7b", {"name": "mine"}), ("cluster", "h100_1x8", {"name": "small"})):
        data = yaml.safe_load((files("megatron_mosaic.conf") / group / f"{name}.yaml").read_text(encoding="utf-8"))
        (folder / group).mkdir()
        (folder / group / "mine.yaml").write_text(yaml.safe_dump(data | changes, sort_keys=False), encoding="utf-8")
    return f"model={folder}/model/mine.yaml", f"cluster={folder}/cluster/mine.yaml"


def test_own_files_are_as_good_as_shipped_ones(tmp_path):
    model, cluster = _own_files(tmp_path)
    own = load_task([model, cluster, "cluster.num_nodes=2", "model.modules.llm.num_layers=8"])
    shipped = load_task(["model=vlm_7b", "cluster=h100_1x8", "cluster.num_nodes=2", "model.modules.llm.num_layers=8"])
    assert own.workload == replace(shipped.workload, name="mine")
    assert own.cluster == replace(shipped.cluster, name="small")
    assert own.said[0] == {**shipped.said[0], "name": "small"}  # a plan says all values: nobody else has the file


def test_a_folder_of_own_files_gives_them_names(tmp_path):
    model, cluster = _own_files(tmp_path)
    words = ["model=mine", "cluster=mine", "search.max_tp=2"]
    assert resolve_names(words, tmp_path) == [model, cluster, "search.max_tp=2"]
    shipped = ["model=vlm_7b", "cluster=h100_8x8"]
    assert resolve_names(shipped, tmp_path) == shipped
    with pytest.raises(ConfigError, match="--config-dir"):
        resolve_names(words, tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("name: x\nmodules: {}\n", "global_batch_size"),
        ("name: x\nglobal_batch_size: 1\nmodules: {llm: {role: backbone, width: 3}}\n", "modules.llm"),
        ("name: ${oc.env:HOME}\nglobal_batch_size: 8\nmodules: []\n", "modules"),
        ("just words", "mine.yaml"),
        ("a: [1\n", "mine.yaml"),
    ],
)
def test_a_wrong_own_file_is_named_with_its_key(tmp_path, text, where):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_workload([f"model={path}"])
    assert str(path) in caught.value.where and where in caught.value.where


def test_what_stands_in_an_own_file_is_taken_literally(tmp_path):
    model, _ = _own_files(tmp_path)
    path = Path(model.partition("=")[2])
    path.write_text(path.read_text(encoding="utf-8").replace("name: mine", "name: ${oc.env:HOME}"), encoding="utf-8")
    assert load_workload([model]).name == "${oc.env:HOME}"


def test_sections_cover_the_groups():
    sections = compose_sections([H100])
    assert set(type(sections).model_fields) == set(GROUPS)


def test_a_plan_for_gpus_may_be_trained_with_another_set_up():
    words = ["format=fp8", "sharding=optimizer", "gradient_overlap_frac=0.9"]
    task = load_task([H100, "model=vlm_7b", *(f"workload.training.{word}" for word in words)])
    assert task.cost_model().source.setup == TrainingSetup(
        format=Format.fp8, sharding=Sharding.optimizer, gradient_overlap_frac=0.9
    )
    with pytest.raises(ConfigError, match=r"none: what `mosaic calibrate` measured"):
        load_task(["cluster=local", "workload.training.sharding=optimizer"])
    with pytest.raises(ConfigError, match=r"fp32: what `mosaic calibrate` measured"):
        load_task(["cluster=local", "workload.training.format=bf16"])
    with pytest.raises(ConfigError, match="'none', 'optimizer', 'gradients' or 'parameters'"):
        load_task([H100, "workload.training.sharding=all"])
