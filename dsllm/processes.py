"""What processes of this machine need without torch: a free port, the cores they may use, an end with their parent."""

import contextlib
import multiprocessing
import os
import random
import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path


def free_port() -> int:
    """A TCP port that is free on every interface of this machine, for now: another process may take it before you do."""
    # at random, because other jobs of this machine look for one too; below 32768, from where Linux gives ports to outgoing
    # connections: such a connection could take the port at any moment
    for port in (*random.SystemRandom().sample(range(10_000, 32_768), 100), 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError("this machine has no free TCP port")


def end_with_parent() -> None:
    """End this process as soon as its parent is gone, instead of waiting for it forever.

    For child processes of multiprocessing; starts a thread and returns.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a child process has a parent to watch"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)  # not sys.exit: the main thread may be inside a call that never returns

    threading.Thread(target=watch, daemon=True).start()


def own_cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def num_cores(root: Path = Path("/")) -> int:
    """How many cores this process can keep busy: those it may run on, or fewer where a control group limits CPU time."""
    quota = cpu_quota(root)
    return len(own_cores()) if quota is None else max(1, min(len(own_cores()), int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU seconds per second that the control groups of this process allow, the tightest limit; None: no limit.

    Args:
        root: where /proc and /sys are.
    """
    quotas = [_quota_v2(folder) or _quota_v1(folder) for folder in _control_groups(root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that limit this process's CPU time: its own and all above it, versions 2 and 1."""
    version_2, version_1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/cpu"
    yield from (version_2, version_1)
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top, own = version_1 if controllers else version_2, Path(path.lstrip("/"))
        yield from (
            top / group for group in (own, *own.parents)
        )  # not there in a container that sees only its own part


def _quota_v2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period = int((group / "cpu.cfs_period_us").read_text(encoding="utf-8"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None
