"""The groups a plan asks for: counted by hand for one plan, and linear in the number of ranks."""

from megatron_mosaic.parallel_state_ext.group_list import FIELDS, list_groups
from megatron_mosaic.plan import Layout
from tests.cases import make_plan


def test_a_small_plans_groups_by_hand() -> None:
    plan = make_plan({"vision": ("0-1", Layout(dp=2)), "llm": ("0-2", Layout(pp=3))}, world_size=3)
    asked = list_groups(plan, (("vision", "llm"),))
    everyone, pair = (0, 1, 2), (0, 1)
    assert list(dict.fromkeys(asked)) == [
        ("", everyone),
        *(("", (rank,)) for rank in everyone),
        ("", pair),  # vision's dp; the llm's pp is everyone
        ("llm+1", everyone),
        ("llm-1", everyone),
        ("vision>llm^", everyone),
        ("vision>llmv", everyone),
        ("llm>vision^", everyone),
        ("llm>visionv", everyone),
    ]


def test_what_wraps_around_virtual_stages_has_its_own_groups() -> None:
    plan = make_plan({"llm": ("0-1", Layout(pp=2, vpp=2))}, world_size=2)
    purposes = [purpose for purpose, _ in dict.fromkeys(list_groups(plan, ())) if purpose]
    assert purposes == ["llm+1", "llm+1~", "llm-1", "llm-1~"]


def test_every_field_asks_once_for_every_rank() -> None:
    plan = make_plan({"llm": ("0-7", Layout(tp=2, cp=2, pp=2))}, world_size=8)
    asked = list_groups(plan, ())[9:]  # without the world and the lone ranks
    assert sum(len(members) for purpose, members in asked if not purpose) == len(FIELDS) * 8


def test_the_number_of_groups_grows_with_the_ranks_not_with_their_square() -> None:
    def asked(dp: int) -> int:
        layout = Layout(tp=8, pp=4, dp=dp)
        return len(list_groups(make_plan({"llm": (f"0-{32 * dp - 1}", layout)}, world_size=32 * dp), ()))

    assert asked(16) < 2.1 * asked(8)


def test_modules_apart_share_no_group_in_which_ranks_meet() -> None:
    plan = make_plan({"vision": ("0-1", Layout(dp=2)), "llm": ("0-1", Layout(tp=2))}, world_size=2)
    together, apart = (set(list_groups(plan, (), names)) for names in ((), ("vision", "llm")))
    assert together == {("", (0, 1)), ("", (0,)), ("", (1,))}
    assert apart - together == {("@vision", (0, 1)), ("@llm", (0, 1))} and together < apart
