"""Which files hold rows of message datasets, and opening them: raw rows by iteration and by index.

A row that cannot be read is a Record with its problem; only a file that cannot be opened at all raises. No torch here.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from data.records.encodings import wide_encoding
from data.records.folder import METADATA, CaptionFolder, MetadataLines, MetadataParquet, MetadataTable
from data.records.jsonl import JsonArray, JsonLines
from data.records.parquet import ROW_GROUPS_KEPT, Parquet
from data.records.record import Record, Records, RowError
from data.records.samples import IMAGE_SUFFIXES, is_picture
from data.records.tar import MessageTar, tar_damage
from nexus_gen.specs.errors import UserError

FORMATS: dict[str, type[Records]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonArray,
    ".parquet": Parquet,
    ".tar": MessageTar,
}
# The files of Hugging Face's imagefolder, by their whole name; other tables of values are no datasets.
IMAGEFOLDER: dict[str, type[Records]] = {
    f"{METADATA}.jsonl": MetadataLines,
    f"{METADATA}.csv": MetadataTable,
    f"{METADATA}.parquet": MetadataParquet,
}
# Compressed files by how they begin and what unpacks them: rows are read by index, which needs the plain file.
COMPRESSED = {
    ".gz": (b"\x1f\x8b", "gunzip"),
    ".tgz": (b"\x1f\x8b", "gunzip"),
    ".zst": (b"\x28\xb5\x2f\xfd", "unzstd"),
    ".xz": (b"\xfd7zXZ\x00", "unxz"),
    ".bz2": (b"BZh", "bunzip2"),
    ".zip": (b"PK\x03\x04", "unzip"),
}


def open_records(path: str | os.PathLike[str], picture_root: Path | None = None) -> Records:
    """The rows of a dataset file, its format told by its name; a `.json` that does not begin with `[` is JSON lines.

    A folder is one of pictures and captions. picture_root: the directory that picture paths are relative to, that of
    the file unless given. Raises UserError when the file cannot be opened or its format is none of FORMATS.
    """
    path = Path(path)
    if path.is_dir():
        return CaptionFolder(path, picture_root)
    kind = IMAGEFOLDER.get(path.name.lower()) or FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(_no_dataset(path))
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file of message rows") from error
    for magic, command in COMPRESSED.values():
        if head.startswith(magic):
            raise UserError(_compressed(path, command))
    if issubclass(kind, JsonLines | JsonArray | MetadataTable) and (encoding := wide_encoding(head)):
        raise UserError(f"{path} is {encoding}, not UTF-8; save it as UTF-8: iconv -f {encoding} -t UTF-8 {path} > NEW")
    if kind is JsonArray and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        kind = JsonLines
    return kind(path, picture_root)


def _compressed(path: Path, command: str) -> str:
    suffix = path.suffix.lower()
    new = path.with_suffix({".tgz": ".tar"}.get(suffix, "")) if suffix in COMPRESSED else "NEW"
    unpack = f"{command} {path}" if command == "unzip" else f"{command} < {path} > {new}"
    return f"{path} is compressed, and rows are read by index; unpack it: {unpack}"


def _no_dataset(path: Path) -> str:
    """Why a file holds no rows that can be read, and what to do about it."""
    suffix = path.suffix.lower()
    if not path.exists():
        return f"{path} does not exist; check the path"
    if suffix in COMPRESSED:
        return _compressed(path, COMPRESSED[suffix][1])
    if suffix == ".arrow":
        return f"{path} is no dataset of messages; datasets.load_from_disk(...).to_parquet(...) writes one"
    endings = f"{', '.join(FORMATS)}, a mixture of several in .yaml"
    tables = f"; a table of pictures and texts is called {METADATA}.csv" if suffix in (".csv", ".tsv") else ""
    return f"{path} is no dataset of messages; a file ends in one of {endings}{tables}"


def read_records(path: str | os.PathLike[str], picture_root: Path | None = None) -> Iterator[Record]:
    """The rows of a dataset file in order; raises as `open_records` does, never for a row."""
    yield from open_records(path, picture_root)


__all__ = [
    "FORMATS",
    "IMAGEFOLDER",
    "IMAGE_SUFFIXES",
    "ROW_GROUPS_KEPT",
    "MessageTar",
    "Parquet",
    "Record",
    "Records",
    "RowError",
    "is_picture",
    "open_records",
    "read_records",
    "tar_damage",
]
