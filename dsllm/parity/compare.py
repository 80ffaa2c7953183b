"""Compares the engine's training with the reference; the table, the tests and the planted faults all call it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsllm.parity.bounds import Bounds, bounds_for
from dsllm.parity.combinations import Combination
from dsllm.parity.engine_run import RankTrained
from dsllm.parity.reference import Reference, norm_of


@dataclass(frozen=True, kw_only=True)
class Row:
    """One combination's result: deviations and their bounds, or the error that stopped it."""

    combination: Combination
    loss: float
    """Largest relative deviation of a step's loss."""
    norm: float
    """Largest relative deviation of a step's gradient norm."""
    weights: float
    """||w - w_ref|| / ||w_ref - w_initial|| after the last step."""
    bounds: Bounds
    problem: str = ""
    """What else is wrong: ranks that differ, a step that was not applied, an error. Empty: no problem."""

    @property
    def ratio(self) -> float:
        """Largest deviation, as a share of its bound."""
        parts = ((self.loss, self.bounds.loss), (self.norm, self.bounds.norm), (self.weights, self.bounds.weights))
        return max(deviation / bound if deviation == deviation else math.inf for deviation, bound in parts)

    @property
    def passed(self) -> bool:
        """Whether all deviations are within their bounds and there is no problem."""
        return not self.problem and self.ratio <= 1

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "name": self.combination.name,
            "passed": self.passed,
            "problem": self.problem,
            "deviations": {"loss": self.loss, "norm": self.norm, "weights": self.weights},
            "bounds": asdict(self.bounds),
            "combination": self.combination.as_dict(),
        }


def compare(combination: Combination, reference: Reference, ranks: Sequence[RankTrained]) -> Row:
    """Compare what the ranks trained with what the plain loop trained on the same samples."""
    first = ranks[0]
    weights, missing = _assembled(reference, ranks)
    problems = [missing] if missing else []
    if any((r.losses, r.norms, r.applied) != (first.losses, first.norms, first.applied) for r in ranks):
        problems.append("the ranks report different losses or norms")
    if not all(first.applied):
        problems.append(f"step {first.applied.index(False)} was not applied")
    difference = {name: weights[name] - reference.weights[name] for name in weights}
    return Row(
        combination=combination,
        loss=_largest(first.losses, reference.losses),
        norm=_largest(first.norms, reference.norms),
        weights=norm_of(difference) / reference.way,
        bounds=bounds_for(combination, reference),
        problem="; ".join(problems),
    )


def failed(combination: Combination, reference: Reference, problem: str) -> Row:
    """The row of a combination that stopped with an error."""
    bounds = bounds_for(combination, reference)
    return Row(combination=combination, loss=math.nan, norm=math.nan, weights=math.nan, bounds=bounds, problem=problem)


def _largest(values: Sequence[float], wanted: Sequence[float]) -> float:
    deviations = [abs(value / want - 1) for value, want in zip(values, wanted, strict=True)]
    return math.nan if any(math.isnan(d) for d in deviations) else max(deviations)


def _assembled(reference: Reference, ranks: Sequence[RankTrained]) -> tuple[dict[str, np.ndarray], str]:
    """The whole weights, made of the pieces that the ranks own, and what is wrong with the pieces."""
    whole = {name: np.full_like(values, np.nan) for name, values in reference.weights.items()}
    written = {name: np.zeros(values.shape, dtype=int) for name, values in reference.weights.items()}
    for rank in ranks:
        for name, start, values in rank.pieces:
            whole[name][start : start + len(values)] = values
            written[name][start : start + len(values)] += 1
    wrong = [name for name, times in written.items() if np.any(times != 1)]
    return whole, f"the ranks' pieces do not make up {', '.join(wrong)}" if wrong else ""
