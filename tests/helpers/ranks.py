"""Runs a function on several real ranks, forked from one process that has torch and deepspeed loaded."""

from collections.abc import Callable
from typing import Any

from dsllm.engine.processes.local_ranks import PRELOADED, forkserver, run_on_ranks

context = forkserver
# what nearly every module of tests imports, and so every rank: a fifth of a second each, if it is not there already
context.set_forkserver_preload([*PRELOADED, "dsllm.session.open", "dsllm.train.loop", "pytest", "tests.helpers.tiny"])


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120) -> Any:
    """Call `function(world, *arguments)` on each of `world_size` ranks over gloo; their results in rank order.

    The function must live at the top of a module, so that the ranks can import it. Raises what a rank raised, as text.
    """
    return run_on_ranks(world_size, function, *arguments, timeout_seconds=timeout_seconds)
