"""What a new run starts from: the initial values, as a state that the engine loads like any other."""

from collections.abc import Mapping

from torch import Tensor

from dsllm.model.initial import initial_value
from dsllm.parameters import ParameterTable
from dsllm.slices import WEIGHTS, Region, StateReader


class InitialValues:
    """Every parameter's initial value, computed one parameter at a time when it is read."""

    def __init__(self, table: ParameterTable, seed: int):
        self.parameters = {parameter.name: parameter for parameter in table}
        self.seed = seed

    def read(self, name: str, key: str, region: Region) -> Tensor:
        """The fp32 values of a region of the parameter."""
        assert key == WEIGHTS, f"a new run has weights only, no {key}"
        return region.of(initial_value(self.parameters[name], self.seed))

    def keys(self, name: str) -> tuple[str, ...]:
        """Weights only: the optimizer is new."""
        return (WEIGHTS,)

    def scalars(self, name: str) -> Mapping[str, float]:
        """None."""
        return {}


class WeightsOnly:
    """The weights of another state without its optimizer state: the run that starts from them has a new optimizer."""

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
