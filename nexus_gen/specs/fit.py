"""Whether what headers say of a model fits its config or geometry. No torch.

Shapes are those of a file, by its tensors' plain names.
"""

from collections.abc import Mapping
from pathlib import Path

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import VaeGeometry
from nexus_gen.specs.kinds import TITLES, require_kind
from nexus_gen.specs.layouts import Shape, vae_sources
from nexus_gen.specs.shapes import Differences, Weights, differences, read_config, recognise, vae_shapes


def require_autoregressive(directory: Path, shapes: Mapping[str, Shape]) -> Weights:
    """What a checkpoint's headers say; UserError when they do not fit its config.json."""
    weights = recognise(shapes, directory, read_config(directory))
    if weights.kind != "autoregressive":
        raise UserError(f"{directory} holds a {TITLES[weights.kind]}; give the directory of a Qwen2.5-VL model")
    problems = weights.differences.sentences()
    if problems:
        raise UserError(
            f"the weights in {directory} do not fit its config.json: {', '.join(problems)}; copy them again"
        )
    return weights


def require_vae(path: Path, file: Mapping[str, Shape], geometry: VaeGeometry) -> None:
    """UserError unless the file is an autoencoder of this geometry."""
    shapes = vae_shapes(geometry)
    layout = require_kind(file, path, "vae")
    found = differences(file, shapes, vae_sources(shapes, geometry, layout))
    require_same(path, found, "give the FLUX.1-dev directory that belongs to this geometry")


def require_same(path: Path, found: Differences, remedy: str) -> None:
    if problems := found.sentences():
        raise UserError(f"{path} does not fit: {', '.join(problems)}; {remedy}")
