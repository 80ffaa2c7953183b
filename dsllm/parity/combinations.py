"""What can be combined: one training set-up, its DeepSpeed JSON, and the full product over the factors that matter most."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsllm.config.train import PRECISIONS, ActivationCheckpointing, Precision

STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 2, 4)
ACCUMULATIONS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One set-up. The first fields make the full product; the others are covered pairwise, and None leaves a key out."""

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
    grad_accum_dtype: str | None = None
    communication_data_type: str | None = None
    prescale_gradients: bool | None = None
    gradient_predivide_factor: float | None = None
    reduce_bucket_size: int | None = None
    allgather_bucket_size: int | None = None
    allgather_partitions: bool | None = None
    reduce_scatter: bool | None = None
    overlap_comm: bool | None = None
    contiguous_gradients: bool | None = None
    sub_group_size: int | None = None
    use_multi_rank_bucket_allreduce: bool | None = None
    ignore_unused_parameters: bool | None = None
    stage3_prefetch_bucket_size: int | None = None
    stage3_param_persistence_threshold: int | None = None
    stage3_model_persistence_threshold: int | None = None
    stage3_max_live_parameters: int | None = None
    stage3_max_reuse_distance: int | None = None
    zero_hpz_partition_size: int | None = None
    offload_optimizer: str | None = None
    offload_param: str | None = None

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.accumulation * self.world_size

    @property
    def name(self) -> str:
        """Its place in the full product, then what it sets besides."""
        return " ".join([self.place, *self.settings])

    @property
    def place(self) -> str:
        """The row's place in the full product."""
        clipping = "on" if self.clipping else "off"
        ranks = f"ranks={self.world_size} accumulation={self.accumulation} clipping={clipping}"
        return f"zero{self.stage} {self.precision} {ranks}"

    @property
    def settings(self) -> list[str]:
        """What it sets besides."""
        return [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in PRODUCT and getattr(self, field.name) != field.default
        ]

    def deepspeed_json(self) -> dict[str, Any]:
        """What a user would write as the DeepSpeed JSON."""
        given: dict[str, Any] = {key: value for key in TOP_LEVEL if (value := getattr(self, key)) is not None}
        if self.grad_accum_dtype is not None:
            given["data_types"] = {"grad_accum_dtype": self.grad_accum_dtype}
        zero = {key: value for key in ZERO if (value := getattr(self, key)) is not None}
        zero |= {key: {"device": device} for key in OFFLOAD if (device := getattr(self, key)) is not None}
        return given | {"zero_optimization": {"stage": self.stage, **zero}}


PRODUCT = ("stage", "precision", "accumulation", "clipping", "world_size")
TOP_LEVEL = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor")
OFFLOAD = ("offload_optimizer", "offload_param")
ZERO = (
    "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "reduce_scatter", "overlap_comm",
    "contiguous_gradients", "sub_group_size", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters",
    "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "zero_hpz_partition_size",
)  # fmt: skip
"""Keys of zero_optimization that are written as they are."""


def full_product() -> Iterator[Combination]:
    """Every combination of stage, precision, accumulation, clipping and world size that the config does not refuse.

    Buckets and thresholds are small enough that parameters are really cut, and spread over several of them.
    """
    for world_size, stage, precision, accumulation, clipping in itertools.product(
        WORLD_SIZES, STAGES, PRECISIONS, ACCUMULATIONS, (True, False)
    ):
        if precision == "fp16" and stage == 0:
            continue  # refused: DeepSpeed divides the gradients by a loss scale that it never applied
        small: dict[str, Any] = {"reduce_bucket_size": 3000, "allgather_bucket_size": 3000} if stage else {}
        if stage == 3:
            small |= {"stage3_param_persistence_threshold": 100, "sub_group_size": 6000}
        yield Combination(
            stage=stage,
            precision=precision,
            accumulation=accumulation,
            clipping=clipping,
            world_size=world_size,
            **small,
        )
