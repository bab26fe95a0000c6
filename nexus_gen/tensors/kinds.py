"""Which model and layout a file's tensors are, by their names; what else they are where they are none. No torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.layouts import Kind, Layout
from nexus_gen.tensors.names import is_lora

NAMED_KEYS = 4  # how many keys a sentence lists by name
TITLES: dict[str, str] = {
    "flux": "FLUX transformer",
    "vae": "FLUX autoencoder",
    "generation_decoder": "generation decoder",
    "editing_decoder": "editing decoder",
    "autoregressive": "autoregressive model",
}
# By the beginnings of keys that only this kind and layout has; the decoders come first, as they contain a transformer.
SIGNS: list[tuple[str, Kind, Layout]] = [
    ("pipe.dit. adapter.", "generation_decoder", "released"),
    ("pipe.dit. embedding_merger.", "editing_decoder", "released"),
    ("transformer. adapter.", "generation_decoder", "nexus-gen"),
    ("transformer. embedding_merger.", "editing_decoder", "nexus-gen"),
    ("double_blocks.", "flux", "bfl"),
    ("transformer_blocks.", "flux", "diffusers"),
    ("single_blocks. final_norm_out.", "flux", "nexus-gen"),
    ("encoder.down.", "vae", "bfl"),
    ("encoder.down_blocks.", "vae", "diffusers"),
    ("encoder.blocks. decoder.blocks.", "vae", "nexus-gen"),
    ("model.language_model.", "autoregressive", "nexus-gen"),
    ("model.layers. model.embed_tokens.", "autoregressive", "released"),
]
TextEncoder = Literal["CLIP", "T5"]
# By a key that every file of FLUX's text encoders has. They are read from their folders of a FLUX.1-dev directory only.
TEXT_SIGNS: dict[str, TextEncoder] = {
    "embeddings.token_embedding.weight": "CLIP",
    "text_model.embeddings.token_embedding.weight": "CLIP",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "T5",
}
# Of checkpoints of whole pipelines in one file, as ComfyUI and its forerunners save them.
PIPELINE_PARTS = (
    "model.diffusion_model.",
    "text_encoders.",
    "vae.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
)


def kind_of(names: Iterable[str], where: Path) -> tuple[Kind, Layout]:
    """The kind and layout of a file with tensors of these names.

    Raises UserError when they are of no known kind, and says what they are where that can be seen.
    """
    names = list(names)
    if is_lora(names):
        raise UserError(
            f"{where} is a LoRA (its keys are {first_of(names)}), which cannot be loaded as a model; merge it into the "
            "model that it was trained on and give the merged weights"
        )
    found = signs_in(names)
    if found is not None:
        return found
    encoder = text_encoder_of(names)
    if encoder is not None:
        raise UserError(
            f"{where} holds a {encoder} text encoder, which is read as it is from the FLUX.1-dev directory that it "
            "belongs to; give the weights of a model here"
        )
    parts = [part for part in PIPELINE_PARTS if any(name.startswith(part) for name in names)]
    if len(parts) > 1:
        raise UserError(
            f"{where} holds several models in one file ({', '.join(parts)}); give the files of the single models, such "
            "as flux1-dev.safetensors and ae.safetensors"
        )
    for prefix, inner in unwrapped(names):
        hidden = signs_in(inner)
        if hidden is not None:
            raise UserError(
                f"all keys of {where} begin with `{prefix}`, and without it they are those of {titled(hidden[0])}; "
                "save the state dict of the module that it names"
            )
    raise UserError(f"{where} holds no model known here; its first keys are {first_of(names) or 'none'}")


def titled(kind: str) -> str:
    """`a FLUX transformer`, `an editing decoder`."""
    return f"a{'n' if TITLES[kind][0] in 'ae' else ''} {TITLES[kind]}"


def require_kind(names: Iterable[str], where: Path, *kinds: str) -> Layout:
    """The layout of a file that must be of one of `kinds`; UserError when it is something else."""
    kind, layout = kind_of(names, where)
    if kind not in kinds:
        wanted = " or ".join(map(titled, kinds))
        raise UserError(f"{where} holds {titled(kind)} where {wanted} is needed")
    return layout


def text_encoder_of(names: Iterable[str]) -> TextEncoder | None:
    """Which of FLUX's text encoders has tensors of these names."""
    return next((TEXT_SIGNS[name] for name in names if name in TEXT_SIGNS), None)


def signs_in(names: Iterable[str]) -> tuple[Kind, Layout] | None:
    prefixes = {key[:end] for key in names for end in range(len(key)) if key[end - 1 : end] == "."}
    signs = ((kind, layout) for sign, kind, layout in SIGNS if all(part in prefixes for part in sign.split()))
    return next(signs, None)


def unwrapped(names: list[str]) -> Iterable[tuple[str, list[str]]]:
    """(beginning, names without it), for each beginning of whole words that all names share, the shortest first."""
    prefix = ""
    while names and (word := names[0].partition(".")[0] + ".") and all(name.startswith(word) for name in names):
        names, prefix = [name.removeprefix(word) for name in names], prefix + word
        yield prefix, names


def first_of(names: list[str]) -> str:
    return ", ".join(names[:NAMED_KEYS])
