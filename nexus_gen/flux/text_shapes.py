"""The shape of every tensor of FLUX's two text encoders, from a config.json, and what a file holds of them. No torch.

Keys are those of transformers' CLIPTextModel and T5EncoderModel in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.kinds import TextEncoder
from nexus_gen.tensors.layouts import Shape, Source, Sources
from nexus_gen.tensors.tensor_shapes import Differences, Shapes, differences, linear, norm

FOLDERS: dict[TextEncoder, tuple[str, str]] = {  # of a FLUX.1-dev directory: weights, tokenizer
    "CLIP": ("text_encoder", "tokenizer"),
    "T5": ("text_encoder_2", "tokenizer_2"),
}
CLIP_PREFIX = "text_model."  # in published files; transformers has none in memory since 5
WORDS, TIED_WORDS = "shared.weight", "encoder.embed_tokens.weight"  # T5's one embedding under both its names


@dataclass(frozen=True)
class TextWeights:
    """What a file holds of a text encoder. sources: by the keys in memory. width: of what it puts out.

    repeated: (name, name) of tensors that have to be equal, one of which is read.
    """

    sources: Sources
    width: int
    differences: Differences
    repeated: tuple[tuple[str, str], ...] = ()


def clip_shapes(config: Mapping[str, Any]) -> Shapes:
    """Of a CLIPTextModel. Raises KeyError for a field that config lacks."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= linear(f"{layer}.mlp.fc1", inner, width) | linear(f"{layer}.mlp.fc2", width, inner)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
    return shapes | norm("final_layer_norm", width)


def t5_shapes(config: Mapping[str, Any]) -> Shapes:
    """Of a T5EncoderModel. Raises KeyError for a field that config lacks."""
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    attention = heads * config["d_kv"]
    first = ("wi_0", "wi_1") if config["feed_forward_proj"].startswith("gated-") else ("wi",)
    shapes: Shapes = {WORDS: (config["vocab_size"], width)}
    for index in range(config["num_layers"]):
        block = f"encoder.block.{index}"
        for name in "qkv":
            shapes |= linear(f"{block}.layer.0.SelfAttention.{name}", attention, width, bias=False)
        shapes |= linear(f"{block}.layer.0.SelfAttention.o", width, attention, bias=False)
        for name in first:
            shapes |= linear(f"{block}.layer.1.DenseReluDense.{name}", inner, width, bias=False)
        shapes |= linear(f"{block}.layer.1.DenseReluDense.wo", width, inner, bias=False)
        shapes |= {f"{block}.layer.{part}.layer_norm.weight": (width,) for part in (0, 1)}
    distances = config.get("relative_attention_num_buckets", 32), heads
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = distances
    return shapes | {"encoder.final_layer_norm.weight": (width,)}


def text_weights(
    encoder: TextEncoder, file: Mapping[str, Shape], where: Path, config: Mapping[str, Any] | None
) -> TextWeights:
    """What a file holds of an encoder that is sized by `config`.

    Two tensors that are no weights of it are known from published files: CLIP's `position_ids`, the numbers 0 to 76,
    which transformers wrote until 4.30, and T5's embedding under its second name.
    Raises UserError without a config, or with one of something else.
    """
    if config is None:
        raise UserError(f"{where} holds no config.json, which gives the size of {encoder}; download it again")
    try:
        shapes = clip_shapes(config) if encoder == "CLIP" else t5_shapes(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where / 'config.json'} is not that of {encoder} ({error!r}); download it again") from error
    known = dict(file)
    repeated: tuple[tuple[str, str], ...] = ()
    if encoder == "CLIP":
        prefix = CLIP_PREFIX if any(key.startswith(CLIP_PREFIX) for key in file) else ""
        sources = {key: Source((prefix + key,)) for key in shapes}
        positions = config["max_position_embeddings"]
        if known.get(f"{prefix}embeddings.position_ids") in ((1, positions), (positions,)):
            del known[f"{prefix}embeddings.position_ids"]
        width = config["hidden_size"]
    else:
        sources = {key: Source((key,)) for key in shapes}
        if WORDS not in file and TIED_WORDS in file:
            sources[WORDS] = Source((TIED_WORDS,))
        elif known.get(TIED_WORDS) == shapes[WORDS]:
            del known[TIED_WORDS]
            repeated = ((WORDS, TIED_WORDS),)
        width = config["d_model"]
    return TextWeights(sources, width, differences(known, shapes, sources), repeated)
