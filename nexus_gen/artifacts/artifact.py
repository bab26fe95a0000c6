"""Artifacts: directories that a stage writes once, with a manifest that says where they came from.

An artifact is built in a sibling `<name>.partial` and renamed when it is complete, so a directory with a
`manifest.json` is whole. Manifests hold relative paths only; an artifact can be moved or copied.

What reads from an artifact asks first whether its files are still those of the manifest. One that was edited, replaced,
lost or added since is refused by name: a manifest that vouches for other bytes would pass into the lineage of all that
follows. Whoever means the edited file copies it out of the artifact and gives that path.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from nexus_gen.artifacts.content import CONTENTS, Contents, file_facts, hash_file
from nexus_gen.artifacts.results import aside
from nexus_gen.specs.errors import UserError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
LARGE = 1 << 24  # bytes of a file whose size is compared before it is read


@dataclass
class Manifest:
    """What an artifact is and where it came from.

    files: relative path -> {"bytes", "sha256"}. inputs: role -> fingerprint of the artifact or file that was read.
    details: what the kind adds (a shard spec, model geometry, scores). created_at: UTC, ISO 8601, set by `seal`.
    numerics: version of what the stage computes, which earlier versions did not record.
    """

    kind: str
    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    code: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    created_at: str = ""
    schema_version: int = SCHEMA_VERSION
    numerics: int = 1

    @property
    def fingerprint(self) -> str:
        """Hash of what the artifact is made of; creation time and commit do not enter."""
        numerics = [self.numerics] if self.numerics != 1 else []
        return digest([self.kind, self.config, self.inputs, self.details, self.files, *numerics])

    @staticmethod
    def load(directory: str | os.PathLike[str]) -> "Manifest":
        """Read an artifact's manifest; UserError when the directory is not a complete artifact."""
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{directory} is not an artifact (no {MANIFEST}); give the artifact/ directory of a finished stage"
            )
        try:
            manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
            for name in ("config", "inputs", "code", "details", "files"):
                if not isinstance(getattr(manifest, name), dict):
                    raise TypeError(f"{name} is no object")
            return manifest
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is not a readable manifest ({error}); run the stage that made it again") from error

    def require(self, kind: str, where: str | os.PathLike[str]) -> "Manifest":
        """This manifest, or a UserError when it is of another kind."""
        if self.kind != kind:
            raise UserError(f"{where} holds a {self.kind} artifact where a {kind} artifact is needed")
        return self


def digest(value: Any) -> str:
    """Short stable hash of JSON-like data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a file so that readers see the old text or the new, never half of it."""
    with aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def seal(directory: Path, manifest: Manifest, known: Mapping[str, str] | None = None) -> None:
    """Checksum every file under `directory` and write the manifest last.

    known: relative path -> SHA-256 of files that were hashed while they were written.
    """
    known = known or {}
    # Texts, not Paths, which take as long as hashing where a dataset has a file for each picture.
    found = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names if name != MANIFEST]
    manifest.files = {}
    for path in sorted(found, key=lambda path: path.split(os.sep)):
        name = path.removeprefix(f"{directory}{os.sep}")
        manifest.files[name] = {"bytes": os.stat(path).st_size, "sha256": known.get(name) or hash_file(path)}
    manifest.created_at = datetime.now(UTC).isoformat()
    values = asdict(manifest)
    if manifest.numerics == 1:  # earlier versions do not know the key
        del values["numerics"]
    write_text_atomic(directory / MANIFEST, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def building(directory: str | os.PathLike[str], keep_partial: bool = False, resumable: bool = False) -> Iterator[Path]:
    """Yield `<directory>.partial` to fill; on success it replaces `directory`, on failure the old one stays.

    keep_partial: start from what an interrupted run left there instead of from nothing. resumable: leave there what a
    failure interrupts, which is removed otherwise. Single process only; a stage of several processes lets rank zero
    enter and leave.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    if partial.exists() and not keep_partial:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not (resumable or keep_partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = directory.with_name(directory.name + ".replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if directory.exists():
        os.replace(directory, replaced)
    os.replace(partial, directory)
    if replaced.exists():
        shutil.rmtree(replaced)


def verify(directory: str | os.PathLike[str]) -> Manifest:
    """Read every file of an artifact; UserError names the first that is missing or differs from its manifest."""
    manifest = Manifest.load(directory)
    require_whole(Path(directory), manifest, Contents())
    return manifest


def fingerprint_path(where: Path, contents: Contents | None = None) -> str:
    """The fingerprint of an artifact for anything inside one; else a hash of names and contents.

    contents: the memory of what files hold. Raises UserError for what cannot be read, and in an artifact for what is
    not as it was made.
    """
    contents = contents or Contents()
    if (inside := fingerprint_inside(where, contents)) is not None:
        return inside
    try:
        if where.is_file():
            return contents.sha256(where)
        names = sorted(files_below(str(where)), key=lambda name: name.split("/"))
        hashes = contents.sha256s([f"{where}/{name}" for name in names])
        return digest([[name, sha256] for name, sha256 in zip(names, hashes, strict=True)])
    except OSError as error:
        raise UserError(f"{error.filename or where} cannot be read ({error.strerror}); check the path") from error


def fingerprint_inside(where: Path, contents: Contents | None = None) -> str | None:
    """That of an artifact or of something in one; None for what is in none. Raises UserError as `fingerprint_path`."""
    where = _located(where)
    found = Seals().artifact_of(str(where))
    if found is None:
        return None
    require_whole(found.directory, found.manifest, contents or Contents(), where)
    return digest([found.fingerprint, where.relative_to(found.directory).as_posix()])


def require_whole(directory: Path, manifest: Manifest, contents: Contents, where: Path | None = None) -> None:
    """UserError unless the files of an artifact, or those at the path `where` in it, are those of its manifest.

    Sizes of large files are asked first: one that was cut short is named before terabytes of others are read.
    """
    within = "" if where in (None, directory) else _located(where or directory).relative_to(directory).as_posix()
    files = {
        name: facts
        for name, facts in manifest.files.items()
        if not within or name == within or name.startswith(f"{within}/")
    }
    contents.consult(directory.absolute().parent.parent / CONTENTS)  # of the run that made it
    try:
        for name, facts in files.items():
            size = os.stat(f"{directory}/{name}").st_size if facts["bytes"] >= LARGE else facts["bytes"]
            if size != facts["bytes"]:
                problem = f"differs from its manifest ({size} bytes where that has {facts['bytes']})"
                raise _refusal(directory, manifest, name, problem)
        if within not in files and manifest.kind != "shipped_run":  # commands add to a run
            for name in files_below(f"{directory}/{within}" if within else str(directory)):
                hidden = any(part.startswith(".") or part == MANIFEST for part in name.split("/"))
                if not hidden and (f"{within}/{name}" if within else name) not in files:
                    raise _refusal(directory, manifest, f"{within}/{name}" if within else name, NOT_LISTED)
        with contextlib.closing(contents.sha256s([f"{directory}/{name}" for name in files])) as hashes:
            for (name, facts), sha256 in zip(files.items(), hashes, strict=True):
                if sha256 != facts["sha256"]:
                    raise _refusal(directory, manifest, name, "differs from its manifest")
    except FileNotFoundError as error:
        name = os.path.relpath(error.filename, directory)
        raise _refusal(directory, manifest, name, "is missing, and its manifest lists it") from error
    except NotADirectoryError as error:  # a file of the artifact that its manifest does not list
        raise _refusal(directory, manifest, within, NOT_LISTED) from error
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); check the path") from error


class Found(NamedTuple):
    """An artifact that was come across."""

    directory: Path
    manifest: Manifest
    fingerprint: str


class Seals:
    """What manifests say of single files, such as the pictures that rows name. For one look: artifacts are replaced."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Found, str] | None] = {}  # of a directory, and how names of its files begin there

    def require(self, file: str, sha256: str) -> None:
        """UserError for a file in an artifact that differs from its manifest. sha256: of it, "" for a missing one."""
        directory, name = os.path.split(file)
        if (inside := self._of_directory(directory)) is None:
            return
        found, prefix = inside
        listed = found.manifest.files.get(prefix + name)
        if listed is None or listed["sha256"] != sha256:
            problem = "differs from its manifest" if sha256 else "is missing or cannot be read"
            raise _refusal(found.directory, found.manifest, prefix + name, problem if listed else NOT_LISTED)

    def artifact_of(self, where: str) -> Found | None:
        """The artifact that a path is or is in."""
        inside = self._of_directory(where if os.path.isdir(where) else os.path.dirname(where))
        return inside and inside[0]

    def _of_directory(self, directory: str) -> tuple[Found, str] | None:
        if directory not in self._found:
            place = str(_located(directory))
            parent, name = os.path.split(place)
            if found := _artifact_at(place):
                self._found[directory] = found, ""
            elif parent == place or (inside := self._of_directory(parent)) is None:
                self._found[directory] = None
            else:
                self._found[directory] = inside[0], f"{inside[1]}{name}/"
        return self._found[directory]


def remember_sealed(directory: Path, contents: Contents) -> None:
    """Take up what `seal` hashed, so that stages that read the artifact need not hash it again."""
    manifest = Manifest.load(directory)
    contents.learn((f"{directory}/{name}", facts["sha256"]) for name, facts in manifest.files.items())
    contents.save()


def files_below(directory: str, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Names of all files below a directory, with / between their parts; links to directories are followed too."""
    stat = os.stat(directory)
    if (place := (stat.st_dev, stat.st_ino)) in above:  # a link to where it is in
        return
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from files_below(entry.path, f"{prefix}{entry.name}/", (*above, place))
            elif entry.is_file():
                yield f"{prefix}{entry.name}"


NOT_LISTED = "is not in its manifest, it came later"


def _refusal(directory: Path, manifest: Manifest, name: str, problem: str) -> UserError:
    again = f"delete {directory}"
    if manifest.kind == "embedding_shards":
        again = f"keep what is whole by `nexus-gen shards repair {directory}`"
    return UserError(
        f"{directory / name} {problem}; put it as it was, or {again} and run stage={manifest.stage} again. "
        "To read it as it is, copy it out of the artifact and give that path"
    )


def _located(where: str | os.PathLike[str]) -> Path:
    """An absolute path whose parents are the directories that it is in."""
    return Path(os.path.realpath(where) if ".." in Path(where).parts else os.path.abspath(where))


def _artifact_at(directory: str) -> Found | None:
    """A directory as an artifact; None where it has no manifest, or one of another program."""
    try:
        facts = file_facts(os.path.join(directory, MANIFEST))
    except OSError:
        return None
    return _read_artifact(directory, *facts)


@lru_cache(maxsize=16)
def _read_artifact(directory: str, *_facts: int) -> Found | None:
    try:
        manifest = Manifest.load(directory)
        return Found(Path(directory), manifest, manifest.fingerprint)
    except UserError:
        with open(os.path.join(directory, MANIFEST), "rb") as file, contextlib.suppress(ValueError):
            values = json.load(file)
            if not (isinstance(values, dict) and {"kind", "stage", "files"} <= values.keys()):
                return None
        raise
