"""A value or an error of one rank reaches all of them."""

import pytest

from dsllm.engine.processes.process_group import World
from dsllm.errors import CheckpointError, ConfigError, DataError, DsllmError, RunError
from dsllm.session.agreement import on_every_rank, on_rank_0
from tests.helpers.ranks import run_ranks


def fail(error: Exception) -> None:
    raise error


def first_rank_acts(world: World) -> tuple[object, list[tuple[type, str]]]:
    """A value of rank 0, and what three failures of rank 0 become."""
    done: list[int] = []
    value = on_rank_0(world, lambda: (done.append(world.rank), {"rank": world.rank})[1])
    assert done == ([0] if world.rank == 0 else [])
    found: list[tuple[type, str]] = []
    for error, doing in (
        (RunError("a"), ""),
        (ConfigError(["a", "b"]), "it failed"),
        (OSError(28, "disk full"), "saving"),
    ):
        with pytest.raises(DsllmError) as caught:
            on_rank_0(world, lambda e=error: fail(e), doing)
        found.append((type(caught.value), str(caught.value)))
    return value, found


def test_rank_0_acts_for_all():
    one, two = run_ranks(2, first_rank_acts)
    assert one == two
    assert one == (
        {"rank": 0},
        [
            (RunError, "a"),
            (ConfigError, "it failed: 2 problems:\n- a\n- b"),
            (CheckpointError, "saving: [Errno 28] disk full"),
        ],
    )


def some_ranks_refuse(world: World, refusing: dict[int, str]) -> str:
    """What is raised where these ranks refuse; the ranks can still talk to each other afterwards."""
    text = ""
    try:
        on_every_rank(world, lambda: fail(DataError(refusing[world.rank])) if world.rank in refusing else None)
    except DataError as error:
        text = str(error)
    world.barrier()
    return text


@pytest.mark.parametrize(
    ("refusing", "expected"), [({}, ""), ({1: "b"}, "b"), ({0: "a", 1: "b"}, "a\nb"), ({0: "a", 1: "a"}, "a")]
)
def test_if_one_rank_refuses_all_do(refusing, expected):
    assert run_ranks(2, some_ranks_refuse, refusing) == [expected, expected]
