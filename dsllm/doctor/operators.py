"""Judges whether DeepSpeed's compiled operators could be had here, where a run would ask for them."""

from collections.abc import Iterator, Mapping

from dsllm.doctor.findings import Finding, Place, one_per_host
from dsllm.engine.instruments.operators import Operators


def check_operators(seen: Mapping[Place, Operators], needed: frozenset[str]) -> Iterator[Finding]:
    """An operator that is neither there nor can be built; an error where the run needs it.

    Args:
        needed: names of the operators that the run cannot do without.
    """
    for place, own in one_per_host(seen).items():
        for name, operator in own.operators.items():
            if operator.ready or not operator.missing_tools:
                continue
            if name in needed:
                yield Finding(
                    level="error",
                    check="operators",
                    where=place.host,
                    problem=f"DeepSpeed's {name} ({operator.purpose}) must be compiled, but there is no "
                    f"{', no '.join(operator.missing_tools)}",
                    action="install what is missing, or do without the feature",
                )
        lacking = sorted({tool for o in own.operators.values() if not o.ready for tool in o.missing_tools})
        names = [name for name, o in own.operators.items() if not o.ready and o.missing_tools and name not in needed]
        if names:
            yield Finding(
                level="advice",
                check="operators",
                where=place.host,
                problem=f"no {', no '.join(lacking)}: DeepSpeed could not compile {', '.join(names)} if a run asked for it",
                action="nothing, unless a run shall use them (each says below what it is for)",
            )
