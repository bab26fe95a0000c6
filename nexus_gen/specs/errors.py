"""Errors meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


class UserError(Exception):
    """Something that the user can mend: one sentence that names the file, line or key, and the remedy.

    Commands print it without a traceback and exit with status 2.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; did you mean 'lr'?`, or the list of valid names when none is close.

    A list, tuple or dict of them is in an order that means something, such as that of stages; others are sorted.
    """
    valid = list(valid) if isinstance(valid, Sequence | Mapping) else sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(valid)}" if valid else ""


def first_line(error: Exception) -> str:
    """What a library's error says, without the pages of advice that follow."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
