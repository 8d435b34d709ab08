"""Profiles: what is written reads back, a wrong file is refused by key, and lines never reach far beyond the points."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.cost_model.hardware.catalogue import gpu_type_names, load_gpu_type, local_cluster
from megatron_mosaic.cost_model.hardware.fit import EXTRAPOLATION, FittedProfile, fit_line
from megatron_mosaic.cost_model.hardware.profile import (
    Operation,
    Part,
    Profile,
    default_profile_path,
    format_profile,
    load_profile,
    require_finite,
    save_profile,
)
from megatron_mosaic.errors import ConfigError, ProfileError
from megatron_mosaic.schedules import Kind
from tests.cases import make_profile

PROFILE = make_profile()


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "profile.yaml"
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE
    path.write_text(json.dumps(PROFILE.model_dump(mode="json")))  # JSON turns every key into text
    assert load_profile(path) == PROFILE


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d.update(mosaic_profile=2), "mosaic_profile"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("digest"), "digest"),
        (lambda d: d["machine"].update(cores=0), "machine.cores"),
        (lambda d: d["machine"].update(cores=10**11), "machine.cores"),
        (
            lambda d: d["collectives"]["p2p"].update({10**11: d["collectives"]["p2p"][2]}),
            "collectives.p2p.100000000000",
        ),
        (lambda d: d["machine"].update(flops_per_s=float("nan")), "machine.flops_per_s"),
        (lambda d: d["provenance"].update(date=""), "provenance.date"),
        (lambda d: d["modules"]["llm"][1][1][0].update(forward_s=float("nan")), "modules.llm.1.1.0.forward_s"),
        (lambda d: d["modules"]["llm"][1][1][0].update(forward_s=-1.0), "modules.llm.1.1.0.forward_s"),
        (lambda d: d["modules"]["llm"][1][1][0].update(forward_ms=1.0), "modules.llm.1.1.0.forward_ms"),
        (lambda d: d["modules"]["llm"][1].update({1: []}), "modules.llm.1.1"),
        (lambda d: d["modules"]["llm"][1][1].reverse(), "modules.llm.1.1"),
        (lambda d: d["modules"]["llm"][1][1].insert(0, d["modules"]["llm"][1][1][0]), "modules.llm.1.1"),
        (lambda d: d["collectives"].update(broadcast={2: []}), "collectives.broadcast"),
        (lambda d: d["collectives"]["p2p"][2].reverse(), "collectives.p2p.2"),
        (lambda d: d["collectives"]["p2p"][2].pop(), "collectives.p2p.2"),
        (lambda d: d["optimizer"].clear(), "optimizer"),
        (lambda d: d.update(crowding=[{"ranks": 2, "slow_down": 0.5}]), "crowding.0.slow_down"),
        (lambda d: d.update(crowding=[{"ranks": n, "slow_down": 2.0} for n in (4, 2)]), "crowding"),
    ],
)
def test_load_refuses(change, where, tmp_path):
    data = yaml.safe_load(format_profile(PROFILE))
    change(data)
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert caught.value.where.startswith(f"{path}: {where}")
    assert "mosaic calibrate" in caught.value.fix


@pytest.mark.parametrize("text", ["", "[1", "- 1", "[" * 100_000, "digest: a\ndigest: a", "date: 2026-99-99"])
def test_load_refuses_what_is_no_profile(text, tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match="mosaic calibrate"):
        load_profile(path)


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(ProfileError) as caught:
        load_profile(tmp_path / "none.yaml")
    assert caught.value.got == "no such file"
    assert caught.value.fix == "run `mosaic calibrate`, or give --profile"


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.delenv("MOSAIC_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_profile_path() == tmp_path / "megatron_mosaic" / "profile.yaml"
    monkeypatch.setenv("MOSAIC_PROFILE", str(tmp_path / "mine.yaml"))
    assert default_profile_path() == tmp_path / "mine.yaml"
    monkeypatch.delenv("MOSAIC_PROFILE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_profile_path().parts[-3:] == (".cache", "megatron_mosaic", "profile.yaml")


@given(st.floats(0, 1), st.floats(1e-6, 1), st.lists(st.integers(1, 500), min_size=2, max_size=6, unique=True))
def test_fit_recovers_a_line(intercept_s, slope_s, sizes):
    # points that lie on a line are met by the least-squares line through them
    line = fit_line("x", [(size, intercept_s + slope_s * size) for size in sorted(sizes)])
    for size in sizes:
        assert line.at(size) == pytest.approx(intercept_s + slope_s * size, rel=1e-6)


def test_less_work_never_takes_longer():
    line = fit_line("x", [(1, 4.0), (2, 2.0), (3, 1.0)])  # the first two were disturbed
    assert line.slope_s == 0
    assert line.at(1) == line.at(3) == pytest.approx(1.0)
    undisturbed, disturbed = (fit_line("x", [(1, first), (10, 2.0), (100, 11.0)]) for first in (1.1, 9.0))
    assert disturbed.at(50) == pytest.approx(undisturbed.at(50), rel=0.2)


def test_one_point_is_flat():
    assert fit_line("x", [(10, 2.0)]).at(40) == 2.0


def test_no_silent_extrapolation():
    fitted = FittedProfile(PROFILE)
    line = fitted.module("llm", 1, 1, Part.layer, Kind.F)
    assert line.at(16 * EXTRAPOLATION) == pytest.approx((1 + 64) * 1e-3)
    assert line.at(0.5) == pytest.approx(1.5e-3)  # below the smallest point: on to the intercept
    with pytest.raises(ProfileError) as caught:
        line.at(16 * EXTRAPOLATION + 1)
    assert caught.value.where == "profile: modules.llm.1.1.layer"
    assert "mosaic calibrate" in caught.value.fix


@pytest.mark.parametrize(
    ("ask", "where"),
    [
        (lambda f: f.module("audio", 1, 1, Part.layer, Kind.F), "modules.audio.1.1.layer"),
        (lambda f: f.module("llm", 8, 1, Part.layer, Kind.F), "modules.llm.8.1.layer"),
        (lambda f: f.module("llm", 1, 9, Part.pre, Kind.B), "modules.llm.1.9.pre"),
        (lambda f: f.collective(Operation.all_reduce, 64), "collectives.all_reduce.64"),
    ],
)
def test_unmeasured_is_an_error(ask, where):
    with pytest.raises(ProfileError) as caught:
        ask(FittedProfile(PROFILE))
    assert caught.value.where == f"profile: {where}"
    assert caught.value.fix == "run `mosaic calibrate`"


def test_require_finite():
    assert require_finite("x", 1.0) == 1.0
    with pytest.raises(ProfileError, match="finite"):
        require_finite("x", float("nan"))


def test_local_cluster_takes_every_number_from_the_profile():
    cluster = local_cluster(PROFILE, 4)
    assert (cluster.num_ranks, cluster.shared_cores, cluster.gpu.num_sms, cluster.gpu.sm_granularity) == (4, 2, 1, 1)
    assert cluster.gpu.memory_bytes == 2e9  # 8 GB shared by four
    # the made-up points lie on 1.09009e-4 s + 0.990991e-9 s/byte
    assert cluster.intra.latency_s == pytest.approx(1.09009e-4, rel=1e-4)
    assert 1 / cluster.intra.bytes_per_s == pytest.approx(0.990991e-9, rel=1e-4)
    assert set(cluster.gpu.sources.values()) == {"profile of made up, 2026-11-20"} == {PROFILE.title}


def test_a_local_message_is_copied_at_least_and_takes_time():
    data = PROFILE.model_dump()
    data["collectives"]["p2p"][2] = [{"bytes": 1, "seconds": 1.0}, {"bytes": 2, "seconds": 1.0}]
    flat = local_cluster(Profile.model_validate(data), 2)
    assert flat.intra.bytes_per_s == flat.gpu.memory_bytes_per_s
    data["collectives"]["p2p"][2] = [{"bytes": 1, "seconds": 1e-9}, {"bytes": 1000, "seconds": 1.0}]
    with pytest.raises(ProfileError, match="above 0"):
        local_cluster(Profile.model_validate(data), 2)


@pytest.mark.parametrize("name", gpu_type_names())
def test_gpu_types_load_with_a_source_for_each_number(name):
    gpu = load_gpu_type(name)  # the constructor asks for the sources
    assert gpu.name == name
    assert 0 < gpu.gemm_efficiency_frac < 1


def test_unknown_gpu_type_lists_the_known():
    with pytest.raises(ConfigError) as caught:
        load_gpu_type("v100")
    assert "h100_sxm" in caught.value.expected
