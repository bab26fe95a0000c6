"""Where a command writes: checked before anything is loaded, and written whole or not at all."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nexus_gen.specs.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LEAST_BYTES = 1 << 20  # free on a disk that a result is written to


def check_result(
    path: str | os.PathLike[str],
    flag: str,
    *,
    suffixes: Sequence[str] = (),
    directory: bool = False,
    num_bytes: int = LEAST_BYTES,
) -> None:
    """UserError unless a result can be written at `path`; what is missing of its directory is not made yet.

    flag: what the path was given by, such as --output. suffixes: those that a file may have. directory: whether a
    directory is written. num_bytes: free on the disk, about as large as the result.
    """
    path = Path(path)
    given = f"{flag} {path}"
    if not directory and suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{given} does not end in {' or '.join(suffixes)}; give a file name that does")
    try:
        if not directory and path.is_dir():
            raise UserError(f"{given} is a directory; give the file to write")
        if directory and path.exists() and not path.is_dir():
            raise UserError(f"{given} is a file; give a directory")
        if not directory and path.exists() and not path.is_file():
            raise UserError(f"{given} is not a regular file; give one, or a new path")
        place = path if directory else path.parent
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{given} cannot be made: {place} is a file; give another path")
        # Permissions say little of network and read-only disks; the name itself may be too long.
        trial = place / f".{path.name}.{os.getpid()}.tmp"
        with open(trial, "xb"):
            pass
        trial.unlink()
        free = shutil.disk_usage(place).free
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{given} cannot be written: {why}; give another path") from error
    if free < num_bytes:
        raise UserError(
            f"{given} needs about {num_bytes / 1e6:.0f} MB and its disk has {free / 1e6:.1f} MB free; make room, or "
            "give another path"
        )


@contextmanager
def aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside `path`, of the same suffix, whose name it takes when all went well; else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
