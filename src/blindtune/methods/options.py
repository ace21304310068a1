"""Checks that several methods make on their options, which may come from a command line."""

from __future__ import annotations

import math


def is_number(value: object) -> bool:
    """Whether it is a finite int or float; a boolean is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
