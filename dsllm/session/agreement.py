"""Makes all ranks agree on a value or an error: hosts may see different files, and a rank that fails alone hangs the others."""

from collections.abc import Callable
from typing import TypeVar, cast

from dsllm.engine.processes.process_group import World
from dsllm.errors import CheckpointError, DsllmError, Interrupted

T = TypeVar("T")


def on_rank_0(world: World, action: Callable[[], T], doing: str = "") -> T:
    """Call `action` on rank 0 and return its value on every rank; if it fails, raise on every rank. A collective call.

    Args:
        action: what it returns is sent to the other ranks
        doing: what failed, to begin the message with; empty (default): the message stands alone

    Raises:
        DsllmError: what the action raised; an OSError becomes a CheckpointError.
    """
    value: T | None = None
    failure: DsllmError | None = None
    if world.rank == 0:
        try:
            value = action()
        except (DsllmError, OSError) as error:
            kind = type(error) if isinstance(error, DsllmError) else CheckpointError
            failure = kind(f"{doing}: {error}" if doing else str(error))
    value, failure = world.send_from_rank_0((value, failure))
    if failure is not None:
        raise failure
    return cast(T, value)


def on_every_rank(world: World, check: Callable[[], None]) -> None:
    """Call `check` on every rank; if it raises on one, raise on all. A collective call.

    Raises:
        DsllmError: of the first rank that refused, with the messages of all.
    """
    failure: DsllmError | None = None
    try:
        check()
    except DsllmError as error:
        failure = error
    failures = [f for f in world.gather(failure) if f is not None]
    if failures:
        raise type(failures[0])("\n".join(dict.fromkeys(str(f) for f in failures)))


def stop_together(world: World, why: Callable[[], str]) -> None:
    """Leave on all ranks if one was asked to stop; a collective call, for the time before the first step.

    Args:
        why: this rank's reason to stop; empty: it has none

    Raises:
        Interrupted: a rank has a reason.
    """
    reasons = world.gather(why())
    if any(reasons):
        raise Interrupted(reasons[world.rank] or "another rank was asked to stop")
