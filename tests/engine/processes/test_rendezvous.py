"""The ranks meet, or say who is missing, twice there, or told another world size."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import psutil
import pytest

from dsllm.engine.processes.process_group import World
from dsllm.engine.processes.ranks import Ranks
from dsllm.engine.processes.rendezvous import meet
from dsllm.errors import Interrupted, LaunchError
from dsllm.mesh import Mesh
from dsllm.processes import free_port
from tests.helpers.ranks import context, run_ranks


def ranks_of(world_size: int, port: int) -> list[Ranks]:
    common = {"world_size": world_size, "local_size": world_size, "launcher": "test"}
    return [
        Ranks(rank=r, local_rank=r, master_address="127.0.0.1", master_port=port, **common) for r in range(world_size)
    ]


def try_to_meet(ranks: Ranks, seconds: float, answers, gpu: str | None = None) -> None:
    os.environ |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "MASTER_ADDR": ranks.master_address,
        "MASTER_PORT": str(ranks.master_port),
    }
    began, text, store = time.monotonic(), "met", None
    try:
        store = meet(ranks, Mesh(data=ranks.world_size), timedelta(seconds=seconds), gpu)
    except LaunchError as error:
        text = str(error)
    answers.put((text, time.monotonic() - began))
    time.sleep(1.0 if store is not None and ranks.rank == 0 else 0.0)  # the others still look at its store


def outcomes(processes: list[Ranks], seconds: float, gpus: Sequence[str | None] = ()) -> list[tuple[str, float]]:
    """What each process heard, and after how long."""
    answers = context.Queue()
    gpus = gpus or [None] * len(processes)
    running = [
        context.Process(target=try_to_meet, args=(ranks, seconds, answers, gpu))
        for ranks, gpu in zip(processes, gpus, strict=True)
    ]
    for process in running:
        process.start()
    heard = [answers.get(timeout=60) for _ in running]
    for process in running:
        process.join(20)
    return heard


@pytest.mark.slow
def test_all_meet():
    assert [text for text, _ in outcomes(ranks_of(3, free_port()), 20)] == ["met"] * 3


@pytest.mark.slow
def test_two_processes_with_one_number():
    first, second = ranks_of(2, free_port())
    texts = sorted(text for text, _ in outcomes([first, second, second], 20))
    assert texts[0] == "met" and texts[1] == "met"
    assert "rank 1 of 2 joined twice" in texts[2] and texts[2].count("process ") >= 2


@pytest.mark.slow
def test_two_ranks_with_one_gpu():
    """CUDA_VISIBLE_DEVICES=0 for two ranks; with GPUs of their own the same ranks meet."""
    ranks = ranks_of(2, free_port())
    texts = [text for text, _ in outcomes(ranks, 20, ["GPU-1", "GPU-1"])]
    assert any("has the GPU GPU-1, which rank" in text and "at most one rank per GPU" in text for text in texts), texts
    assert [text for text, _ in outcomes(ranks_of(2, free_port()), 20, ["GPU-1", "GPU-2"])] == ["met"] * 2


@pytest.mark.slow
def test_two_processes_with_rank_0():
    (first, _), heard = ranks_of(2, free_port()), []
    heard = [text for text, _ in outcomes([first, first], 3)]
    assert any("is the port taken, by another job or by a second process with rank 0" in text for text in heard)


@pytest.mark.slow
def test_different_world_sizes():
    first, second = ranks_of(2, free_port())
    heard = [text for text, _ in outcomes([replace(first, world_size=3), second], 4)]
    assert any("world size of" in text and "need the same one" in text for text in heard)


@pytest.mark.slow
def test_a_missing_rank_is_named_in_time():
    ((text, seconds),) = outcomes(ranks_of(2, free_port())[:1], 2)
    assert "of 2 ranks 1 did not join within 2 s" in text and seconds < 10


@pytest.mark.slow
def test_an_unreachable_master():
    """Nobody listens at the address, and a name that nobody knows is said at once."""
    _, second = ranks_of(2, free_port())
    unknown = replace(second, master_address="no-such-host.invalid")
    heard = sorted(outcomes([second, unknown], 2))
    assert "cannot look up the master's address no-such-host.invalid" in heard[0][0]
    assert "is rank 0 running, and is the port open between the hosts?" in heard[1][0]
    assert max(seconds for _, seconds in heard) < 15


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def listening(world: World) -> list[str]:
    """Addresses at which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return sorted({c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN})


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_ranks_of_one_machine_listen_on_the_loopback_alone(world_size):
    found = run_ranks(world_size, listening)
    assert set(found[0]) <= {"127.0.0.1"} and found[0], "rank 0 has the store"
    assert {address for addresses in found for address in addresses} <= {"127.0.0.1"}


@pytest.mark.slow
def test_a_port_that_dsllm_chose_and_another_process_took_is_chosen_again():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        (ranks,) = ranks_of(1, other.getsockname()[1])
        assert [text for text, _ in outcomes([replace(ranks, launcher="python")], 5)] == ["met"]
        ((text, _),) = outcomes([replace(ranks, launcher="environment")], 5)
        assert "is the port taken, by another job" in text and "Set another MASTER_PORT" in text


def stop_while_meeting(ranks: Ranks, reason: str, answers) -> None:
    began = time.monotonic()
    try:
        meet(ranks, Mesh(data=ranks.world_size), timedelta(seconds=60), why_stop=lambda: reason)
    except Interrupted as error:
        answers.put((ranks.rank, str(error), time.monotonic() - began))


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_asked_to_stop_while_the_ranks_meet_takes_the_others_with_it(stopped):
    answers = context.Queue()
    for ranks in ranks_of(3, free_port()):
        reason = "SIGTERM" if ranks.rank == stopped else ""
        context.Process(target=stop_while_meeting, args=(ranks, reason, answers)).start()
    found = sorted(answers.get(timeout=50) for _ in range(3))
    expected = ["SIGTERM" if rank == stopped else "another rank was asked to stop" for rank in range(3)]
    assert [text for _, text, _ in found] == expected
