"""Checks the values of options, which may come from a command line, for all methods and designs."""

from __future__ import annotations

import math
from typing import TypeGuard

from blindtune.errors import ConfigError


def is_number(value: object) -> TypeGuard[float]:
    """Returns whether `value` is a finite int or float. Booleans don't count as numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_counts(**values: object) -> None:
    """Raises `ConfigError` unless every value is a positive integer."""
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} = {value!r} is no count.", remedy="Use a whole number, at least 1.")


def check_positive(**values: object) -> None:
    """Raises `ConfigError` unless every value is a positive finite number."""
    for name, value in values.items():
        if not is_number(value) or value <= 0:
            raise ConfigError(f"{name} = {value!r} can't work.", remedy="Use a positive number.")


def check_weights(**values: object) -> None:
    """Raises `ConfigError` unless every value is a finite number of at least 0."""
    for name, value in values.items():
        if not is_number(value) or value < 0:
            raise ConfigError(
                f"{name} = {value!r} is no weight.", remedy="Use a number such as 0.1, or 0 to switch it off."
            )


def check_switches(**values: object) -> None:
    """Raises `ConfigError` unless every value is a boolean. A string such as "no" would otherwise count as true."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} = {value!r} is neither true nor false.", remedy="Use one of the two.")


def check_budget(max_mu: object) -> None:
    """Raises `ConfigError` unless the budget `max_mu` is None or a positive finite number."""
    if max_mu is not None and (not is_number(max_mu) or max_mu <= 0):
        raise ConfigError(f"max_mu = {max_mu!r} is no budget.", remedy="Use a positive number such as 0.1.")
