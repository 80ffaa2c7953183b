"""What a new run starts from: the initial values, as a state that the engine loads like any other."""

from collections.abc import Mapping

from torch import Tensor

from dsllm.config.model import ModelConfig
from dsllm.model.initial import initial_value
from dsllm.slices import WEIGHTS, Region, StateReader


class InitialValues:
    """Every parameter's initial value, made one parameter at a time when asked for."""

    def __init__(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], seed: int):
        self.config, self.shapes, self.seed = config, shapes, seed

    def read(self, name: str, key: str, region: Region) -> Tensor:
        """The fp32 values of a region of the parameter."""
        assert key == WEIGHTS, "a new run has no moments"
        return region.of(initial_value(name, self.shapes[name], self.config, self.seed))

    def keys(self, name: str) -> tuple[str, ...]:
        """Weights only: the optimizer starts anew."""
        return (WEIGHTS,)

    def scalars(self, name: str) -> Mapping[str, float]:
        """None."""
        return {}


class WeightsOnly:
    """The weights of another state, without its moments: a run that starts from them starts its optimizer anew."""

    def __init__(self, inner: StateReader):
        self.inner = inner

    def read(self, name: str, key: str, region: Region) -> Tensor:
        """The fp32 values of a region of the parameter."""
        return self.inner.read(name, key, region)

    def keys(self, name: str) -> tuple[str, ...]:
        """Weights only."""
        return (WEIGHTS,)

    def scalars(self, name: str) -> Mapping[str, float]:
        """None."""
        return {}
