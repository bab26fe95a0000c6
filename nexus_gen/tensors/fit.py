"""Whether what headers say of a model fits its config or geometry. No torch.

Shapes are those of a file, by its tensors' plain names.
"""

from collections.abc import Mapping
from pathlib import Path

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import LATENT_SCALE, LATENT_SHIFT, VaeGeometry
from nexus_gen.tensors.kinds import require_kind, titled
from nexus_gen.tensors.layouts import Shape, vae_sources
from nexus_gen.tensors.tensor_shapes import Differences, Weights, differences, read_config, recognise, vae_shapes


def require_autoregressive(directory: Path, shapes: Mapping[str, Shape]) -> Weights:
    """What a checkpoint's headers say; UserError when they do not fit its config.json."""
    weights = recognise(shapes, directory, read_config(directory))
    if weights.kind != "autoregressive":
        raise UserError(f"{directory} holds {titled(weights.kind)}; give the directory of a Qwen2.5-VL model")
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
    require_flux_latents(path)


def require_flux_latents(path: Path) -> None:
    """UserError for a folder whose config.json shifts or scales latents otherwise than FLUX: SD3's has its shapes."""
    config = (read_config(path) if path.is_dir() else None) or {}
    for name, ours in (("shift_factor", LATENT_SHIFT), ("scaling_factor", LATENT_SCALE)):
        theirs = config.get(name, ours)
        if theirs != ours:
            raise UserError(
                f"{path / 'config.json'} says {name} {theirs} where FLUX has {ours}: it is the autoencoder of another "
                "model; give FLUX.1-dev's"
            )


def require_same(path: Path, found: Differences, remedy: str) -> None:
    if problems := found.sentences():
        raise UserError(f"{path} does not fit: {', '.join(problems)}; {remedy}")
