"""Rank variables from Slurm's: against what srun 22.05 set on three nodes, and against made-up layouts."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mosaic.errors import ConfigError
from megatron_mosaic.launch.slurm.environment import describe_start, rank_environment
from megatron_mosaic.launch.slurm.hosts import count_tasks, expand_hosts, find_address

# As seen by task 4 of `srun --ntasks=5` on nodes with 2, 2 and 1 tasks, and by the batch script around it.
SEEN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_JOB_NODELIST": "n[1-3]",
}
IN_BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "6", "SLURM_NODEID": "0"}


def address(host: str) -> str:
    return f"address-of-{host}"


def test_a_task_of_srun_gets_torchruns_variables() -> None:
    found = rank_environment(SEEN, address)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "address-of-n1",
    }
    assert 20_000 <= int(port) < 30_000


def test_what_is_set_already_stays() -> None:
    assert rank_environment(SEEN | {"RANK": "0"}, address) == {}  # torchrun's worker, under srun
    given_by_user = {"MASTER_ADDR": "a", "MASTER_PORT": "5"}
    assert given_by_user.keys().isdisjoint(rank_environment(SEEN | given_by_user, address))


def test_a_batch_script_is_no_rank() -> None:
    """It would wait for ranks that nobody starts."""
    assert rank_environment(IN_BATCH, address) == {}
    assert rank_environment({}, address) == {}


def test_ranks_of_one_step_meet_at_one_port_and_other_steps_elsewhere() -> None:
    variants = [SEEN, SEEN | {"SLURM_STEP_ID": "1"}, SEEN | {"SLURM_RESTART_COUNT": "1"}, SEEN | {"SLURM_JOB_ID": "18"}]
    ports = [rank_environment(one, address)["MASTER_PORT"] for one in variants]
    assert len(set(ports)) == len(ports)
    assert rank_environment(SEEN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}, address)["MASTER_PORT"] == ports[0]


def test_a_variable_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="SLURM_LOCALID"):
        rank_environment({key: value for key, value in SEEN.items() if key != "SLURM_LOCALID"}, address)


def test_a_host_without_an_address_is_an_error_that_says_what_to_export(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        find_address("no-such-host.invalid")


def test_how_to_start_counts_ranks_and_speaks_of_srun_only_under_srun() -> None:
    assert describe_start(3, SEEN) == "start 3 processes (srun --ntasks=3, one task a rank)"
    assert describe_start(1, IN_BATCH) == "start 1 process"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[08-11,3],a-b.c", ["gpu08", "gpu09", "gpu10", "gpu11", "gpu3", "a-b.c"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
    ],
)
def test_lists_of_hosts(text, hosts) -> None:
    assert list(expand_hosts(text)) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n1]", "n[a-b]", "n[]", "n1,,n2", "n1;reboot", "n[1-999999999]"])
def test_damaged_lists_of_hosts_are_refused(text) -> None:
    with pytest.raises(ConfigError, match="list of hosts"):
        expand_hosts(text)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_every_rank_is_one_task_of_one_node(tasks) -> None:
    """The layout is drawn; Slurm's words are made from it; the variables must give it back."""
    runs = [(value, len(list(group))) for value, group in itertools.groupby(tasks)]
    words = ",".join(f"{value}(x{count})" if count > 1 else str(value) for value, count in runs)
    assert count_tasks(words) == tuple(tasks)
    rank = 0
    for node, count in enumerate(tasks):
        for local in range(count):
            seen = SEEN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
            seen |= {"SLURM_STEP_NUM_TASKS": str(sum(tasks)), "SLURM_STEP_TASKS_PER_NODE": words}
            found = rank_environment(seen, address)
            assert [found[key] for key in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")] == [
                str(rank), str(local), str(count), str(sum(tasks))
            ]  # fmt: skip
            rank += 1
