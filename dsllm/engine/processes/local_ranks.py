"""Runs a function on several real ranks of this machine: forked from a process that has all loaded, or one per GPU."""

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from dsllm.engine.processes.device import choose_device
from dsllm.engine.processes.process_group import World, process_group
from dsllm.engine.processes.ranks import Ranks
from dsllm.processes import end_with_parent, free_port

PRELOADED = (
    "dsllm.engine.processes.local_ranks",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it, and the compiler, with the first ZeRO engine
)
"""A clean process imports these once; each rank is a fork of it, made before any thread or process group exists. A rank
then starts in a tenth of a second, where a new process takes ten."""

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(list(PRELOADED))

LAST_WORDS_SECONDS = 2.0
"""How long the other ranks may still report when one has failed."""

END_SECONDS = 5.0
"""How long a rank may take to end by itself after its last value."""


MOST_CPU_RANKS = 64


def local_devices() -> tuple[str, int]:
    """The kind of device that ranks of this machine run on, and how many ranks it can hold: one per GPU."""
    num_gpus = torch.accelerator.device_count()
    return ("cuda", num_gpus) if num_gpus else ("cpu", MOST_CPU_RANKS)


class RankError(Exception):
    """A rank raised an error, died or gave no result in time; the message names it and contains its traceback."""


def run_on_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    device: str = "cpu",
    timeout_seconds: float = 120,
) -> list[Any]:
    """Call `function(world, *arguments)` on each of `world_size` ranks; returns their results in rank order.

    Args:
        function: defined at the top of a module, so that the ranks can import it.
        device: "cpu" (gloo) or "cuda" (nccl, one rank per GPU).
    Raises:
        RankError: a rank failed. No rank is left running.
    """
    (results,) = iterate_on_ranks(
        world_size, _once, function, *arguments, device=device, timeout_seconds=timeout_seconds
    )
    return results


def _once(world: World, function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    yield function(world, *arguments)


def iterate_on_ranks(
    world_size: int,
    function: Callable[..., Iterator[Any]],
    *arguments: Any,
    device: str = "cpu",
    timeout_seconds: float = 120,
) -> Iterator[list[Any]]:
    """As `run_on_ranks`, for a function that yields: each round of values as soon as all ranks have yielded one.

    Args:
        timeout_seconds: longest wait for one round.
    """
    context = forkserver if device == "cpu" else multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    port = free_port()
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            call = (_local(rank, world_size, port), device, sender, function, arguments)
            process = context.Process(target=_rank_main, args=call, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        yield from _rounds(pipes, timeout_seconds)
        for process in processes:
            process.join(END_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _local(rank: int, world_size: int, port: int) -> Ranks:
    return Ranks(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_size=world_size,
        launcher="dsllm",
        master_address="127.0.0.1",
        master_port=port,
    )


def _rounds(pipes: Sequence[Connection], timeout_seconds: float) -> Iterator[list[Any]]:
    """One value of every rank at a time, until all have ended."""
    while True:
        messages = _one_of_each(pipes, timeout_seconds)
        kinds = {kind for kind, _ in messages}
        if kinds == {"end"}:
            return
        assert kinds == {"value"}, "some ranks yielded more often than others"
        yield [value for _, value in messages]


def _one_of_each(pipes: Sequence[Connection], timeout_seconds: float) -> list[tuple[str, Any]]:
    """The next message of every rank, in rank order.

    One rank that fails takes the others with it: their words are waited for briefly, so that the cause is among them.
    """
    messages: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(messages) < len(pipes):
        silent = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in messages}
        ready = wait([pipes[rank] for rank in silent.values()], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = silent[id(pipe)]
            messages[rank] = _received(pipes[rank])
            if messages[rank][0] == "error":
                deadline = min(deadline, time.monotonic() + LAST_WORDS_SECONDS)
    errors = [f"rank {rank}: {text}" for rank, (kind, text) in sorted(messages.items()) if kind == "error"]
    if errors:
        raise RankError("\n".join(errors))
    if len(messages) < len(pipes):
        missing = ", ".join(str(rank) for rank in range(len(pipes)) if rank not in messages)
        raise RankError(f"rank {missing} gave no result within {timeout_seconds:g} s")
    return [messages[rank] for rank in range(len(pipes))]


def _received(pipe: Connection) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = pipe.recv()
    except EOFError:
        return "error", "died without a result"
    return message


def _rank_main(
    ranks: Ranks, device: str, sender: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which ends its ranks
    end_with_parent()  # a rank inside a collective would not notice that its parent is gone
    gc.freeze()  # as in device.set_up_process
    if device == "cpu":  # several ranks share the cores, and what runs this way is small
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    try:
        where = torch.device("cpu") if device == "cpu" else choose_device(ranks.local_rank)
        with process_group(ranks, where) as world:
            for value in function(world, *arguments):
                sender.send(("value", value))
        sender.send(("end", None))
    except BaseException:  # noqa: BLE001 - the parent must hear of everything, SystemExit included
        sender.send(("error", traceback.format_exc()))
    finally:
        sender.close()
