"""Places are named in few words, and the ranks that differ from the others are found."""

import pytest

from dsllm.doctor.findings import Place, above, advice_if, below, check, differing, error_if, one_per_host, where


def places(*hosts: str) -> list[Place]:
    """One rank after the other, on these hosts."""
    return [Place(rank=rank, local_rank=hosts[:rank].count(host), host=host) for rank, host in enumerate(hosts)]


def test_ranks_and_hosts_in_few_words():
    assert where(places("a")) == "rank 0 on a"
    assert where(places("a", "a", "b", "b")) == "ranks 0-3 on a, b"
    assert where(places(*"abcdefg")) == "ranks 0-6 on a, b, c, 4 more hosts"


def test_a_host_is_looked_at_once():
    a0, a1, b0, b1 = places("a", "a", "b", "b")
    assert one_per_host({b1: 4, a1: 2, b0: 3, a0: 1}) == {a0: 1, b0: 3}


def test_the_few_are_named_and_not_the_many():
    a, b, c, d = places("a", "b", "c", "d")
    assert list(differing({a: "1", b: "2", c: "2", d: "3"})) == [("1", [a], "2"), ("3", [d], "2")]
    assert not list(differing({a: "1", b: "1"})) and not list(differing({}))


@pytest.mark.parametrize("value, level", [(0.4, "error"), (0.5, "advice"), (0.9, "advice"), (1.0, None), (2.0, None)])
def test_thresholds_are_no_problem_themselves(value, level):
    assert below(value, error=0.5, advice=1.0) == level and above(-value, error=-0.5, advice=-1.0) == level
    assert below(value, advice=1.0) == (level and "advice")


def test_a_check_that_passes_finds_nothing():
    assert not list(check("clock", "a", None, "late", "set it")) and error_if(0) is advice_if("") is None
    (found,) = check("clock", "a", error_if(1), "late", "set it")
    assert str(found) == "error: clock, a: late; set it"
