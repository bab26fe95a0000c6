"""Files that make a row together, in tars and in folders: which are passed over, and what a text beside a picture says.

No torch here.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from data.notices import Notice
from data.records.converters import known_form
from data.records.encodings import utf8_text

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ico"),
    *(".avif", ".avifs", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm"),
)
TEXT_SUFFIXES = (".txt", ".caption")
UNREAD_TEXT = (Notice("unread_text", ".txt"),)  # of a row that has words of its own
# What macOS and Windows put beside files, and what Unix hides; "." and ".." are directories as good as any.
HIDDEN = re.compile(r"(?:^|/)(?:\.(?!\.?(?:/|$))|__MACOSX(?:/|$)|(?:thumbs\.db|desktop\.ini|icon\r)$)", re.IGNORECASE)


def files_below(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Every file of a folder and of the folders in it, as a path relative to it, in order; links are followed."""
    seen: set[str] = set()
    for directory, inside, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a link to a folder above, or a second one to the same
            inside.clear()
            continue
        seen.add(real)
        inside.sort()
        prefix = os.path.relpath(directory, folder)
        yield from (name if prefix == os.curdir else f"{prefix}/{name}" for name in sorted(names))


def is_hidden(name: str) -> bool:
    """Of a path inside a tar or a folder."""
    return HIDDEN.search(name) is not None


def is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def caption_values(text: bytes) -> dict[str, Any]:
    """The row of a picture and the text beside it, which is one caption, of several lines too.

    Raises ValueError for what is not UTF-8, with the reason.
    """
    return {"caption": utf8_text(text).strip()}


def has_words(values: Any) -> bool:
    """Whether JSON beside a picture says what is said about it; other JSON beside it only describes the file."""
    return isinstance(values, dict) and known_form(values, has_pictures=True) is not None
