"""The tables of the overhead and of the recipe, from step times made up so that the answer is known."""

from pathlib import Path

from bench import overhead, recipe
from bench.candidates import ONE_PROCESS, OWN_MODEL
from bench.rounds import Measured

LOAD = [1.0, 3.0, 1.0, 1.2, 1.0]  # how much slower the machine was in each round


def measured(name: str, seconds: float) -> Measured:
    return Measured(name, step_seconds=[seconds * slow for slow in LOAD])


def test_overhead_is_the_median_of_paired_differences() -> None:
    group = [measured(OWN_MODEL, 1.0), measured("dsllm, ZeRO-0", 1.05), measured("dsllm, ZeRO-1", 1.1)]
    quick = measured("dsllm, ZeRO-1", 1.02)
    _, _, zero0, zero1, failed = overhead.table(ONE_PROCESS, [*group, Measured("dsllm, ZeRO-2", failure="it fell")])
    assert zero0 == "| dsllm, ZeRO-0 | +5.0 % | +5.0 to +5.0 % | 5 |"
    assert zero1 == "| dsllm, ZeRO-1 | +10.0 % | +10.0 to +10.0 %, **above** 3 % | 5 |"
    assert overhead.table(ONE_PROCESS, [group[0], quick])[-1].endswith("within 3 % | 5 |")
    assert failed == "| dsllm, ZeRO-2 | failed | | |"


def test_an_element_is_held_against_none_and_against_all_but_it(tmp_path: Path) -> None:
    seconds = {"none of it": 2.0, "all of it": 1.0, "only attention": 1.6, "all but attention": 1.2}
    group = [measured(c.name, seconds.get(c.name, 1.5)) for c in recipe.one_process(tmp_path)]
    rows = recipe.elements_table(group)
    attention = recipe.ELEMENTS["attention"]
    assert f"| {attention} | 1.250 | 1.250 to 1.250 | 1.200 | 1.200 to 1.200 |" in rows
    assert "| all together | 2.000 | 2.000 to 2.000 | | |" in rows
    assert all(row.count("|") == rows[0].count("|") for row in rows), "a cell too many or too few"


def test_ranks_are_compared_in_pairs(tmp_path: Path) -> None:
    group = [measured(c.name, 1.3 if "," in c.name else 1.0) for c in recipe.two_ranks(tmp_path)]
    rows = recipe.ranks_table(group)
    assert "| all-reduce, not reduce-scatter (ZeRO-1) | 1.300 | 1.300 to 1.300 |" in rows
    failed = [Measured(m.name, failure="it fell") if "scatter" in m.name else m for m in group]
    rows = recipe.ranks_table(failed)
    assert "| all-reduce, not reduce-scatter (ZeRO-2) | failed | |" in rows
    assert all(row.count("|") == rows[0].count("|") for row in rows)
