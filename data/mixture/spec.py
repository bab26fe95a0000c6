"""What a mixture file says: its sources, and which files, formats and words they have. No torch here.

The keys are those of `data.mixture.order`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from data.messages.rows import TASKS, Row, parse_record
from data.notices import Notices
from data.records.converters import AUTO, CONVERTERS
from data.records.dataset_files import dataset_files, files_of
from data.records.reading import Record, Records, open_records
from nexus_gen.specs.errors import UserError, nearest
from nexus_gen.specs.numbers import read_number, read_whole
from nexus_gen.specs.prompts import LANGUAGES

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Source:
    """One entry of a mixture; the module says what its keys mean.

    files: what `path` stands for, sorted by name. notices: of folders, what stands in them beside the files.
    """

    path: str
    weight: float | None = None
    count: int | None = None
    tasks: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    format: str = AUTO
    system: str = ""
    captions: dict[str, float] = field(default_factory=dict)
    picture_root: str = ""
    files: tuple[Path, ...] = ()
    notices: Mapping[Path, Notices] = field(default_factory=dict)

    def open(self, file: Path) -> Records:
        """The raw rows of one of the files."""
        return open_records(file, self.root)

    @property
    def root(self) -> Path | None:
        return Path(self.picture_root) if self.picture_root else None

    def parse(self, record: Record) -> Row:
        """The row of a record, with this source's system message where it has none. Raises RowError."""
        row = parse_record(record, self.format)
        if self.system and row.messages[0]["role"] != "system":
            message = {"role": "system", "content": self.system}
            row = replace(row, messages=[message, *row.messages], choices=[{"": [self.system]}, *row.choices])
        return row

    def takes(self, row: Row) -> bool:
        return (not self.tasks or row.task in self.tasks) and (not self.languages or row.language in self.languages)


@dataclass(frozen=True)
class MixtureSpec:
    """A dataset as given: one file, or what a mixture file says.

    rehearsal: the dataset whose sources `data.rehearsal` has put behind its own. rehearsal_share: of the draws, that
    these get between them.
    """

    path: Path
    sources: tuple[Source, ...]
    epoch_rows: int | None = None
    rehearsal: "MixtureSpec | None" = None
    rehearsal_share: float = 0.0

    @property
    def is_mixture(self) -> bool:
        return self.path.suffix.lower() in SUFFIXES

    @property
    def files(self) -> list[Path]:
        """Every dataset file once."""
        return list(dict.fromkeys(file for source in self.sources for file in source.files))

    @property
    def read_files(self) -> list[Path]:
        """Every file once that decides which rows it has: the mixture too, and that of its rehearsal."""
        mixtures = [self.path, *([self.rehearsal.path] if self.rehearsal else [])]
        return list(dict.fromkeys([*mixtures, *self.files]))

    @property
    def num_own(self) -> int:
        """Sources that are not of the rehearsal; they come first."""
        return len(self.sources) - (len(self.rehearsal.sources) if self.rehearsal else 0)


Dataset = str | os.PathLike[str] | MixtureSpec  # where one is, or what was found there


def load_mixture(path: Dataset, picture_root: str | os.PathLike[str] | None = None) -> MixtureSpec:
    """The sources of a dataset (a file, a pattern, a folder) or a mixture file; no rows are read.

    path: one that was loaded before is returned as it is. picture_root: of sources that give none themselves. Raises
    UserError for a file that is no mixture, an unknown key, a value out of range, a pattern without files.
    """
    if isinstance(path, MixtureSpec):
        return path
    path, root = Path(path), os.fspath(picture_root or "")
    if root and not os.path.isdir(root):
        raise UserError(f"picture_root {root} is no directory; give the one that picture paths are relative to")
    if path.suffix.lower() not in SUFFIXES:
        found = dataset_files(path)
        return MixtureSpec(path, (Source(str(path), picture_root=root, files=found.files, notices=found.notices),))
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); give a YAML file") from error
    if not isinstance(values, dict) or not isinstance(values.get("sources"), list) or not values["sources"]:
        raise UserError(f"{path} is no mixture; give a list of sources, each with a path")
    for key in values.keys() - {"sources", "epoch_rows"}:
        raise UserError(f"{path}: there is no key '{key}'{nearest(str(key), ('sources', 'epoch_rows'))}")
    sources = tuple(
        _source(entry, f"{path}, source {n}", path, root) for n, entry in enumerate(values["sources"], start=1)
    )
    epoch_rows = _read(read_whole, f"{path}: epoch_rows", values.get("epoch_rows"))
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        raise UserError(f"{path}: {sum(weighted)} of {len(sources)} sources have a weight; give all one, or none")
    if epoch_rows is not None and not all(weighted):
        raise UserError(f"{path}: epoch_rows goes with weights; with counts their sum is the epoch")
    if epoch_rows is not None and epoch_rows < len(sources):
        raise UserError(f"{path}: epoch_rows is {epoch_rows!r}; it must be a number of at least one row per source")
    return MixtureSpec(path, sources, epoch_rows)


def _source(entry: Any, where: str, path: Path, picture_root: str) -> Source:
    known = [item.name for item in fields(Source) if item.name not in ("files", "notices")]
    needed = [item.name for item in fields(Source) if item.default is item.default_factory is MISSING]
    if not isinstance(entry, dict) or any(name not in entry for name in needed):
        raise UserError(f"{where} has no path; give {{path: ..., weight: ...}}")
    for key in entry.keys() - set(known):
        raise UserError(f"{where}: there is no key '{key}'{nearest(str(key), known)}")
    source = Source(**entry)
    if not isinstance(source.path, str):
        raise UserError(
            f"{where}: path is {source.path!r}; give one file or a pattern, in quotes where YAML reads something else "
            "than a text, and a source for each other one"
        )
    for key, valid in (("tasks", TASKS), ("languages", LANGUAGES)):
        given = getattr(source, key)
        if not isinstance(given, list) or any(one not in valid for one in given):
            raise UserError(f"{where}: {key} is {given!r}; give a list out of {', '.join(valid)}")
    if source.format not in (AUTO, *CONVERTERS):
        raise UserError(f"{where}: there is no format {source.format!r}{nearest(str(source.format), CONVERTERS)}")
    if source.weight is not None and source.count is not None:
        raise UserError(f"{where} has both a weight and a count; give one of them")
    weight = _read(read_number, f"{where}: weight", source.weight)
    count = _read(read_whole, f"{where}: count", source.count)
    for key, given in (("weight", weight), ("count", count)):
        if given is not None and given <= 0:
            raise UserError(f"{where}: {key} is {given!r}; it must be a number above 0")
    try:
        captions = {label: read_number(of) for label, of in source.captions.items()}
    except (AttributeError, ValueError):
        captions = {"": -1}
    if min(captions.values(), default=0) < 0:
        raise UserError(f"{where}: captions is {source.captions!r}; give weights by label, {{long: 2, short: 1}}")
    if not isinstance(source.system, str):
        raise UserError(f"{where}: system is {source.system!r}; give a text")
    if not isinstance(source.picture_root, str):
        raise UserError(f"{where}: picture_root is {source.picture_root!r}; give a directory")
    root = str(path.parent / os.path.expanduser(source.picture_root)) if source.picture_root else picture_root
    if not os.path.isdir(root or os.curdir):
        raise UserError(f"{where}: picture_root {root} is no directory; it is relative to {path.parent}")
    matches = files_of(path.parent, source.path)
    if not matches:
        raise UserError(f"{where}: no file is called {source.path}; paths are relative to {path.parent}")
    found = [dataset_files(match) for match in matches]
    return replace(
        source,
        weight=weight,
        count=count,
        captions=captions,
        picture_root=root,
        files=tuple(dict.fromkeys(file for of_match in found for file in of_match.files)),
        notices={folder: notices for of_match in found for folder, notices in of_match.notices.items()},
    )


def _read(read: Callable[[Any], Any], what: str, value: Any) -> Any:
    """A number of a mixture file, or None where there is none. UserError naming it."""
    try:
        return None if value is None else read(value)
    except ValueError as error:
        raise UserError(f"{what} is {error}") from error
