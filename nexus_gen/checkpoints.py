"""Layouts on disk of FLUX's transformer, its autoencoder and the released decoders, and the way to ours and back.

| layout | files | differs from ours in |
|---|---|---|
| bfl | `flux1-dev.safetensors`, `ae.safetensors` | names |
| diffusers | `transformer/`, `vae/` | names, separate q, k, v and MLP, (scale, shift), matrices for 1 x 1 kernels |
| released | `generation_decoder.*`, `edit_decoder.*` | the prefix `pipe.dit.`, (scale, shift) |

Ours are diffsynth's names and its order (shift, scale) in `final_norm_out.linear`. The order has no trace in names or
shapes: a file read in the wrong one loads and paints noise. Every conversion, for any width, is in this module.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nexus_gen.flux import FluxTransformer
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import FluxGeometry, VaeGeometry
from nexus_gen.tensor_files import TensorFiles, save_tensors
from nexus_gen.vae import FluxVae

Layout = Literal["bfl", "diffusers"]
SWAPPED = "final_norm_out.linear."  # the keys that hold (scale, shift) in diffusers' and in released files
RELEASED_PREFIX = "pipe.dit."
NAMED_KEYS = 4  # how many keys an error lists by name


@dataclass(frozen=True)
class Source:
    """How a file holds one of our tensors: as `keys`, joined along dim 0 in proportion to `rows`.

    swap_halves: the file holds the two halves of dim 0 in the other order.
    as_matrix: the file holds a 1 x 1 convolution as a matrix.
    """

    keys: tuple[str, ...]
    rows: tuple[int, ...] = (1,)
    swap_halves: bool = False
    as_matrix: bool = False

    def shapes(self, shape: Iterable[int]) -> list[tuple[int, ...]]:
        """The shapes of the file's tensors for ours of `shape`."""
        height, *rest = shape
        tail = rest[:1] if self.as_matrix else rest
        return [(height * rows // sum(self.rows), *tail) for rows in self.rows]

    def join(self, parts: list[Tensor], shape: Iterable[int]) -> Tensor:
        """Our tensor out of the file's."""
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (swap_halves(tensor) if self.swap_halves else tensor).reshape(tuple(shape))

    def write(self, tensor: Tensor) -> dict[str, Tensor]:
        """The file's tensors out of ours."""
        shapes = self.shapes(tensor.shape)
        tensor = swap_halves(tensor) if self.swap_halves else tensor
        parts = tensor.split([shape[0] for shape in shapes])
        return {key: part.reshape(shape) for key, part, shape in zip(self.keys, parts, shapes, strict=True)}


Sources = dict[str, Source]  # by our key


def swap_halves(tensor: Tensor) -> Tensor:
    """(scale, shift) along dim 0 -> (shift, scale), and back."""
    return torch.cat(tensor.chunk(2)[::-1])


# ---- FLUX's transformer -------------------------------------------------------------------------------------------

FLUX_BFL = {
    "time_embedder.timestep_embedder.0": "time_in.in_layer",
    "time_embedder.timestep_embedder.2": "time_in.out_layer",
    "guidance_embedder.timestep_embedder.0": "guidance_in.in_layer",
    "guidance_embedder.timestep_embedder.2": "guidance_in.out_layer",
    "pooled_text_embedder.0": "vector_in.in_layer",
    "pooled_text_embedder.2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "final_norm_out.linear": "final_layer.adaLN_modulation.1",
    "final_proj_out": "final_layer.linear",
}
JOINT_BFL = {
    f"{ours.format(side)}": f"{stream}_{theirs}"
    for side, stream in (("a", "img"), ("b", "txt"))
    for ours, theirs in {
        "norm1_{}.linear": "mod.lin",
        "attn.{}_to_qkv": "attn.qkv",
        "attn.{}_to_out": "attn.proj",
        "attn.norm_q_{}": "attn.norm.query_norm",
        "attn.norm_k_{}": "attn.norm.key_norm",
        "ff_{}.0": "mlp.0",
        "ff_{}.2": "mlp.2",
    }.items()
}
SINGLE_BFL = {
    "norm.linear": "modulation.lin",
    "to_qkv_mlp": "linear1",
    "proj_out": "linear2",
    "norm_q_a": "norm.query_norm",
    "norm_k_a": "norm.key_norm",
}
FLUX_DIFFUSERS = {
    "time_embedder.timestep_embedder.0": "time_text_embed.timestep_embedder.linear_1",
    "time_embedder.timestep_embedder.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_embedder.timestep_embedder.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_embedder.timestep_embedder.2": "time_text_embed.guidance_embedder.linear_2",
    "pooled_text_embedder.0": "time_text_embed.text_embedder.linear_1",
    "pooled_text_embedder.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "x_embedder": "x_embedder",
    "final_norm_out.linear": "norm_out.linear",
    "final_proj_out": "proj_out",
}
JOINT_DIFFUSERS = {
    "norm1_a.linear": "norm1.linear",
    "norm1_b.linear": "norm1_context.linear",
    "attn.a_to_qkv": "attn.to_q attn.to_k attn.to_v",
    "attn.b_to_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "attn.a_to_out": "attn.to_out.0",
    "attn.b_to_out": "attn.to_add_out",
    "attn.norm_q_a": "attn.norm_q",
    "attn.norm_k_a": "attn.norm_k",
    "attn.norm_q_b": "attn.norm_added_q",
    "attn.norm_k_b": "attn.norm_added_k",
    "ff_a.0": "ff.net.0.proj",
    "ff_a.2": "ff.net.2",
    "ff_b.0": "ff_context.net.0.proj",
    "ff_b.2": "ff_context.net.2",
}
SINGLE_DIFFUSERS = {
    "norm.linear": "norm.linear",
    "to_qkv_mlp": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "proj_out": "proj_out",
    "norm_q_a": "attn.norm_q",
    "norm_k_a": "attn.norm_k",
}
PROPORTIONS = {1: (1,), 3: (1, 1, 1), 4: (1, 1, 1, 4)}  # q, k, v and an MLP four times as wide


def flux_sources(keys: Iterable[str], layout: Layout) -> Sources:
    """Where each key of a FluxTransformer lies in a file of `layout`."""
    tables = {
        "bfl": (FLUX_BFL, JOINT_BFL, SINGLE_BFL, "double_blocks"),
        "diffusers": (FLUX_DIFFUSERS, JOINT_DIFFUSERS, SINGLE_DIFFUSERS, "transformer_blocks"),
    }
    top, joint, single, joint_name = tables[layout]
    single_name = "single_blocks" if layout == "bfl" else "single_transformer_blocks"
    sources: Sources = {}
    for key in keys:
        module, leaf = key.rsplit(".", 1)
        group, _, rest = module.partition(".")
        if group in ("blocks", "single_blocks"):
            index, _, inner = rest.partition(".")
            table, name = (joint, joint_name) if group == "blocks" else (single, single_name)
            theirs = [f"{name}.{index}.{part}" for part in table[inner].split()]
        else:
            theirs = [top[module]]
        if layout == "bfl" and theirs[0].endswith(("query_norm", "key_norm")):
            leaf = "scale"
        sources[key] = Source(
            keys=tuple(f"{part}.{leaf}" for part in theirs),
            rows=PROPORTIONS[len(theirs)],
            swap_halves=layout == "diffusers" and key.startswith(SWAPPED),
        )
    return sources


def load_flux(
    path: str | Path, geometry: FluxGeometry, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> FluxTransformer:
    """FLUX's transformer from a FLUX.1-dev directory, a `transformer/` directory or a file in either layout.

    In a FLUX.1-dev directory `flux1-dev.safetensors` is read, or else `transformer/`.
    Raises UserError when the weights do not fit the geometry exactly.
    """
    files = TensorFiles(component(Path(path), "flux1-dev.safetensors", "transformer"), device)
    layout = detect_layout(files, bfl="double_blocks.", diffusers="transformer_blocks.")
    with torch.device("meta"):
        model = FluxTransformer(geometry)
    load_strictly(model, files, flux_sources(model.state_dict(), layout), dtype)
    return model


def save_flux(model: FluxTransformer, path: str | Path, layout: Layout = "bfl") -> None:
    """Write the transformer as one `.safetensors` or `.bin` file of `layout`."""
    state = model.state_dict()
    save_tensors(translate(state, flux_sources(state, layout)), path)


# ---- FLUX's autoencoder -------------------------------------------------------------------------------------------

VAE_LEAVES_BFL = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "transformer_blocks.0.to_q": "q",
    "transformer_blocks.0.to_k": "k",
    "transformer_blocks.0.to_v": "v",
    "transformer_blocks.0.to_out": "proj_out",
}
VAE_LEAVES_DIFFUSERS = {
    "norm": "group_norm",
    "transformer_blocks.0.to_q": "to_q",
    "transformer_blocks.0.to_k": "to_k",
    "transformer_blocks.0.to_v": "to_v",
    "transformer_blocks.0.to_out": "to_out.0",
}


def vae_blocks(geometry: VaeGeometry, layout: Layout) -> dict[str, list[str]]:
    """The names in `layout` of the entries of `encoder.blocks` and `decoder.blocks`, in order."""
    levels = len(geometry.channels)
    if layout == "bfl":
        middle = ["mid.block_1", "mid.attn_1", "mid.block_2"]
        block, sampler = "{}.{}.block.{}".format, "{}.{}.{}sample".format
    else:
        middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
        block, sampler = "{}_blocks.{}.resnets.{}".format, "{}_blocks.{}.{}samplers.0".format

    def side(way: str, num_blocks: int, numbers: Iterable[int]) -> list[str]:
        names: list[str] = []
        for position, number in enumerate(numbers):
            names += [block(way, number, index) for index in range(num_blocks)]
            if position < levels - 1:
                names.append(sampler(way, number, way))
        return names

    # BFL numbers the decoder's levels by resolution, diffusers by order of execution.
    ascending = range(levels)[::-1] if layout == "bfl" else range(levels)
    return {
        "encoder": side("down", geometry.num_res_blocks, range(levels)) + middle,
        "decoder": middle + side("up", geometry.num_res_blocks + 1, ascending),
    }


def vae_sources(keys: Iterable[str], geometry: VaeGeometry, layout: Layout) -> Sources:
    """Where each key of a FluxVae lies in a file of `layout`."""
    blocks = vae_blocks(geometry, layout)
    leaves = VAE_LEAVES_BFL if layout == "bfl" else VAE_LEAVES_DIFFUSERS
    sources: Sources = {}
    for key in keys:
        module, leaf = key.rsplit(".", 1)
        half, _, inner = module.partition(".")
        prefix = half
        if inner.startswith("blocks."):
            _, index, inner = inner.split(".", 2)
            prefix = f"{half}.{blocks[half][int(index)]}"
        sources[key] = Source(
            keys=(f"{prefix}.{leaves.get(inner, inner)}.{leaf}",),
            as_matrix=layout == "diffusers" and "transformer_blocks" in inner and leaf == "weight",
        )
    return sources


def load_vae(
    path: str | Path, geometry: VaeGeometry, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> FluxVae:
    """FLUX's autoencoder from a FLUX.1-dev directory, a `vae/` directory or a file in either layout.

    In a FLUX.1-dev directory `ae.safetensors` is read, or else `vae/`.
    Raises UserError when the weights do not fit the geometry exactly.
    """
    files = TensorFiles(component(Path(path), "ae.safetensors", "vae"), device)
    layout = detect_layout(files, bfl="encoder.down.", diffusers="encoder.down_blocks.")
    with torch.device("meta"):
        model = FluxVae(geometry)
    load_strictly(model, files, vae_sources(model.state_dict(), geometry, layout), dtype)
    return model


def save_vae(model: FluxVae, path: str | Path, layout: Layout = "bfl") -> None:
    """Write the autoencoder as one `.safetensors` or `.bin` file of `layout`."""
    state = model.state_dict()
    save_tensors(translate(state, vae_sources(state, model.geometry, layout)), path)


# ---- the released decoders ----------------------------------------------------------------------------------------


def decoder_sources(keys: Iterable[str]) -> Sources:
    """Where each key of a GenerationDecoder or EditingDecoder lies in a released file."""
    sources: Sources = {}
    for key in keys:
        inner = key.removeprefix("transformer.")
        released = key if inner == key else RELEASED_PREFIX + inner
        sources[key] = Source((released,), swap_halves=inner.startswith(SWAPPED))
    return sources


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
    load_strictly(model, TensorFiles(path, device), decoder_sources(model.state_dict()), dtype)


def load_decoder_transformer(model: FluxTransformer, path: str | Path, dtype: torch.dtype) -> None:
    """Fill a FLUX transformer, which may be on the meta device, from the transformer inside a decoder's released file.

    Raises UserError when the weights do not fit the model exactly.
    """
    sources = {f"transformer.{key}": key for key in model.state_dict()}
    released = {sources[key]: source for key, source in decoder_sources(sources).items()}
    load_strictly(model, TensorFiles(path), released, dtype, concerns=lambda key: key.startswith(RELEASED_PREFIX))


def save_decoder(model: nn.Module, path: str | Path) -> None:
    """Write a GenerationDecoder or EditingDecoder in the released layout: `.safetensors`, or `.bin` as published."""
    state = model.state_dict()
    save_tensors(translate(state, decoder_sources(state)), path)


# ---- shared -------------------------------------------------------------------------------------------------------


def load_strictly(
    module: nn.Module,
    files: TensorFiles,
    sources: Sources,
    dtype: torch.dtype | None = None,
    concerns: Callable[[str], bool] = lambda key: True,
) -> None:
    """Fill every tensor of `module` from `files`, each once and nothing left over, on the files' device.

    sources: for each key of the module. dtype: None keeps the module's. concerns: which keys of the files are meant.
    Raises UserError naming the keys that are missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    available = {key for key in files if concerns(key)}
    missing, misshapen = [], []
    for key, source in sources.items():
        for name, shape in zip(source.keys, source.shapes(wanted[key].shape), strict=True):
            if name not in available:
                missing.append(name)
            elif files.header(name).shape != shape:
                misshapen.append(f"{name} is {files.header(name).shape} where {shape} is configured")
    unexpected = sorted(available.difference(*(source.keys for source in sources.values())))
    if missing or unexpected or misshapen:
        problems = [
            listed(keys, what)
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
            if keys
        ]
        raise UserError(
            f"{files.path} does not fit the configured {type(module).__name__}: {', '.join(problems)}; "
            "give the file that belongs to this geometry"
        )
    state = {}
    for key, source in sources.items():
        parts = []
        for name in source.keys:
            parts.append(files[name].to(wanted[key].dtype if dtype is None else dtype))
            files.release(name, parts[-1])
        state[key] = source.join(parts, wanted[key].shape)
        for name in source.keys:
            files.release(name, state[key])
    module.load_state_dict(state, strict=True, assign=True)


def listed(keys: list[str], what: str) -> str:
    """`3 missing keys (a, b, c)`, naming the first few."""
    named = ", ".join(keys[:NAMED_KEYS]) + (", ..." if len(keys) > NAMED_KEYS else "")
    return f"{len(keys)} {what} {'key' if len(keys) == 1 else 'keys'} ({named})"


def translate(state: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """Our state dict -> the tensors of a file."""
    tensors: dict[str, Tensor] = {}
    for key, source in sources.items():
        tensors.update(source.write(state[key]))
    return tensors


def component(path: Path, file_name: str, directory_name: str) -> Path:
    """The part of a FLUX.1-dev directory that is asked for, or `path` itself when it is that part already."""
    for candidate in (path / file_name, path / directory_name):
        if candidate.exists():
            return candidate
    return path


def detect_layout(files: TensorFiles, bfl: str, diffusers: str) -> Layout:
    """The layout by the prefixes of its keys; UserError when neither occurs."""
    if any(key.startswith(bfl) for key in files):
        return "bfl"
    if any(key.startswith(diffusers) for key in files):
        return "diffusers"
    raise UserError(f"{files.path} has no keys that start with {bfl} (BFL) or {diffusers} (diffusers)")
