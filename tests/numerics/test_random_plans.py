"""Random workloads under random plans, in real processes: what no table thought of. The oracle is one process.

Few examples, always the same, in every run of the suite; many, drawn anew, with `-m slow`.
"""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_mosaic.parity.check import check_plan
from megatron_mosaic.plan.plan_file import format_plan, save_plan
from megatron_mosaic.plan.workload_file import format_workload
from tests.numerics import parity_cases  # noqa: F401  loads the runtime before ranks are forked
from tests.worlds import plans, workloads

pytestmark = pytest.mark.dist

worlds = workloads().flatmap(lambda workload: st.tuples(st.just(workload), plans(workload, max_world_size=6)))
in_processes = settings(
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take hours
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def check_world(workload, plan, *arguments: str) -> None:
    with tempfile.TemporaryDirectory(prefix="mosaic-test-") as directory:
        save_plan(plan, Path(directory) / "plan.yaml")
        (Path(directory) / "model.yaml").write_text(format_workload(workload))
        words = ["--workload", f"{directory}/model.yaml", *arguments]
        parity = check_plan(f"{directory}/plan.yaml", steps=2, megatron_args=words)
    assert parity.ok, (parity.as_dict(), format_workload(workload), format_plan(plan))


@settings(in_processes, max_examples=6, derandomize=True, database=None)
@given(worlds)
def test_a_few_random_worlds(world) -> None:
    check_world(*world)


@pytest.mark.slow
@settings(in_processes, max_examples=60, derandomize=False)
@given(worlds, st.sampled_from([(), ("--use-distributed-optimizer",), ("--overlap-grad-reduce",)]))
def test_many_random_worlds(world, arguments) -> None:
    check_world(*world, *arguments)
