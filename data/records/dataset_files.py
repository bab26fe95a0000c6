"""Which files a dataset's path stands for: a file, a pattern, or a folder of files or of pictures. No torch here."""

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.notices import Notice, Notices
from data.records.reading import FORMATS, IMAGEFOLDER
from data.records.samples import TEXT_SUFFIXES, files_below, is_hidden, is_picture
from nexus_gen.specs.errors import UserError

# Words in the names of files and folders that are not to be trained on.
HELDOUT_WORDS = frozenset(("test", "tests", "testing", "val", "valid", "validation", "dev", "eval", "heldout", "held"))
KNOWN = "files in Parquet, tars or JSON lines, pictures with NAME.txt beside each NAME.jpg, or metadata.jsonl"


@dataclass(frozen=True)
class DatasetFiles:
    """files: what `open_records` opens, sorted by name; a folder of pictures and captions is one of them.

    notices: what a folder holds beside them, by folder.
    """

    files: tuple[Path, ...]
    notices: dict[Path, Notices] = field(default_factory=dict)


def is_pattern(path: str | os.PathLike[str]) -> bool:
    """Whether a path stands for all files that it matches; a file may be called so, too."""
    return glob.has_magic(os.fspath(path)) and not os.path.exists(path)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether a path stands for anything; what a stage has yet to write may look like a pattern without files."""
    return os.path.exists(path) or (is_pattern(path) and bool(files_of(Path(), os.fspath(path))))


def dataset_files(path: str | os.PathLike[str]) -> DatasetFiles:
    """The files of a dataset; one that does not exist stays, to be named when it is opened.

    Raises UserError for a pattern without files, and for a folder that may be read in more than one way.
    """
    if is_pattern(path):
        matches = files_of(Path(), os.fspath(path))
        if not matches:
            raise UserError(f"no file is called {path}; check the path")
    elif "{" in os.fspath(path) and not os.path.exists(path):
        raise UserError(f"{path} does not exist; braces are not expanded, a pattern has *, ? and [0-9]")
    else:
        matches = [Path(path)]
    files: list[Path] = []
    notices: dict[Path, Notices] = {}
    for match in matches:
        found = _of_folder(match) if match.is_dir() else DatasetFiles((match,))
        files += found.files
        notices |= found.notices
    return DatasetFiles(tuple(dict.fromkeys(files)), notices)


def files_of(base: Path, pattern: str) -> list[Path]:
    """The files and folders that a path or a pattern stands for, sorted by name; relative ones begin in `base`.

    A part of it that a file or folder is called is that one: `[y]` is the folder [y] where there is one. `**` is any
    number of folders.
    """
    found = [base]
    for part in Path(os.path.expanduser(pattern)).parts:
        found = [path for place in found for path in _called(part, place)]
    return sorted(dict.fromkeys(found))


def _called(part: str, place: Path) -> list[Path]:
    """What one part of a pattern stands for in a folder."""
    if part == "**":
        return [place / name for name in glob.glob("**/", root_dir=place, recursive=True)] + [place]
    literal = place / part
    is_pattern = glob.has_magic(part)
    if not is_pattern or not fnmatch.fnmatchcase(part, part):  # else a pattern finds what is called like itself
        if os.path.lexists(literal):
            return [literal]
        if not is_pattern:
            return []
    names = glob.glob(part, root_dir=place) or glob.glob(part.replace("[", "[[]"), root_dir=place)
    return [place / name for name in names]


def _of_folder(folder: Path) -> DatasetFiles:
    hidden: list[str] = []
    names: list[str] = []
    for name in files_below(folder):
        (hidden if is_hidden(name) else names).append(name)
    of_kind: dict[str, list[str]] = {}
    for name in names:
        of_kind.setdefault(_kind(name), []).append(name)
    metadata, arrays, pictures = (of_kind.pop(kind, []) for kind in ("metadata", ".json", "picture"))
    texts, others = of_kind.pop("text", []), of_kind.pop("", [])
    pairs = {os.path.splitext(name)[0] for name in pictures} & {os.path.splitext(name)[0] for name in texts + arrays}
    arrow = any(name.endswith(".arrow") for name in others)
    if metadata:
        _require_one(folder, Counter({"metadata files": len(metadata)} | {k: len(n) for k, n in of_kind.items()}))
        chosen = metadata
        in_one = Counter(os.path.dirname(name) for name in metadata)
        for directory in (directory for directory, count in in_one.items() if count > 1):
            raise UserError(f"{folder / directory} has more than one file of metadata; keep one of them")
    elif of_kind:
        both = {"pictures with captions": len(pairs)} if pairs else {}
        _require_one(folder, Counter(both | {kind: len(of_this) for kind, of_this in of_kind.items()}))
        (chosen,) = of_kind.values()
    elif pairs:
        _require_one_split(folder, pictures)
        return DatasetFiles((folder,))  # it counts what it passes over itself
    elif pictures:
        raise UserError(
            f"{folder} holds {len(pictures)} pictures and no captions; write NAME.txt beside each NAME.jpg, or a "
            'metadata.jsonl of {"file_name": ..., "text": ...}'
        )
    elif arrays and not arrow:
        chosen = arrays
    else:  # JSON beside Arrow files is what `save_to_disk` writes about them
        remedy = "; datasets.load_from_disk(...).to_parquet(...) writes one of these" if arrow else ""
        raise UserError(f"{folder} holds no rows; a folder of a dataset has {KNOWN}{remedy}")
    _require_one_split(folder, chosen)
    notices = Notices()
    unread = [name for name in texts if os.path.splitext(name)[0] in pairs]
    unused = sorted({*others, *texts, *arrays}.difference(unread, chosen))
    for kind, of_this in (("hidden_file", hidden), ("unread_text", unread), ("unused_file", unused)):
        if of_this:
            notices[Notice(kind, of_this[0])] = len(of_this)
    return DatasetFiles(tuple(folder / name for name in chosen), {folder: notices} if notices else {})


def _kind(name: str) -> str:
    """What a file is to a dataset: metadata, picture, text, the suffix of a format, or nothing."""
    base = os.path.basename(name).lower()
    if base in IMAGEFOLDER:
        return "metadata"
    if is_picture(base):
        return "picture"
    stem, suffix = os.path.splitext(base)
    if suffix in TEXT_SUFFIXES:
        return "text"
    inner = os.path.splitext(stem)[1]
    if inner in FORMATS and inner != ".json" and suffix not in FORMATS:
        return f"{inner}{suffix}"  # compressed: `open_records` says how to unpack it
    return suffix if suffix in FORMATS else ""


def _require_one(folder: Path, kinds: Counter[str]) -> None:
    if len(kinds) > 1:
        held = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        suffix = next(kind for kind in kinds if kind.startswith("."))
        raise UserError(
            f"{folder} holds rows of several kinds ({held}); give one of them, a pattern such as {folder}/*{suffix} "
            "or the folder of the pictures alone"
        )


def _require_one_split(folder: Path, names: Iterable[str]) -> None:
    """Nobody wants to train on all splits of a dataset, which lie side by side as it was downloaded."""
    examples: dict[bool, str] = {}
    for name in names:
        examples.setdefault(_is_heldout(name), name)
        if len(examples) == 2:
            raise UserError(
                f"{folder} holds rows to train on and held-out ones side by side ({examples[False]} and "
                f"{examples[True]}); give those to train on alone, as a pattern or a folder inside"
            )


def _is_heldout(name: str) -> bool:
    """By the words of its folders, and of a data file's own name; pictures may be called anything."""
    directory, base = os.path.split(name)
    words: Iterator[str] | list[str] = re.findall("[a-z]+", (directory if is_picture(base) else name).lower())
    return not HELDOUT_WORDS.isdisjoint(words)
