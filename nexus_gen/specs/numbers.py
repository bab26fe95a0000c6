"""Numbers as people write them in options, files and rows: `1e-1`, `2e3` and `1_000`, but neither infinity nor NaN."""

import math
from collections.abc import Iterator
from typing import Any


def read_number(value: Any) -> float:
    """A finite number, itself or out of its text. Raises ValueError, whose text follows `is`.

    YAML 1.1 reads `1e-1`, which has no point, as a text.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r}; it must be a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value}; it must be a finite number")
    return value if isinstance(value, int) else number


def read_whole(value: Any) -> int:
    """A whole number out of a number or its text; 2e3 is one. Raises ValueError as `read_number` does."""
    if isinstance(value, str):
        try:
            return int(value)  # also beyond what floating point holds exactly
        except ValueError:
            pass
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    number = read_number(value)
    if number != int(number):
        raise ValueError(f"{value}; it must be a whole number")
    return int(number)


def not_finite(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(dotted key, value) of every infinite number and NaN in nested values; those of a list are under its key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from not_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from not_finite(value, key)
    elif isinstance(values, float) and not math.isfinite(values):
        yield key, values
