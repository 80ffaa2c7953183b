"""Initial values of the parameters: functions of (seed, name) alone, so that every layout starts from the same model."""

import hashlib

import torch
from torch import Tensor

from dsllm.model.table import check_table
from dsllm.parameters import Normal, Parameter, ParameterTable


def initial_value(parameter: Parameter, seed: int) -> Tensor:
    """The initial value of one parameter, fp32, of its global shape.

    Padding rows are zeros. The other rows do not depend on how many padding rows follow them.
    """
    value = torch.zeros(parameter.shape, dtype=torch.float32)
    filled = value[: parameter.shape[0] - parameter.padded_rows]
    if isinstance(parameter.initial, Normal):
        filled.normal_(0.0, parameter.initial.std, generator=_generator(parameter.name, seed))
    else:
        filled.fill_(parameter.initial.value)
    return value


def fill_initial(model: torch.nn.Module, table: ParameterTable, seed: int) -> None:
    """Give every parameter of an unpartitioned model its initial value."""
    check_table(model, table)
    with torch.no_grad():
        for row, parameter in zip(table, model.parameters(), strict=True):
            parameter.copy_(initial_value(row, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # manual_seed takes 63 bits
