"""Scores of `nexus-gen evaluate` as people read them."""

from typing import Any

UNITS = {"psnr": "dB", "ssim": "", "l1": ""}  # of measures; everything else is a share


def in_unit(name: str, score: dict[str, Any]) -> tuple[str, str]:
    """(value, interval) of a score as people read it."""
    unit = UNITS.get(name.rpartition("/")[2].removeprefix("outside_"))
    if unit is None:
        return f"{score['value']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}"
    digits = 1 if unit else 3
    return f"{score['value']:.{digits}f} {unit}".strip(), f"{score['low']:.{digits}f} to {score['high']:.{digits}f}"


def is_detail(name: str) -> bool:
    """Whether a score is of one category in one language, such as editing/zh/move."""
    phase, *rest = name.split("/")
    return phase != "reconstruction" and len(rest) == 2 and rest[1] != "overall"
