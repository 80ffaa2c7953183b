"""What can be combined: one training set-up, its DeepSpeed JSON, and the full product over the factors that matter most."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsllm.config.train import PRECISIONS, ActivationCheckpointing, Precision
from dsllm.engine.settings.key import Covered, Key, nested
from dsllm.engine.settings.table import STAGE, TABLE

STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 2, 4)
ACCUMULATIONS = (1, 3)

DEEPSPEED_SETTINGS: dict[str, tuple[Key, Covered]] = {
    key.parity.name or key.name: (key, key.parity) for key in TABLE.values() if isinstance(key.parity, Covered)
}
"""Every key of the DeepSpeed JSON that a row can set, by the name it has in a row, in the table's order."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One set-up. The first five fields make the full product; the others are covered pairwise."""

    stage: int = 0
    precision: Precision = "fp32"
    accumulation: int = 1
    """Micro-batches per rank and step."""
    clipping: bool = True
    world_size: int = 1
    tied: bool = False
    """The embedding is the head as well."""
    masked: bool = False
    """Some tokens do not count, and not equally many on each rank."""
    loss_scale: str = "static"
    """fp16 only: static, or dynamic with a scale that grows during the run."""
    activation_checkpointing: ActivationCheckpointing = "none"
    deepspeed: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What the DeepSpeed JSON sets next to the stage, by the names of DEEPSPEED_SETTINGS; all other keys are absent."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.deepspeed if name not in DEEPSPEED_SETTINGS]
        assert not unknown, f"not settings of the DeepSpeed JSON that a row can have: {', '.join(unknown)}"

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.accumulation * self.world_size

    @property
    def name(self) -> str:
        """Its place in the full product, then its other settings."""
        return " ".join([self.place, *self.settings])

    @property
    def place(self) -> str:
        """The row's place in the full product."""
        clipping = "on" if self.clipping else "off"
        ranks = f"ranks={self.world_size} accumulation={self.accumulation} clipping={clipping}"
        return f"zero{self.stage} {self.precision} {ranks}"

    @property
    def settings(self) -> list[str]:
        """Its other settings, as NAME=VALUE."""
        own = [f for f in dataclasses.fields(self) if f.name not in (*PRODUCT, "deepspeed")]
        differing = {f.name: getattr(self, f.name) for f in own if getattr(self, f.name) != f.default}
        of_json = {name: self.deepspeed[name] for name in DEEPSPEED_SETTINGS if name in self.deepspeed}
        return [f"{name}={value}" for name, value in (differing | of_json).items()]

    def deepspeed_json(self) -> dict[str, Any]:
        """What a user would write as the DeepSpeed JSON."""
        paths = {DEEPSPEED_SETTINGS[name][0].path: value for name, value in self.deepspeed.items()}
        return nested({STAGE: self.stage} | paths)

    def as_dict(self) -> dict[str, Any]:
        """Every setting by name, for --json; None where a key of the DeepSpeed JSON is absent."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "deepspeed"}
        return own | {name: self.deepspeed.get(name) for name in DEEPSPEED_SETTINGS}


PRODUCT = ("stage", "precision", "accumulation", "clipping", "world_size")


def full_product() -> Iterator[Combination]:
    """Every combination of stage, precision, accumulation, clipping and world size that the config does not refuse.

    Buckets and thresholds are so small that parameters are cut and spread over several of them.
    """
    for world_size, stage, precision, accumulation, clipping in itertools.product(
        WORLD_SIZES, STAGES, PRECISIONS, ACCUMULATIONS, (True, False)
    ):
        if precision == "fp16" and stage == 0:
            continue  # refused: DeepSpeed divides the gradients by a loss scale that it never applied
        small = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000} if stage else {}
        if stage == 3:
            small |= {"stage3_param_persistence_threshold": 100, "sub_group_size": 6000}
        yield Combination(
            stage=stage,
            precision=precision,
            accumulation=accumulation,
            clipping=clipping,
            world_size=world_size,
            deepspeed=small,
        )
