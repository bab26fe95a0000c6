"""What the pictures of rows hold: hashes of each, and one of all that a dataset names. No torch here."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data.messages.rows import Row
from data.mixture.memory import remembered
from data.mixture.order import read_places
from data.mixture.quarantine import LeftOut
from data.mixture.spec import Dataset, MixtureSpec, load_mixture
from nexus_gen.artifacts.artifact import Seals, digest, fingerprint_path
from nexus_gen.artifacts.content import AT_ONCE, THREADS, Contents
from nexus_gen.pictures.images import EncodedImage, ImageMember, StoredImage, read_image_bytes

READING = 1  # raise it when `_named` says something else of the same rows
UNREADABLE = ""  # the hash of a picture that cannot be read; whoever reads its row says why

PicturePlace = str | list[Any]  # a path; a tar with offset and size; or the hash alone of one that came with its row
T = TypeVar("T")


def hash_picture(picture: StoredImage) -> str:
    """SHA-256 of a picture's file. Raises UserError when it cannot be read."""
    return hashlib.sha256(read_image_bytes(picture)).hexdigest()


def place_of(picture: StoredImage) -> PicturePlace:
    """Where a picture is, as JSON."""
    if isinstance(picture, EncodedImage):
        return [hash_picture(picture)]
    return [str(picture.tar), picture.offset, picture.size] if isinstance(picture, ImageMember) else str(picture)


class PictureHashes:
    """SHA-256 of pictures out of the memory of what files hold.

    Raises UserError for one inside an artifact that is not as its manifest says.
    """

    def __init__(self, memory: Path | None) -> None:
        """memory: its file, see `nexus_gen.artifacts.content`; None remembers nothing."""
        self.contents = Contents.at(memory)
        self.seals = Seals()

    def of(self, place: PicturePlace) -> str:
        """The hash of a picture's file, UNREADABLE where it cannot be read. Threads may ask at once."""
        if isinstance(place, list):
            try:
                return self.contents.sha256(place[0], (place[1], place[2])) if len(place) > 1 else place[0]
            except OSError:
                return UNREADABLE
        try:
            found = self.contents.sha256(place)
        except OSError:
            found = UNREADABLE
        self.seals.require(place, found)
        return found

    def of_rows(self, rows: Iterable[T], pictures: Callable[[T], list[PicturePlace]]) -> Iterator[tuple[T, list[str]]]:
        """Each row with the hashes of its pictures; a few rows are in memory at a time."""
        waiting = iter(rows)

        def hashed(group: list[T]) -> list[list[str]]:
            return [[self.of(place) for place in pictures(row)] for row in group]

        with ThreadPoolExecutor(THREADS) as pool:
            while group := list(islice(waiting, AT_ONCE * THREADS)):
                at_once = -(-len(group) // THREADS)
                parts = [group[first : first + at_once] for first in range(0, len(group), at_once)]
                hashes = (of_row for of_part in pool.map(hashed, parts) for of_row in of_part)
                yield from zip(group, hashes, strict=True)


def named_pictures(dataset: Dataset, left_out: LeftOut, memory: Path, picture_root: str = "") -> Iterator[str]:
    """All pictures that the rows of a dataset or a mixture name by path, each once, in their order.

    Pictures inside dataset files are part of these. memory: a file for the names, so that a dataset that did not change
    is parsed only once. picture_root: what their paths are relative to, the file that names them unless given.
    """
    spec = load_mixture(dataset, picture_root)
    key = [READING, left_out.key, *([picture_root] if picture_root else [])]
    return remembered(memory, key, spec.read_files, lambda: _named(spec, left_out))


def fingerprint_pictures(names: Iterable[str], hashes: PictureHashes) -> str:
    """One hash of what pictures hold, in their order."""
    every = hashlib.sha256()
    for _, found in hashes.of_rows(names, lambda name: [name]):
        every.update(f"{found[0]}\n".encode())
    return every.hexdigest()[:16]


def fingerprint_rows(path: Path, pictures: Iterable[StoredImage], hashes: PictureHashes) -> str:
    """Of a file of rows, with the pictures that they name by path outside of its own artifact."""
    home = hashes.seals.artifact_of(str(path))
    images = dict.fromkeys(str(image) for image in pictures if isinstance(image, Path))
    outside = [name for name in images if home is None or hashes.seals.artifact_of(name) is not home]
    fingerprint_pictures(images, hashes)  # raises for those of an artifact that are not as it says
    file = fingerprint_path(path, hashes.contents)
    return digest([file, fingerprint_pictures(outside, hashes)]) if outside else file


def _named(spec: MixtureSpec, left_out: LeftOut) -> Iterator[str]:
    seen: set[str] = set()
    for _, row, reason in read_places(spec, left_out):
        if isinstance(row, Row) and not reason:
            for image in row.images:
                if isinstance(image, Path) and (name := str(image)) not in seen:
                    seen.add(name)
                    yield name
