"""Layouts of weights on disk: the names and shapes of every tensor, and how they follow from ours. No torch.

| kind | layout | files | differs from ours in |
|---|---|---|---|
| flux, vae | bfl | `flux1-dev.safetensors`, `ae.safetensors` | names |
| flux, vae | diffusers | `transformer/`, `vae/` | names, separate q, k, v, MLP, (scale, shift), matrices as kernels |
| decoders | released | `generation_decoder.*`, `edit_decoder.*` | the prefix `pipe.dit.`, (scale, shift) |
| autoregressive | released | `model*.safetensors` | names |
| all | nexus-gen | any | nothing |

Ours are the names of the modules in memory: diffsynth's, and its order (shift, scale) in `final_norm_out.linear`. The
order has no trace in names or shapes: a file read in the wrong one loads and paints noise. `translation`
does to tensors what this module says of their names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nexus_gen.specs.geometry import VaeGeometry

Kind = Literal["flux", "vae", "generation_decoder", "editing_decoder", "autoregressive"]
Layout = Literal["bfl", "diffusers", "released", "nexus-gen"]
TARGETS = ("released", "diffusers", "nexus-gen")  # what `models convert --to` takes; released is bfl for FLUX
Shape = tuple[int, ...]
SWAPPED = "final_norm_out.linear."  # the keys that hold (scale, shift) in diffusers' and in released files
RELEASED_PREFIX = "pipe.dit."
PREFILL_KEY = "image_prefill_embeds.weight"  # one embedding for each token of a target image
ADDED_KEYS = ("vision_head.weight", PREFILL_KEY)  # what a plain Qwen2.5-VL lacks


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

    def shapes(self, shape: Iterable[int]) -> list[Shape]:
        """The shapes of the file's tensors for ours of `shape`."""
        height, *rest = shape
        tail = rest[:1] if self.as_matrix else rest
        return [(height * rows // sum(self.rows), *tail) for rows in self.rows]


Sources = dict[str, Source]  # by our key


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
    if layout == "nexus-gen":
        return {key: Source((key,)) for key in keys}
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
    if layout == "nexus-gen":
        return {key: Source((key,)) for key in keys}
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


# ---- the released decoders ----------------------------------------------------------------------------------------


def decoder_sources(keys: Iterable[str], layout: Layout = "released") -> Sources:
    """Where each key of a GenerationDecoder or EditingDecoder lies in a file of `layout`."""
    if layout == "nexus-gen":
        return {key: Source((key,)) for key in keys}
    sources: Sources = {}
    for key in keys:
        inner = key.removeprefix("transformer.")
        released = key if inner == key else RELEASED_PREFIX + inner
        sources[key] = Source((released,), swap_halves=inner.startswith(SWAPPED))
    return sources


# ---- the autoregressive model --------------------------------------------------------------------------------------


def autoregressive_sources(keys: Iterable[str], layout: Layout) -> Sources:
    """Where each key of the autoregressive model lies in a file of `layout`; nexus-gen is transformers' since 4.52."""
    if layout == "nexus-gen":
        return {key: Source((key,)) for key in keys}
    return {
        key: Source((key.replace("model.visual.", "visual.").replace("model.language_model.", "model."),))
        for key in keys
    }
