"""Values of rows as errors and reports quote them: cut to a few words, and never a picture's bytes.

No torch here.
"""

import re
from typing import Any

MOST_CHARACTERS = 80  # of a value that is quoted
# What base64 is written with; a longer run of it is a picture or a hash, and no words.
BASE64 = re.compile(r"[A-Za-z0-9+/_=\r\n-]{65,}")


def brief(value: Any) -> str:
    """A value as one short line: texts in quotes and cut, bytes and base64 as their number."""
    if isinstance(value, str):
        text = shortened(value)
        return text if text is not value and text.startswith("<") else repr(text)
    return shortened(repr(without_pictures(value)))


def shortened(text: str) -> str:
    """The text itself where it is short; else how it begins, or what it is where it is no words."""
    if len(text) > 64 and ((text.startswith("data:") and "," in text[:200]) or BASE64.fullmatch(text)):
        return f"<{len(text)} characters of base64>"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


def without_pictures(value: Any) -> Any:
    """A copy that JSON can hold, its bytes and its long texts replaced by a few words."""
    if isinstance(value, dict):
        return {shortened(str(key)): without_pictures(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_pictures(item) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str):
        return shortened(value)
    return value if isinstance(value, int | float | None) else type(value).__name__
