"""Runs a function on several real ranks, forked from one process that has torch and deepspeed loaded."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from dsllm.engine.ranks import Ranks

# a clean process imports these once; each rank is a fork of it, made before any thread or process group exists
PRELOADED = [
    "dsllm.cli.training",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it, and the compiler, with the first ZeRO engine
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED)


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120) -> Any:
    """Call `function(world, *arguments)` on each of `world_size` ranks over gloo; their results in rank order.

    The function must live at the top of a module, so that the ranks can import it. Raises what a rank raised, as text.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        ranks = Ranks(
            rank=rank,
            local_rank=rank,
            world_size=world_size,
            local_size=world_size,
            launcher="test",
            master_address="127.0.0.1",
            master_port=port,
        )
        process = context.Process(target=_rank_main, args=(ranks, sender, function, arguments), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_seconds)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"rank {rank} gave no result in time")
        try:
            good, value = pipe.recv()
        except EOFError:
            raise RuntimeError(f"rank {rank} died without a result") from None
        if not good:
            raise RuntimeError(f"rank {rank}:\n{value}")
        results.append(value)
    return results


def _rank_main(ranks: Ranks, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    from dsllm.engine.process_group import process_group

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        with process_group(ranks, torch.device("cpu")) as world:
            value = function(world, *arguments)
        sender.send((True, value))
    except BaseException:  # noqa: BLE001 - the parent must hear of everything, SystemExit included
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
