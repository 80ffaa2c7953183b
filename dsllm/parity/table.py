"""Runs the parity table: for each world size, one job of ranks trains the combinations one after the other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsllm.engine.processes.local_ranks import RankError, iterate_on_ranks, local_devices
from dsllm.engine.processes.process_group import World
from dsllm.parity.combinations import Combination, full_product
from dsllm.parity.compare import Row, compare, failed
from dsllm.parity.engine_run import train_all_on_rank
from dsllm.parity.pairwise import pairwise_rows
from dsllm.parity.reference import Reference, train_reference

SECONDS_PER_ROW = 240.0
"""A row that takes longer hangs: the slowest row takes a few seconds, or a minute where a layer is compiled."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The combinations to run on this machine, and those that are left out."""

    combinations: tuple[Combination, ...]
    """By world size, the smallest first."""
    left_out: tuple[str, ...]
    """World sizes and settings that are not run, each with the reason."""
    device: str
    """"cpu" or "cuda"."""


def select_combinations(world_sizes: Sequence[int], quick: bool, only: str) -> Selection:
    """The requested combinations that this machine can run.

    Args:
        quick: the pairwise rows alone, without the full product.
        only: words that the name of a combination must have.
    """
    device, most = local_devices()
    chosen = [c for c in all_combinations(quick) if set(only.split()) <= set(c.name.split())]
    runs = sorted(
        (c for c in chosen if c.world_size in world_sizes and c.world_size <= most), key=lambda c: c.world_size
    )
    left_out = []
    for size in sorted({c.world_size for c in chosen} - {c.world_size for c in runs}):
        number = sum(c.world_size == size for c in chosen)
        reason = (
            "not requested" if size not in world_sizes else f"this machine has {most} GPUs, and each rank needs one"
        )
        left_out.append(f"{number} combinations on {size} ranks: {reason}")
    return Selection(combinations=tuple(runs), left_out=tuple(left_out), device=device)


def all_combinations(quick: bool = False) -> list[Combination]:
    """The full product and the pairwise rows; `quick`: the pairwise rows alone."""
    return list(dict.fromkeys([*([] if quick else full_product()), *pairwise_rows()]))


def run_table(combinations: Sequence[Combination], device: str, seed: int) -> Iterator[Row]:
    """Each combination's row as soon as it is known, the smallest world size first."""
    references = References(device, seed)
    for world_size in sorted({c.world_size for c in combinations}):
        left = [c for c in combinations if c.world_size == world_size]
        references.prepare(left)
        while left:  # a combination that fails takes its ranks with it: the next one starts new ones
            done = 0
            for row in _until_failure(left, references):
                yield row
                done += 1
            left = left[done:]


def _until_failure(combinations: Sequence[Combination], references: "References") -> Iterator[Row]:
    """One job of ranks: the rows up to the first combination that fails; its own row is the last."""
    rounds = iterate_on_ranks(
        combinations[0].world_size,
        train_all_on_rank,
        combinations,
        references.seed,
        device=references.device,
        timeout_seconds=SECONDS_PER_ROW,
    )
    waiting = iter(combinations)
    try:
        for ranks in rounds:
            combination = next(waiting)
            yield compare(combination, references[combination], ranks)
    except RankError as error:
        combination = next(waiting)
        yield failed(combination, references[combination], str(error))


class References:
    """The plain PyTorch runs that a table needs. Each is made once, in another process."""

    def __init__(self, device: str, seed: int):
        self.device, self.seed = device, seed
        self.known: dict[Combination, Reference] = {}

    def __getitem__(self, combination: Combination) -> Reference:
        return self.known[what_reference_sees(combination)]

    def prepare(self, combinations: Iterable[Combination]) -> None:
        """Train the references that are missing."""
        seen = dict.fromkeys(what_reference_sees(c) for c in combinations)
        missing = [c for c in seen if c not in self.known]
        if not missing:
            return
        rounds = iterate_on_ranks(
            1, _train_references, missing, self.seed, device=self.device, timeout_seconds=SECONDS_PER_ROW
        )
        for combination, (reference,) in zip(missing, rounds, strict=True):
            self.known[combination] = reference


def what_reference_sees(combination: Combination) -> Combination:
    """The part of a combination that plain PyTorch sees: combinations that share it share a reference."""
    return Combination(
        precision=combination.precision,
        accumulation=combination.accumulation,
        clipping=combination.clipping,
        world_size=combination.world_size,
        tied=combination.tied,
        masked=combination.masked,
    )


def _train_references(world: World, combinations: Sequence[Combination], seed: int) -> Iterator[Reference]:
    for combination in combinations:
        yield train_reference(combination, seed, world.device)
