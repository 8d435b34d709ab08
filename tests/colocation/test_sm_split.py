"""SMs of one device divided into lanes, call by call against a driver that keeps the real one's rules, on no GPU."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.colocation.sm_split import SmDriver
from megatron_mosaic.errors import QuotaError
from megatron_mosaic.plan.quota import grant_shares
from tests.colocation.fake_cuda import FakeDriver

SETUP = [("cuInit", 0), ("cuDeviceGet", 0)]
RESOURCE = ("cuDeviceGetDevResource", "device 0", 1)


def context(*sizes: int) -> list[tuple]:
    """The calls that make one lane."""
    return [
        ("cuDevResourceGenerateDesc", list(sizes), len(sizes)),
        ("cuGreenCtxCreate", "device 0", 1),
        ("cuGreenCtxGetDevResource", 1),
        ("cuGreenCtxStreamCreate", 1, 0),
    ]


def test_a_third_and_two_thirds_of_an_h100_call_by_call() -> None:
    """44 + 88: one split into a group of 88, and what is left of it."""
    driver = FakeDriver()
    calls = SmDriver(driver)
    lanes = calls.split(calls.device(0), grant_shares({0: 2 / 3, 1: 1 / 3}, 132, 8))
    assert driver.calls == [
        *SETUP,
        RESOURCE,
        RESOURCE,
        ("cuDevSmResourceSplitByCount", 1, 0, 88),
        *context(88),
        *context(44),
    ]
    first, second = (driver.sms_of_stream(lanes[track].stream) for track in (0, 1))
    assert (len(first), len(second)) == (lanes[0].granted, lanes[1].granted) == (88, 44)
    assert first.isdisjoint(second) and first | second == set(range(132)), "streams share an SM, or one has none"
    calls.close(lanes)
    assert not driver.live
    assert driver.calls[-4:] == [("cuStreamDestroy",)] * 2 + [("cuGreenCtxDestroy",)] * 2


def test_two_splits_of_one_device_would_share_sms() -> None:
    """Why there is one split only: the fake driver knows the trap."""
    driver = FakeDriver()
    resource = driver.cuDeviceGetDevResource("device 0", 1)[1]
    first, second = (driver.cuDevSmResourceSplitByCount(1, resource, 0, 64)[1][0].sms for _ in range(2))
    assert set(first) == set(second)


def test_three_lanes_are_glued_from_the_grains_of_one_split() -> None:
    driver = FakeDriver()
    calls = SmDriver(driver)
    lanes = calls.split(calls.device(0), {0: 48, 1: 44, 2: 40})
    assert [call for call in driver.calls if call[0] == "cuDevSmResourceSplitByCount"] == [
        ("cuDevSmResourceSplitByCount", 11, 0, 8)
    ]
    sms = [driver.sms_of_stream(lane.stream) for lane in lanes.values()]
    assert [len(one) for one in sms] == [48, 44, 40] and len(set().union(*sms)) == 132


@pytest.mark.parametrize("version", [12080, 12090])
def test_before_cuda_13_there_are_two_lanes(version) -> None:
    calls = SmDriver(FakeDriver(version=version))
    device = calls.device(0)
    assert {track: lane.granted for track, lane in calls.split(device, {0: 88, 1: 44}).items()} == {0: 88, 1: 44}
    with pytest.raises(QuotaError, match="CUDA 13000 for more than one lane"):
        calls.split(device, {0: 48, 1: 44, 2: 40})


@given(
    st.sampled_from([(132, 8), (148, 8), (108, 4), (80, 2)]),
    st.lists(st.floats(0.2, 1), min_size=2, max_size=4),
    st.floats(0.7, 1),
    st.booleans(),
)
def test_lanes_never_share_an_sm_and_have_what_was_granted(hardware, weights, total, is_whole) -> None:
    num_sms, grain = hardware
    share = 1.0 if is_whole else total
    shares = {track: weight / sum(weights) * share for track, weight in enumerate(weights)}
    backend_ = FakeDriver(num_sms=num_sms, granularity=grain)
    calls = SmDriver(backend_)
    granted = grant_shares(shares, num_sms, grain)
    lanes = calls.split(calls.device(0), granted)
    sms = [backend_.sms_of_stream(lane.stream) for lane in lanes.values()]
    assert [len(one) for one in sms] == list(granted.values())
    assert len(set().union(*sms)) == sum(granted.values())


@pytest.mark.parametrize(("capability", "granularity"), [(9, 8), (10, 8), (8, 4), (7, 2)])
def test_old_bindings_do_not_tell_the_granularity(capability, granularity) -> None:
    driver = FakeDriver(capability=capability, granularity=granularity, tells_granularity=False)
    calls = SmDriver(driver)
    assert calls.hardware(calls.device(0)).granularity == granularity


def test_a_driver_that_grants_something_else_is_refused(monkeypatch) -> None:
    """L40S: asked for 120, reported 114 (pytorch/pytorch#195378)."""
    driver = FakeDriver()
    real = driver.cuGreenCtxGetDevResource

    def short(ctx, kind):
        status, resource = real(ctx, kind)
        return status, replace(resource, sms=resource.sms[:-6])

    monkeypatch.setattr(driver, "cuGreenCtxGetDevResource", short)
    calls = SmDriver(driver)
    with pytest.raises(QuotaError, match=r"82 SMs\n.*88, as asked"):
        calls.split(calls.device(0), {0: 88, 1: 44})


def test_a_call_that_fails_is_named(monkeypatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(driver, "cuGreenCtxCreate", lambda *args: ("CUDA_ERROR_OUT_OF_MEMORY", None))
    calls = SmDriver(driver)
    with pytest.raises(QuotaError) as caught:
        calls.split(calls.device(0), {0: 88, 1: 44})
    assert caught.value.where == "cuGreenCtxCreate" and "OUT_OF_MEMORY" in caught.value.got
