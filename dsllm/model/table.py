"""Checks that a built model has exactly the parameters that its table describes."""

from collections.abc import Iterator, Sequence

from torch import nn

from dsllm.parameters import ParameterTable

Shapes = Sequence[tuple[str, tuple[int, ...]]]


def check_table(model: nn.Module, table: ParameterTable) -> None:
    """Assert that names, shapes and order of a whole model's parameters are those of its table.

    Args:
        model: not partitioned by ZeRO-3, which empties the shapes; on any device, "meta" too

    Raises:
        AssertionError: see `check_shapes`.
    """
    check_shapes([(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()], table)


def check_shapes(found: Shapes, table: ParameterTable) -> None:
    """Assert that these names and global shapes, in this order, are those of a table.

    Raises:
        AssertionError: names every parameter that is missing, unknown or of another shape, or the first out of order.
    """
    expected = [(parameter.name, parameter.shape) for parameter in table]
    problems = list(_problems(found, expected))
    assert not problems, "the model and its table of parameters differ: " + "; ".join(problems)


def _problems(found: Shapes, expected: Shapes) -> Iterator[str]:
    shapes, of_table = dict(found), dict(expected)
    yield from (f"{name} is in the table but not in the model" for name in of_table if name not in shapes)
    yield from (f"{name} is in the model but not in the table" for name in shapes if name not in of_table)
    both = [name for name in of_table if name in shapes]
    for name in both:
        if shapes[name] != of_table[name]:
            yield f"{name} is {list(shapes[name])} in the model and {list(of_table[name])} in the table"
    order = [name for name in shapes if name in of_table]
    for number, (in_model, in_table) in enumerate(zip(order, both, strict=True)):
        if in_model != in_table:
            yield f"parameter {number} is {in_model} in the model and {in_table} in the table"
            return
