"""Weights between files and models: FLUX's transformer, its autoencoder and both decoders, in every layout.

The geometry is given, and what does not fit it exactly is refused by key.
"""

from pathlib import Path

import torch
from torch import nn

from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.flux.vae import FluxVae
from nexus_gen.parts.models import DECODER_KINDS
from nexus_gen.specs.geometry import FluxGeometry, VaeGeometry
from nexus_gen.tensors.files import TensorFiles, save_tensors
from nexus_gen.tensors.fit import require_flux_latents
from nexus_gen.tensors.kinds import require_kind
from nexus_gen.tensors.layouts import (
    RELEASED_PREFIX,
    Layout,
    decoder_sources,
    flux_sources,
    vae_sources,
)
from nexus_gen.tensors.translation import load_strictly, translate
from nexus_gen.tensors.weight_files import flux_part

OURS_PREFIX = "transformer."  # of a decoder's transformer in memory


def load_flux(
    path: str | Path, geometry: FluxGeometry, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> FluxTransformer:
    """FLUX's transformer from a FLUX.1-dev directory, a `transformer/` directory or a file in any layout.

    In a FLUX.1-dev directory `flux1-dev.safetensors` is read, or else `transformer/`.
    Raises UserError when the weights do not fit the geometry exactly.
    """
    files = TensorFiles(flux_part(Path(path), "transformer"), device)
    layout = require_kind(files, files.path, "flux")
    with torch.device("meta"):
        model = FluxTransformer(geometry)
    load_strictly(model, files, flux_sources(model.state_dict(), layout), dtype)
    return model


def save_flux(model: FluxTransformer, path: str | Path, layout: Layout = "bfl") -> None:
    """Write the transformer as one `.safetensors` or `.bin` file of `layout`."""
    state = model.state_dict()
    save_tensors(translate(state, flux_sources(state, layout)), path)


def load_vae(
    path: str | Path, geometry: VaeGeometry, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> FluxVae:
    """FLUX's autoencoder from a FLUX.1-dev directory, a `vae/` directory or a file in any layout.

    In a FLUX.1-dev directory `ae.safetensors` is read, or else `vae/`.
    Raises UserError when the weights do not fit the geometry exactly.
    """
    files = TensorFiles(flux_part(Path(path), "autoencoder"), device)
    layout = require_kind(files, files.path, "vae")
    with torch.device("meta"):
        model = FluxVae(geometry)
    require_flux_latents(files.path)
    load_strictly(model, files, vae_sources(model.state_dict(), geometry, layout), dtype)
    return model


def save_vae(model: FluxVae, path: str | Path, layout: Layout = "bfl") -> None:
    """Write the autoencoder as one `.safetensors` or `.bin` file of `layout`."""
    state = model.state_dict()
    save_tensors(translate(state, vae_sources(state, model.geometry, layout)), path)


def load_decoder(
    model: nn.Module, path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> None:
    """Fill a GenerationDecoder or EditingDecoder, which may be on the meta device, from a released file.

    dtype, device: where the weights go; None keeps those of the model, and the CPU for a model on meta.
    Raises UserError when the weights do not fit the model exactly.
    """
    if device is None:
        device = next(model.parameters()).device
        device = torch.device("cpu") if device.type == "meta" else device
    files = TensorFiles(path, device)
    layout = require_kind(files, files.path, *DECODER_KINDS)
    load_strictly(model, files, decoder_sources(model.state_dict(), layout), dtype)


def load_decoder_transformer(model: FluxTransformer, path: str | Path, dtype: torch.dtype) -> None:
    """Fill a FLUX transformer, which may be on the meta device, from the transformer inside a decoder's released file.

    Raises UserError when the weights do not fit the model exactly.
    """
    files = TensorFiles(path)
    layout = require_kind(files, files.path, *DECODER_KINDS)
    sources = decoder_sources((OURS_PREFIX + key for key in model.state_dict()), layout)
    prefix = OURS_PREFIX if layout == "nexus-gen" else RELEASED_PREFIX
    load_strictly(
        model,
        files,
        {key.removeprefix(OURS_PREFIX): source for key, source in sources.items()},
        dtype,
        concerns=lambda key: key.startswith(prefix),
    )


def save_decoder(model: nn.Module, path: str | Path) -> None:
    """Write a GenerationDecoder or EditingDecoder in the released layout: `.safetensors`, or `.bin` as published."""
    state = model.state_dict()
    save_tensors(translate(state, decoder_sources(state)), path)
