"""Strategies: a name to rules. To add one, write a function in a file here and a line in STRATEGIES."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from syncwright.errors import PlanError
from syncwright.near import did_you_mean
from syncwright.plan import Rules
from syncwright.program import Variable
from syncwright.strategies import fixed

STRATEGIES: dict[str, Callable[..., Rules]] = {
    "independent": fixed.independent,
    "all_reduce": fixed.all_reduce,
    "partitioned_all_reduce": fixed.partitioned_all_reduce,
    "parameter_server": fixed.parameter_server,
    "parameter_server_balanced": fixed.parameter_server_balanced,
    "parameter_server_partitioned": fixed.parameter_server_partitioned,
    "parameter_server_uneven": fixed.parameter_server_uneven,
    "staged": fixed.staged,
    "replicated_served": fixed.replicated_served,
    "parallax": fixed.parallax,
    "zero1": fixed.zero1,
    "zero2": fixed.zero2,
    "zero3": fixed.zero3,
    "hybrid": fixed.hybrid,
    "local_sgd": fixed.local_sgd,
    "diloco": fixed.diloco,
    "geo": fixed.geo,
}


def named(name: str, variables: Sequence[Variable], **options: Any) -> Rules:
    """The rules of a named strategy: named("parameter_server_partitioned", variables, min_elements=1).

    Raises PlanError for an unknown name or option, and for an option's value that cannot be meant.
    """
    if name not in STRATEGIES:
        listed = ", ".join(STRATEGIES)
        advice = did_you_mean(name, STRATEGIES, "Write one of them.")
        raise PlanError(f"strategy: found {name!r}, expected one of {listed}. {advice}")
    strategy = STRATEGIES[name]
    known = [option for option in inspect.signature(strategy).parameters if option != "variables"]
    for option in options:
        if option not in known:
            expected = f"one of {', '.join(known)}" if len(known) > 1 else "".join(known) or "no option"
            advice = did_you_mean(option, known, "Take it out.")
            raise PlanError(f"strategy {name}: found the option {option!r}, expected {expected}. {advice}")
    return strategy(variables, **options)
