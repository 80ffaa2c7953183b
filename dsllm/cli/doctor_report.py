"""The result of dsllm doctor: as tables and findings on the terminal, and as plain values for JSON."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsllm.byte_units import GIB
from dsllm.doctor.findings import Finding, one_per_host
from dsllm.doctor.local_checks import LocalFacts
from dsllm.doctor.machine import UNLIMITED, Machine
from dsllm.engine.processes.cores import as_list

if TYPE_CHECKING:  # brings torch
    from dsllm.doctor.collective_checks import Examination, RankFacts

MOST_HOSTS = 16
"""Hosts shown in tables; JSON has all."""
STYLES = {"error": "bold red", "advice": "yellow"}


def show(seen: "Examination", console: Console) -> None:
    """Print the measurements as tables, then the findings and a summary in one line."""
    ranks, hosts = len(seen.ranks), seen.num_hosts
    console.print(
        f"dsllm doctor: {ranks} {_plural(ranks, 'rank')} on {hosts} {_plural(hosts, 'host')}, {seen.device}, "
        f"started by {seen.launcher}",
        highlight=False,
    )
    first = seen.ranks[min(seen.ranks)].local
    versions = ", ".join(f"{name} {text}" for name, text in first.versions.versions.items())
    console.print(f"rank 0 has {versions}", highlight=False)
    for name, text in first.versions.environment.items():
        console.print(f"           {name}={text}", highlight=False, markup=False)
    for table in (_hosts(seen), _ranks(seen), _folders(seen), _collectives(seen), _operators(seen)):
        if table.row_count:
            console.print(table)
    show_findings(seen.findings, console)
    console.print(f"{conclusion(seen.findings)} ({seen.seconds:.0f} s)", highlight=False)


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """Print each finding, and what to do about it."""
    for finding in findings:
        console.print(
            f"\n{finding.level}: {finding.check}, {finding.where}", style=STYLES[finding.level], highlight=False
        )
        console.print(f"  {finding.problem}\n  -> {finding.action}", highlight=False, markup=False)
    if findings:
        console.print()


def conclusion(findings: Sequence[Finding]) -> str:
    """The findings summed up in one line."""
    errors = sum(finding.level == "error" for finding in findings)
    advice = len(findings) - errors
    if not errors:
        return "nothing is wrong" + (f"; {advice} {_plural(advice, 'piece')} of advice" if advice else "")
    rest = f", {advice} {_plural(advice, 'piece')} of advice" if advice else ""
    return f"{errors} {_plural(errors, 'error')} to fix{rest}"


def _plural(number: int, word: str) -> str:
    return word if number == 1 else f"{word}s"


def _table(*head: str) -> Table:
    return Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)


def _hosts(seen: "Examination") -> Table:
    table = _table(
        "host", "ranks", "cores", "threads", "NUMA", "memory free", "open files", "/dev/shm", "gloo", "NCCL", "GPUs"
    )
    for place, own in list(one_per_host(seen.ranks).items())[:MOST_HOSTS]:
        here = {p: s for p, s in seen.ranks.items() if p.host == place.host}
        machine, network = own.local.machine, own.local.network
        table.add_row(
            place.host,
            as_list(tuple(p.rank for p in here)),
            _cores([s.local.machine for s in here.values()]),
            _threads([s.local.machine.threads for s in here.values()]),
            as_list(machine.numa_nodes),
            f"{machine.memory_available / GIB:.1f} of {(machine.memory_limit or machine.memory_total) / GIB:.1f} GiB",
            _limit(machine.open_files),
            f"{machine.shm_free / GIB:.1f} GiB",
            network.gloo,
            ", ".join(network.infiniband or network.nccl),
            _gpus(list(here.values())),
        )
    return _with_caption(table, seen.num_hosts, "hosts")


def _cores(machines: Sequence[Machine]) -> str:
    """Cores that the ranks of a host may use, and whether each rank is bound to its own."""
    sets = [set(machine.cores) for machine in machines]
    everything = set().union(*sets)
    bound = len(sets) > 1 and sum(map(len, sets)) == len(everything)
    quota = machines[0].quota_cores
    return f"{len(everything)}{' bound' if bound else ''}{f', {quota:g} allowed' if quota else ''}"


def _threads(numbers_of_threads: Sequence[int]) -> str:
    """Threads of each rank; one number where all ranks have the same."""
    alike = len(set(numbers_of_threads)) == 1
    return f"{numbers_of_threads[0]} each" if alike else " + ".join(map(str, numbers_of_threads))


def _limit(value: int) -> str:
    return "no limit" if value >= UNLIMITED else str(value)


def _gpus(seen: "Sequence[RankFacts]") -> str:
    names = [own.gpu.name for own in seen if own.gpu]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"


def _ranks(seen: "Examination") -> Table:
    """Speed and clock of each rank; of many ranks, the slowest and the fastest."""
    table = _table("rank", "host", f"matrix products, {seen.dtype}", "of the median", "clock")
    median = statistics.median_high(seen.gemm.values())
    clocks = dict(zip(seen.ranks, seen.clocks.seconds, strict=True))
    order = sorted(seen.gemm) if len(seen.gemm) <= MOST_HOSTS else sorted(seen.gemm, key=lambda place: seen.gemm[place])
    shown = order if len(order) <= MOST_HOSTS else [*order[:8], *order[-4:]]
    for place in shown:
        rate = seen.gemm[place]
        clock = "" if place.rank == 0 else f"{1e3 * clocks[place]:+.1f} ms"
        table.add_row(str(place.rank), place.host, f"{rate / 1e9:,.0f} GFLOP/s", f"{rate / median:.0%}", clock)
    return _with_caption(table, len(order), "ranks")


def _with_caption(table: Table, number: int, what: str) -> Table:
    """The table; its caption says where rows were left out."""
    if number > table.row_count:
        table.caption = f"{table.row_count} of {number} {what}; --json has all"
    return table


def _folders(seen: "Examination") -> Table:
    table = _table("folder", "path", "host", "free", "write", "read", "")
    for place, folders in list(seen.folders.items())[:MOST_HOSTS]:
        for own in folders:
            above = "" if own.exists else f"not there yet; tried in {own.tested}"
            table.add_row(
                own.folder.role, own.folder.path, place.host, f"{own.free / GIB:,.1f} GiB",
                _speed(own.write), _speed(own.read), own.problem or above,
            )  # fmt: skip
    return _with_caption(table, sum(map(len, seen.folders.values())), "folders")


def _speed(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s" if bytes_per_second else "-"


def _collectives(seen: "Examination") -> Table:
    table = _table("collective", "size", "time", "on each rank's wire", "repeats")
    for own in seen.collectives:
        table.add_row(
            own.operation, _size(own.num_bytes), _time(own.seconds),
            f"{own.bus_bytes_per_second / 1e9:.3f} GB/s", str(own.repeats),
        )  # fmt: skip
    return table


def _size(num_bytes: int) -> str:
    for unit, name in ((2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:g} {name}"
    return f"{num_bytes} B"


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:,.2f} ms"


def _operators(seen: "Examination") -> Table:
    table = _table("DeepSpeed operator", "for", "state on rank 0's host")
    for name, operator in seen.ranks[min(seen.ranks)].operators.operators.items():
        missing = ", ".join(operator.missing_tools)
        to_build = f"cannot be built: no {missing}" if missing else "would be built at first use"
        table.add_row(name, operator.purpose, "built" if operator.ready else to_build)
    return table


def as_json(seen: "Examination") -> dict[str, Any]:
    """The whole result as plain values."""
    clocks = dict(zip(seen.ranks, seen.clocks.seconds, strict=True))
    return {
        **_head(seen.findings),
        "launcher": seen.launcher,
        "device": seen.device,
        "seconds": seen.seconds,
        "ranks": [
            {
                **_plain(own.local),
                "operators": _plain(own.operators),
                "gpu": _plain(own.gpu) if own.gpu else None,
                "gemm_flops": seen.gemm[place],
                "clock_offset_seconds": clocks[place],
            }
            for place, own in seen.ranks.items()
        ],
        "gemm_dtype": seen.dtype,
        "clock_uncertainty_seconds": seen.clocks.uncertainty,
        "folders": [{"host": place.host, **_plain(own)} for place, folders in seen.folders.items() for own in folders],
        "collectives": [_plain(own) for own in seen.collectives],
    }


def local_as_json(facts: LocalFacts, findings: Sequence[Finding]) -> dict[str, Any]:
    """The result of one rank that could not reach the others, as plain values."""
    return {**_head(findings), "ranks": [_plain(facts)]}


def _head(findings: Sequence[Finding]) -> dict[str, Any]:
    passed = not any(finding.level == "error" for finding in findings)
    return {"passed": passed, "findings": [_plain(finding) for finding in findings]}


def _plain(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)
