"""What can be wrong with a row or a picture, how bad that is, and the checks that find it.

Each check looks at one row; what only the whole dataset shows (duplicates, leaks) is in data/doctor/examine.py.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.messages.rows import Row
from data.messages.stored_pictures import not_there
from data.messages.token_lengths import Length, Size, TokenLengths
from data.messages.truth import truth_problem
from nexus_gen.pictures.images import (
    MAX_ASPECT,
    EncodedImage,
    StoredImage,
    open_image,
    open_size,
    read_image_bytes,
)
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import IMAGE_TAG

ERROR, WARNING, NOTICE = "error", "warning", "notice"
LEVELS = ("none", "exists", "header", "decode")
# kind -> (severity, what it does to training). An error breaks or corrupts training; a warning is worth a look.
KINDS = {
    "json": (ERROR, "the row is no JSON object"),
    "encoding": (ERROR, "the text is not UTF-8"),
    "parquet": (ERROR, "the rows of a whole group are lost"),
    "tar": (ERROR, "the sample, or all behind it, is lost"),
    "csv": (ERROR, "the row, or all behind it, is lost"),
    "caption": (ERROR, "the picture has no caption to be made from"),
    "key": (ERROR, "a misspelt key would be ignored"),
    "messages": (ERROR, "there is no conversation to learn from"),
    "url": (ERROR, "nothing is fetched while training"),
    "images": (ERROR, "the pictures cannot be found"),
    "language": (ERROR, "there are no words around a caption in that language"),
    "truth": (ERROR, "the ground truth cannot be scored with"),
    "role": (ERROR, "nobody knows who speaks"),
    "order": (ERROR, "turns out of order teach the wrong side to speak"),
    "placeholders": (ERROR, "pictures and <image> tags do not match; a mismatch can hang all processes"),
    "empty_prompt": (ERROR, "a reply to nothing teaches to invent"),
    "empty_reply": (ERROR, "an empty reply teaches silence"),
    "markup": (ERROR, "tokens of the chat template within a message end or begin turns and pictures"),
    "missing_picture": (ERROR, "the file is not there"),
    "picture": (ERROR, f"it cannot be decoded, or has sides of more than {MAX_ASPECT}:1, which the processor refuses"),
    "too_long": (ERROR, "more tokens than max_length: training refuses the row"),
    "cut_picture": (ERROR, "more tokens than max_length, and cutting there would lose a picture"),
    "leaked_row": (ERROR, "a held-out row is in the training data, so held-out figures mean nothing"),
    "leaked_picture": (WARNING, "a held-out picture is in the training data; bad where it is what is scored"),
    "duplicate_row": (WARNING, "the row weighs more than others"),
    "duplicate_picture": (WARNING, "the same content lies in several files"),
    "unchanged_edit": (WARNING, "an edit that changes nothing teaches to copy"),
    "extreme_aspect": (WARNING, "squashing to a square distorts it, and few patches lie across it"),
    "tiny_picture": (WARNING, "enlarged to the smallest size that the model sees, it is a blur"),
    "flat_picture": (WARNING, "it has about one colour; often what a failed download left"),
}
EXTREME_ASPECT = 4.0
TINY_SIDE = 32  # pixels
FLAT_RANGE = 8  # of 255, between the darkest and the brightest value of each channel


class Problem(NamedTuple):
    """One thing that is wrong. picture: the number of the row's picture that it is about, from 0; -1 for none."""

    kind: str
    reason: str
    picture: int = -1


class Picture(NamedTuple):
    """What is known of a picture. identity: hash of its bytes where they were read, of its name otherwise.

    size: as oriented, None where it was not looked at or cannot be read. problems: kind and reason.
    """

    identity: int
    name_hash: int
    size: Size | None
    problems: tuple[tuple[str, str], ...]


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def inspect_picture(source: StoredImage, level: str, by_content: bool) -> Picture:
    """Look at a picture as closely as the level says; by_content: identify it by its bytes."""
    if isinstance(source, Path):
        return _inspect_file(os.path.normpath(source), level, by_content)
    return _inspect(source, level, by_content)


@lru_cache(maxsize=1 << 16)  # several rows often ask about one file
def _inspect_file(path: str, level: str, by_content: bool) -> Picture:
    return _inspect(Path(path), level, by_content)


def _inspect(source: StoredImage, level: str, by_content: bool) -> Picture:
    name_hash = hash64(str(source).encode("utf-8", "surrogatepass"))
    if level != "none" and isinstance(source, Path) and not os.path.exists(source):
        return Picture(name_hash, name_hash, None, (("missing_picture", not_there(source)),))
    if level in ("none", "exists"):
        return Picture(name_hash, name_hash, None, ())
    identity = name_hash
    try:
        if by_content:
            data = read_image_bytes(source)
            identity, source = hash64(data), EncodedImage(str(source), data)
        if level == "header":
            size, problems = open_size(source), []
        else:
            image = open_image(source)
            size, problems = image.size, flatness(image, source)
    except UserError as error:
        return Picture(identity, name_hash, None, (("picture", str(error)),))
    return Picture(identity, name_hash, size, (*shape_problems(size, source), *problems))


def shape_problems(size: Size, source: StoredImage) -> list[tuple[str, str]]:
    """What is odd about the sides of a picture."""
    (width, height), aspect = size, max(size) / min(size)
    if aspect > MAX_ASPECT:
        return [("picture", f"picture {source} is {width} x {height}, more than {MAX_ASPECT}:1; crop it")]
    problems: list[tuple[str, str]] = []
    if aspect > EXTREME_ASPECT:
        problems.append(("extreme_aspect", f"picture {source} is {width} x {height}, {aspect:.1f}:1"))
    if min(size) < TINY_SIDE:
        problems.append(("tiny_picture", f"picture {source} is {width} x {height} pixels"))
    return problems


def flatness(image: Image.Image, source: StoredImage) -> list[tuple[str, str]]:
    """A warning for a picture of about one colour."""
    extrema: tuple[tuple[int, int], ...] = image.getextrema()  # type: ignore[assignment]
    if any(high - low >= FLAT_RANGE for low, high in extrema):
        return []
    colour = ", ".join(str(low) for low, _ in extrema)
    return [("flat_picture", f"picture {source} is one colour, about ({colour})")]


def edit_problems(row: Row, pictures: Sequence[Picture]) -> list[Problem]:
    """A picture to be made that is among the pictures that were given."""
    roles = [m["role"] for m in row.messages for _ in range(m["content"].count(IMAGE_TAG))]
    given = {picture.identity for role, picture in zip(roles, pictures, strict=True) if role == "user"}
    return [
        Problem("unchanged_edit", f"picture {number + 1}, to be made, is one of the pictures given", number)
        for number, (role, picture) in enumerate(zip(roles, pictures, strict=True))
        if role == "assistant" and picture.identity in given
    ]


def length_problem(length: Length, max_length: int) -> Problem | None:
    """A row of more than max_length tokens: how many, and which pictures a cut would hit."""
    if length.total <= max_length:
        return None
    sentence = f"{length.total} tokens where max_length is {max_length}"
    remedy = "raise it, lower max_pixels, or shorten the row"
    lost = [number for number, (_, end) in enumerate(length.pictures, start=1) if end > max_length]
    if not lost:
        return Problem("too_long", f"{sentence}; {remedy}")
    first, end = length.pictures[lost[0] - 1]
    how = f"cut picture {lost[0]} in two (tokens {first} to {end})" if first < max_length else f"lose picture {lost[0]}"
    more = f" and the {len(lost) - 1} behind it" if len(lost) > 1 else ""
    return Problem(
        "cut_picture", f"{sentence}; cutting there would {how}{more} of {len(length.pictures)}; {remedy}", lost[0] - 1
    )


def row_hash(row: Row, pictures: Sequence[Picture]) -> int:
    """Of what is said and of what the pictures are; id and source do not enter."""
    parts = [message["role"] for message in row.messages]
    parts += [text for choice in row.choices for texts in choice.values() for text in texts]
    parts += [str(picture.identity) for picture in pictures]
    return hash64("\0".join(parts).encode("utf-8", "surrogatepass"))


class RowChecker:
    """The checks of one row under fixed settings.

    level: how closely pictures are looked at. lengths: measures tokens, None leaves that out; max_length: None takes
    any length.
    """

    def __init__(
        self,
        level: str,
        by_content: bool = False,
        lengths: TokenLengths | None = None,
        max_length: int | None = None,
    ) -> None:
        self.level, self.by_content = level, by_content
        self.lengths, self.max_length = lengths, max_length

    def pictures(self, row: Row) -> list[Picture]:
        return [inspect_picture(source, self.level, self.by_content) for source in row.images]

    def measure(self, rows: Sequence[Row], pictures: Sequence[Sequence[Picture]]) -> list[Length | None]:
        """The token length of each row; None for rows whose pictures have no size that the processor takes."""
        if self.lengths is None:
            return [None] * len(rows)
        sizes = [[p.size for p in of_row] for of_row in pictures]
        fit = [n for n, of_row in enumerate(sizes) if all(s and max(s) <= MAX_ASPECT * min(s) for s in of_row)]
        found: list[Length | None] = [None] * len(rows)
        measured = self.lengths.measure([rows[n] for n in fit], [[s for s in sizes[n] if s] for n in fit])
        for number, length in zip(fit, measured, strict=True):
            found[number] = length
        return found

    def problems(self, row: Row, pictures: Sequence[Picture], length: Length | None) -> list[Problem]:
        found: list[Problem] = []
        for number, picture in enumerate(pictures):
            if picture not in pictures[:number]:
                found += [Problem(kind, reason, number) for kind, reason in picture.problems]
        found += edit_problems(row, pictures)
        if problem := truth_problem(row):
            found.append(Problem("truth", problem))
        if length is not None and self.max_length is not None:
            over = length_problem(length, self.max_length)
            found += [over] if over else []
        return found
