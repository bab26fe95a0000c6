"""Artifacts: directories that a stage writes once, with a manifest that says where they came from.

An artifact is built in a sibling `<name>.partial` and renamed when it is complete, so a directory with a
`manifest.json` is whole. Manifests hold relative paths only; an artifact can be moved or copied.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.results import aside

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


@dataclass
class Manifest:
    """What an artifact is and where it came from.

    files: relative path -> {"bytes", "sha256"}. inputs: role -> fingerprint of the artifact or file that was read.
    details: what the kind adds (a shard spec, model geometry, scores). created_at: UTC, ISO 8601, set by `seal`.
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

    @property
    def fingerprint(self) -> str:
        """Hash of what the artifact is made of; creation time and commit do not enter."""
        return digest([self.kind, self.config, self.inputs, self.details, self.files])

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


def fingerprint_inside(where: Path) -> str | None:
    """The fingerprint of an artifact or of something in one; None for what is in none."""
    for directory in (where, *where.parents):
        if (directory / MANIFEST).is_file():
            return digest([Manifest.load(directory).fingerprint, where.relative_to(directory).as_posix()])
    return None


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    write_text_atomic(directory / MANIFEST, json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n")


@contextmanager
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
    """Check every file of an artifact against its manifest; UserError names the first that differs."""
    directory = Path(directory)
    manifest = Manifest.load(directory)
    for name, facts in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise UserError(f"{directory} lacks {name}, which its manifest lists; run the stage that made it again")
        if path.stat().st_size != facts["bytes"] or hash_file(path) != facts["sha256"]:
            raise UserError(f"{path} differs from its manifest; run the stage that made it again")
    return manifest
