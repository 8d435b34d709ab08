"""Random module graphs, such as plans have, for each schedule."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from megatron_mosaic.schedules.stage_graph import StageGraph


@st.composite
def graphs(draw: st.DrawFn, schedule: str = "nested") -> StageGraph:
    """1-3 encoders (the first may feed the second, and a generator), 0-2 generators (in a chain or not), a module that
    feeds a generator alone; any stages, units and chunks that the schedule takes; some of them frozen; all of them on
    the same ranks, apart, or some of each."""
    encoders = [f"encoder{i}" for i in range(draw(st.integers(1, 3)))]
    generators = [f"generator{i}" for i in range(draw(st.integers(0, 2)))]
    aside = ["aside"] if generators and draw(st.booleans()) else []
    modules = [*encoders, *aside, "llm", *generators]
    edges = [(encoder, "llm") for encoder in encoders] + [("llm", generator) for generator in generators]
    if len(encoders) > 1 and draw(st.booleans()):
        edges.append(("encoder0", "encoder1"))
        if draw(st.booleans()):
            edges.remove(("encoder0", "llm"))
    if generators and draw(st.booleans()):
        edges.append(("encoder0", "generator0"))
    if len(generators) > 1 and draw(st.booleans()):
        edges.append(("generator0", "generator1"))
    edges += [("aside", "generator0")] if aside else []
    trained: set[str] = set()
    for module in modules:
        behind = any(target == module and source in trained for source, target in edges)
        if behind or draw(st.sampled_from([True, True, False])):
            trained.add(module)
    stages = {module: draw(st.sampled_from([1, 1, 2])) for module in modules} | {"llm": draw(st.integers(1, 4))}
    if schedule == "interleaved":
        stages["llm"] = max(2, stages["llm"])
    chunked = {"llm"} if stages["llm"] > 1 and (schedule == "interleaved" or draw(st.booleans())) else set()
    chunked |= {module for module in modules if module != "llm" and draw(st.sampled_from([True, False, False]))}
    if schedule == "1f1b":
        chunked = set()
    others = [module for module in modules if module != "llm"]
    units = {module: draw(st.integers(1, 5)) for module in modules}
    if schedule in ("1f1b", "interleaved"):  # a consumer's unit is never longer than its producer's
        units = {module: min(units[module], units["encoder0"]) if module in encoders else 1 for module in modules}
    num_ranks = math.lcm(2, stages["llm"])
    occupies = {
        f"{module}.{stage}": frozenset(range(num_ranks * stage // count, num_ranks * (stage + 1) // count))
        for module, count in stages.items()
        if module == "llm" or draw(st.sampled_from([True, True, False]))
        for stage in range(count)
    }
    return StageGraph(
        num_stages=stages,
        edges=tuple(edges),
        units=units | {"llm": 1},
        num_microbatches=draw(st.integers(1, 16)),
        has_backward=frozenset(trained),
        backbone="llm",
        num_chunks=dict.fromkeys(chunked, 2),
        occupies=occupies,
        tracks={module: track for track, module in enumerate(others, start=1) if draw(st.booleans())},
    )
