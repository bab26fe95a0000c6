"""Where the models of a run come from and what they score, read from manifests."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_gen.specs.artifact import MANIFEST, Manifest, fingerprint_inside
from nexus_gen.specs.models import DECODER_KINDS, ModelPaths


@dataclass(frozen=True)
class Part:
    """One checkpoint that is served. manifest: None for a file that came without one."""

    role: str
    path: Path
    manifest: Manifest | None


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of exactly these models: `scores` as `nexus-gen evaluate` writes them, of the rows of `split`."""

    split: str
    directory: Path
    scores: dict[str, dict[str, Any]]


def parts_of(paths: Mapping[str | None, ModelPaths]) -> list[Part]:
    """The language model and each decoder. paths: those of every decoder kind, or of None for a run that has none."""
    files = {"autoregressive": next(iter(paths.values())).autoregressive}
    files |= {kind: found.decoder for kind, found in paths.items() if kind is not None and found.decoder is not None}
    return [Part(role, path, manifest_beside(path)) for role, path in files.items()]


def manifest_beside(path: Path) -> Manifest | None:
    """The manifest of the artifact that a checkpoint is, or is a file of."""
    for directory in (path, path.parent):
        if (directory / MANIFEST).is_file():
            return Manifest.load(directory)
    return None


def evaluations_of(run: Path, parts: list[Part]) -> tuple[list[Evaluation], list[Path]]:
    """The evaluations in a run that are of these parts, and the directories of those that are of others by now."""
    ours = {part.role: fingerprint_inside(part.path) for part in parts}
    current, stale = [], []
    for file in sorted(run.glob(f"evaluation/*/{MANIFEST}")):
        manifest = Manifest.load(file.parent)
        if manifest.kind != "evaluation":
            continue
        roles = manifest.inputs.keys() & {"autoregressive", *DECODER_KINDS}
        if all(manifest.inputs[role] == ours.get(role) for role in roles):
            current.append(Evaluation(manifest.config["split"], file.parent, manifest.details["scores"]))
        else:
            stale.append(file.parent)
    return current, stale
