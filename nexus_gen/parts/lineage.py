"""Where the models of a run come from and what they score, read from manifests."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_gen.artifacts.artifact import MANIFEST, Manifest, fingerprint_path
from nexus_gen.artifacts.content import Contents
from nexus_gen.parts.models import DECODER_KINDS, ModelPaths
from nexus_gen.specs.errors import UserError

log = logging.getLogger(__name__)


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


def flux_of_all(paths: Mapping[str | None, ModelPaths]) -> Path | None:
    """The FLUX directory that decoders paint with; None where there is no decoder."""
    return next((found.flux for found in paths.values() if found.flux is not None), None)


def manifest_beside(path: Path) -> Manifest | None:
    """The manifest of the artifact that a checkpoint is, or is a file of."""
    for directory in (path, path.parent):
        if (directory / MANIFEST).is_file():
            return Manifest.load(directory)
    return None


def evaluations_of(
    run: Path, parts: list[Part], flux: Path | None = None, contents: Contents | None = None
) -> tuple[list[Evaluation], list[Path]]:
    """The evaluations in a run that are of these parts, and the directories of those that are of others by now.

    flux: where the autoencoder is; what painted with another one is not of these. contents: the memory of what files
    hold. Weights that are not as their manifest says have no evaluation.
    """
    contents = contents or Contents()
    paths = {part.role: part.path for part in parts} | ({"flux": flux} if flux is not None else {})
    ours: dict[str, str | None] = {}
    current, stale = [], []
    for file in sorted(run.glob(f"evaluation/*/{MANIFEST}")):
        manifest = Manifest.load(file.parent)
        if manifest.kind != "evaluation":
            continue
        roles = manifest.inputs.keys() & {"autoregressive", *DECODER_KINDS, *(["flux"] if flux is not None else [])}
        for role in roles & paths.keys() - ours.keys():
            ours[role] = _fingerprint_of(paths[role], contents)
        if all(manifest.inputs[role] == ours.get(role) for role in roles):
            current.append(Evaluation(manifest.config["split"], file.parent, manifest.details["scores"]))
        else:
            stale.append(file.parent)
    return current, stale


def _fingerprint_of(path: Path, contents: Contents) -> str | None:
    try:
        return fingerprint_path(path, contents)
    except UserError as error:
        log.warning("%s", error)
        return None
