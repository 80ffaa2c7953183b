"""Checks that DeepSpeed's compiled operators are installed or can be built here."""

from collections.abc import Iterator, Mapping

from dsllm.doctor.findings import Finding, Place, advice_if, check, error_if, one_per_host
from dsllm.engine.instruments.operators import Operators


# fmt: off
# One row per check: name, where, level, problem, action.
def check_operators(operators: Mapping[Place, Operators], needed: frozenset[str]) -> Iterator[Finding]:
    """Find operators that are not installed and cannot be built; an error if the run needs them.

    Args:
        needed: names of the operators that the run needs.
    """
    for place, own in one_per_host(operators).items():
        missing = {
            name: operator for name, operator in own.operators.items() if operator.missing_tools and not operator.ready
        }
        for name, operator in missing.items():
            yield from check("operators", place.host, error_if(name in needed),
                f"DeepSpeed's {name} ({operator.purpose}) must be compiled, but there is no "
                f"{', no '.join(operator.missing_tools)}",
                "install what is missing, or do without the feature")
        others = [name for name in missing if name not in needed]
        tools = sorted({tool for operator in missing.values() for tool in operator.missing_tools})
        yield from check("operators", place.host, advice_if(others),
            f"no {', no '.join(tools)}: DeepSpeed could not compile {', '.join(others)} if a run needed it",
            "do nothing, unless a run needs one of them (the table of operators says what each is for)")
