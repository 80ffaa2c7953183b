"""Kills at chosen moments lose nothing; and the campaign sees what is untrue."""

import dataclasses

import pytest

from bench.crash_campaign import KINDS, Kill, Outcome, campaign, kill_of, untrue

KILL = kill_of(2, 1)


def test_a_kill_is_the_same_for_the_same_seed_and_all_kinds_come():
    kills = [kill_of(number, 5) for number in range(60)]
    assert kills == [kill_of(number, 5) for number in range(60)] != [kill_of(number, 6) for number in range(60)]
    assert {kill.kind for kill in kills} == set(KINDS)
    assert {(kill.stage, kill.num_ranks) for kill in kills} == {(stage, size) for stage in range(4) for size in (1, 2)}


def outcome(codes: list[int], state: str, victims: tuple[int, ...], signal: str = "SIGKILL") -> Outcome:
    kill: Kill = dataclasses.replace(KILL, victims=victims, signal=signal, num_ranks=len(codes))
    return Outcome(kill, hit=True, codes=codes, state=state)


@pytest.mark.parametrize(
    ("codes", "state", "victims", "signal", "true"),
    [
        ([-9, 1], "running", (0,), "SIGKILL", True),  # nobody was left to write
        ([1, -9], "failed", (1,), "SIGKILL", True),
        ([1, -9], "running", (1,), "SIGKILL", False),
        ([0, 0], "finished", (0,), "SIGTERM", True),
        ([1, 0], "finished", (0,), "SIGTERM", False),
        ([75, 75], "interrupted", (1,), "SIGTERM", True),
        ([75, 75], "", (1,), "SIGTERM", True),  # before the directory was held
        ([75, 75], "running", (1,), "SIGTERM", False),
        ([1, 75], "interrupted", (1,), "SIGTERM", False),
        ([1, 1], "failed", (0,), "SIGSTOP", True),
    ],
)
def test_what_is_untrue_is_seen(codes, state, victims, signal, true):
    assert bool(untrue(outcome(codes, state, victims, signal), "")) is not true


def test_a_traceback_is_untrue():
    assert untrue(outcome([0], "finished", (0,), "SIGTERM"), "Traceback (most recent call last)")


@pytest.mark.slow
def test_ten_kills_lose_nothing(tmp_path):
    rows = list(campaign(tmp_path, 10, seed=3))
    assert [row["kill"]["number"] for row in rows] == list(range(10))
    assert [row["problems"] for row in rows] == [[]] * 10
    assert sum(row["hit"] for row in rows) >= 7
