"""Progress of long work: a bar on a terminal, elsewhere a line every half a minute."""

import sys
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 30  # between lines of progress where no terminal draws over the last one


def progress_bar(total: int, name: str, unit: str = "it", disable: bool = False) -> "tqdm[Any]":
    """A bar to update; where nobody watches, work of less than LOG_INTERVAL_S writes nothing."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=name, unit=unit, disable=disable)
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        disable=disable,
        mininterval=LOG_INTERVAL_S,
        maxinterval=LOG_INTERVAL_S,
        miniters=1,
        delay=LOG_INTERVAL_S,
    )
