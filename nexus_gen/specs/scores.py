"""Scores of `nexus-gen evaluate` as people read them."""

import re
from typing import Any

# Of measures; everything else is a share.
UNITS = {"psnr": "dB", "ssim": "", "l1": "", "mse": "", "cosine_distance": "", "similarity": ""}


def in_unit(name: str, score: dict[str, Any]) -> tuple[str, str]:
    """(value, interval) of a score as people read it."""
    unit = unit_of(name)
    if unit is None:
        return f"{score['value']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}"
    digits = 1 if unit else 3
    return f"{score['value']:.{digits}f} {unit}".strip(), f"{score['low']:.{digits}f} to {score['high']:.{digits}f}"


def chance_of(name: str, score: dict[str, Any]) -> str:
    """What a score would be without any skill, as people read it; empty where there is no such level."""
    return in_unit(name, {**score, "value": score["chance"]})[0] if "chance" in score else ""


def unit_of(name: str) -> str | None:
    """The unit of a measure, empty for one without; None for a share."""
    return UNITS.get(re.sub("^(outside|inside)_", "", name.rpartition("/")[2]))


def is_detail(name: str) -> bool:
    """Whether a score is of one category in one language, such as editing/zh/move."""
    phase, *rest = name.split("/")
    return phase not in ("reconstruction", "imagined") and len(rest) == 2 and rest[1] != "overall"
