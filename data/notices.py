"""What is worth saying about a dataset once and no reason to fix anything: keys that are not read, files passed over.

No torch here.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from data.quotes import shortened

MOST_NAMES = 12  # that a sentence lists


class Notice(NamedTuple):
    """kind: a key of MEANINGS. about: the key of a row, or the first file."""

    kind: str
    about: str


# kind -> how its sentence begins
MEANINGS = {
    "ignored_key": "keys that are not read",
    "empty_value": "columns that are null, taken as absent",
    "hidden_file": "hidden files, passed over",
    "unused_file": "files that belong to no row, passed over",
    "unread_text": "texts beside rows that have words of their own, not read",
}
Notices = Counter[Notice]  # -> number of rows or files


@lru_cache(maxsize=1024)  # rows of one file share their keys
def notices_of(kind: str, names: frozenset[str]) -> tuple[Notice, ...]:
    return tuple(Notice(kind, shortened(name)) for name in sorted(names))


def sentences(notices: Notices) -> Iterator[tuple[str, int, str]]:
    """Kind, number of rows or files, and one sentence, of every kind that there is."""
    for kind, meaning in MEANINGS.items():
        of_kind = sorted((-count, notice.about) for notice, count in notices.items() if notice.kind == kind)
        if not of_kind:
            continue
        names = ", ".join(f"{name} ({-count:,})" for count, name in of_kind[:MOST_NAMES])
        more = f" and {len(of_kind) - MOST_NAMES} others" if len(of_kind) > MOST_NAMES else ""
        if kind.endswith("_file"):
            names, more = f"{-of_kind[0][0]:,}, {of_kind[0][1]} is the first", ""
        yield kind, -of_kind[0][0], f"{meaning}: {names}{more}"
