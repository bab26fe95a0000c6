"""Whether the models of a command are whole and belong together, by headers alone: said before any weight is read.

Torch is imported for `.bin` files only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_gen.flux.text_shapes import FOLDERS, text_weights
from nexus_gen.language.processor_files import require_processor
from nexus_gen.parts.inspection import headers_of
from nexus_gen.parts.models import RELEASED, ModelPaths
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import FluxGeometry, ProjectorGeometry, VaeGeometry
from nexus_gen.tensors.fit import require_autoregressive, require_same, require_vae
from nexus_gen.tensors.kinds import TextEncoder, require_kind
from nexus_gen.tensors.layouts import decoder_sources
from nexus_gen.tensors.tensor_shapes import (
    Shapes,
    differences,
    editing_decoder_shapes,
    generation_decoder_shapes,
    read_config,
)
from nexus_gen.tensors.weight_files import flux_part


def require_loadable(paths: ModelPaths, cfg_scale: float | None = 1.0) -> None:
    """UserError unless everything that `paths` names can be loaded as one model.

    cfg_scale: of classifier-free guidance, None for the decoder's own; other than 1 it needs T5, which is otherwise
    checked where it is.
    """
    directory = paths.autoregressive
    weights = require_autoregressive(directory, headers_of(directory).shapes)
    require_processor(directory)
    if paths.decoder_kind is None or paths.decoder is None or paths.flux is None or paths.details is None:
        return
    require_decoder(paths.decoder_kind, paths.decoder, paths.details)
    width, embed_dim = weights.geometry["language"]["hidden_size"], paths.details["embed_dim"]
    if width != embed_dim:
        raise UserError(
            f"{directory} makes embeddings of width {width} and {paths.decoder} paints from width {embed_dim}; give "
            "the language model and the decoder of one run"
        )
    vae = flux_part(paths.flux, "autoencoder")
    require_vae(vae, headers_of(vae).shapes, VaeGeometry(**paths.details["vae"]))
    flux = paths.details["transformer"]
    require_text_encoder("CLIP", paths.flux, flux["pooled_dim"])
    scale = paths.details["sampling"]["cfg_scale"] if cfg_scale is None else cfg_scale
    if scale != 1 or (paths.flux / FOLDERS["T5"][0]).is_dir():
        require_text_encoder("T5", paths.flux, flux["context_dim"])


def require_decoder(kind: str, path: Path, details: Mapping[str, Any]) -> None:
    """UserError unless the file is a decoder of this kind and of the geometry in `details`."""
    flux = FluxGeometry(**details["transformer"])
    shapes: Shapes
    if kind == "generation_decoder":
        shapes = generation_decoder_shapes(flux, details["embed_dim"])
    else:
        shapes = editing_decoder_shapes(flux, ProjectorGeometry(**details["projector"]))
    file = headers_of(path).shapes
    layout = require_kind(file, path, kind)
    remedy = (
        "it has no manifest beside it and is not the released one: give the artifact that it was trained into"
        if details is RELEASED[kind]
        else "it is not the decoder of its manifest: copy the artifact again"
    )
    require_same(path, differences(file, shapes, decoder_sources(shapes, layout)), remedy)


def require_text_encoder(encoder: TextEncoder, flux_dir: Path, width: int) -> None:
    """width: of its output, as the decoder takes it."""
    path = flux_dir / FOLDERS[encoder][0]
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a FLUX.1-dev directory with its text encoders and tokenizers")
    weights = text_weights(encoder, headers_of(path).shapes, path, read_config(path))
    require_same(path, weights.differences, "download it again")
    if weights.width != width:
        raise UserError(
            f"{path} is {weights.width} wide and the decoder takes {width}; give the FLUX.1-dev directory that the "
            "decoder was trained with"
        )
