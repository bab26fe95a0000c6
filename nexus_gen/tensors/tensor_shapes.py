"""The shape of every tensor from a model's geometry, and the geometry from the shapes in a file. No torch.

Keys are ours, those of the modules' state dicts; `nexus_gen.tensors.layouts` translates them. Shapes do not say
everything: how wide an attention head of the autoregressive model is, FLUX's rotary axes and the VAE's norm groups
leave no trace in them.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import (
    MERGE_SIZE,
    RELEASED_TARGET_TOKENS,
    FluxGeometry,
    LanguageGeometry,
    ProjectorGeometry,
    VaeGeometry,
    VisionGeometry,
)
from nexus_gen.tensors.kinds import NAMED_KEYS, kind_of, titled
from nexus_gen.tensors.layouts import (
    ADDED_KEYS,
    PREFILL_KEY,
    RELEASED_PREFIX,
    Kind,
    Layout,
    Shape,
    Sources,
    autoregressive_sources,
    decoder_sources,
    flux_sources,
    vae_sources,
)
from nexus_gen.tensors.names import UNQUANTISED

Shapes = dict[str, Shape]
TIMESTEP_FREQUENCIES = 256  # sinusoids of FLUX's timestep and guidance
PATCH_AREA = 4  # latent elements of one FLUX token
EXPANSION = 4  # hidden width of the editing projector's head, in context widths
PATCH_CHANNELS, TEMPORAL_PATCH = 3, 2  # of Qwen2.5-VL's patches


# ---- shapes from geometry -------------------------------------------------------------------------------------------


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, rows: int, columns: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (rows, columns, kernel, kernel), f"{name}.bias": (rows,)}


def flux_shapes(geometry: FluxGeometry) -> Shapes:
    """Of a FluxTransformer."""
    width, head = geometry.hidden_size, geometry.hidden_size // geometry.num_heads
    patch = geometry.latent_channels * PATCH_AREA
    shapes: Shapes = {}
    for embedder in ("time_embedder", "guidance_embedder"):
        shapes |= linear(f"{embedder}.timestep_embedder.0", width, TIMESTEP_FREQUENCIES)
        shapes |= linear(f"{embedder}.timestep_embedder.2", width, width)
    shapes |= linear("pooled_text_embedder.0", width, geometry.pooled_dim)
    shapes |= linear("pooled_text_embedder.2", width, width)
    shapes |= linear("context_embedder", width, geometry.context_dim)
    shapes |= linear("x_embedder", width, patch)
    for index in range(geometry.num_joint_blocks):
        block = f"blocks.{index}"
        for side in "ab":
            shapes |= linear(f"{block}.norm1_{side}.linear", 6 * width, width)
            shapes |= linear(f"{block}.attn.{side}_to_qkv", 3 * width, width)
            shapes |= linear(f"{block}.attn.{side}_to_out", width, width)
            shapes |= {f"{block}.attn.norm_{part}_{side}.weight": (head,) for part in "qk"}
            shapes |= linear(f"{block}.ff_{side}.0", 4 * width, width)
            shapes |= linear(f"{block}.ff_{side}.2", width, 4 * width)
    for index in range(geometry.num_single_blocks):
        block = f"single_blocks.{index}"
        shapes |= linear(f"{block}.norm.linear", 3 * width, width)
        shapes |= linear(f"{block}.to_qkv_mlp", 7 * width, width)
        shapes |= linear(f"{block}.proj_out", width, 5 * width)
        shapes |= {f"{block}.norm_{part}_a.weight": (head,) for part in "qk"}
    shapes |= linear("final_norm_out.linear", 2 * width, width)
    return shapes | linear("final_proj_out", patch, width)


def vae_shapes(geometry: VaeGeometry) -> Shapes:
    """Of a FluxVae."""

    def residual(name: str, before: int, after: int) -> Shapes:
        shapes = norm(f"{name}.norm1", before) | conv(f"{name}.conv1", after, before)
        shapes |= norm(f"{name}.norm2", after) | conv(f"{name}.conv2", after, after)
        return shapes if before == after else shapes | conv(f"{name}.conv_shortcut", after, before, 1)

    def middle(name: Callable[[int], str], width: int, first: int) -> Shapes:
        shapes = residual(name(first), width, width) | norm(f"{name(first + 1)}.norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out"):
            shapes |= conv(f"{name(first + 1)}.transformer_blocks.0.{part}", width, width, 1)
        return shapes | residual(name(first + 2), width, width)

    def half(side: str, channels: list[int], num_blocks: int, first: int) -> tuple[Shapes, int]:
        shapes: Shapes = {}
        width = channels[0]
        for level, after in enumerate(channels):
            for _ in range(num_blocks):
                shapes |= residual(f"{side}.blocks.{first}", width, after)
                width, first = after, first + 1
            if level < len(channels) - 1:
                shapes |= conv(f"{side}.blocks.{first}.conv", width, width)
                first += 1
        return shapes, first

    channels, latent = geometry.channels, geometry.latent_channels
    shapes = conv("encoder.conv_in", channels[0], 3)
    down, next_block = half("encoder", channels, geometry.num_res_blocks, 0)
    shapes |= down | middle("encoder.blocks.{}".format, channels[-1], next_block)
    shapes |= norm("encoder.conv_norm_out", channels[-1]) | conv("encoder.conv_out", 2 * latent, channels[-1])
    shapes |= conv("decoder.conv_in", channels[-1], latent) | middle("decoder.blocks.{}".format, channels[-1], 0)
    up, _ = half("decoder", channels[::-1], geometry.num_res_blocks + 1, 3)
    return shapes | up | norm("decoder.conv_norm_out", channels[0]) | conv("decoder.conv_out", 3, channels[0])


def generation_decoder_shapes(geometry: FluxGeometry, embed_dim: int) -> Shapes:
    """Of a GenerationDecoder."""
    width = geometry.context_dim
    adapter = linear("adapter.0", width, embed_dim) | norm("adapter.1", width)
    adapter |= linear("adapter.3", width, width) | norm("adapter.4", width)
    return {f"transformer.{key}": shape for key, shape in flux_shapes(geometry).items()} | adapter


def editing_decoder_shapes(geometry: FluxGeometry, projector: ProjectorGeometry) -> Shapes:
    """Of an EditingDecoder."""
    width, hidden = geometry.context_dim, projector.hidden_size
    merger = language_layer("embedding_merger.layers.0", projector)
    merger |= {"embedding_merger.projector.0.weight": (hidden,)}
    merger |= linear("embedding_merger.projector.1", EXPANSION * width, hidden)
    merger |= {"embedding_merger.projector.2.weight": (EXPANSION * width,)}
    merger |= linear("embedding_merger.projector.4", width, EXPANSION * width)
    merger |= {"embedding_merger.projector.5.weight": (width,)}
    return {f"transformer.{key}": shape for key, shape in flux_shapes(geometry).items()} | merger


def language_layer(name: str, geometry: LanguageGeometry | ProjectorGeometry) -> Shapes:
    """Of one Qwen2.5 decoder layer."""
    width, inner = geometry.hidden_size, geometry.intermediate_size
    narrow = width // geometry.num_heads * geometry.num_key_value_heads
    shapes = linear(f"{name}.self_attn.q_proj", width, width)
    shapes |= linear(f"{name}.self_attn.k_proj", narrow, width) | linear(f"{name}.self_attn.v_proj", narrow, width)
    shapes |= linear(f"{name}.self_attn.o_proj", width, width, bias=False)
    shapes |= linear(f"{name}.mlp.gate_proj", inner, width, bias=False)
    shapes |= linear(f"{name}.mlp.up_proj", inner, width, bias=False)
    shapes |= linear(f"{name}.mlp.down_proj", width, inner, bias=False)
    return shapes | {f"{name}.{place}_layernorm.weight": (width,) for place in ("input", "post_attention")}


def autoregressive_shapes(
    vision: VisionGeometry, language: LanguageGeometry, num_target_tokens: int = RELEASED_TARGET_TOKENS
) -> Shapes:
    """Of the autoregressive model; a plain Qwen2.5-VL lacks ADDED_KEYS."""
    width, tower = language.hidden_size, vision.hidden_size
    patch = (PATCH_CHANNELS, TEMPORAL_PATCH, vision.patch_size, vision.patch_size)
    shapes: Shapes = {"model.visual.patch_embed.proj.weight": (tower, *patch)}
    for index in range(vision.depth):
        block = f"model.visual.blocks.{index}"
        shapes |= {f"{block}.norm{number}.weight": (tower,) for number in (1, 2)}
        shapes |= linear(f"{block}.attn.qkv", 3 * tower, tower) | linear(f"{block}.attn.proj", tower, tower)
        shapes |= linear(f"{block}.mlp.gate_proj", vision.intermediate_size, tower)
        shapes |= linear(f"{block}.mlp.up_proj", vision.intermediate_size, tower)
        shapes |= linear(f"{block}.mlp.down_proj", tower, vision.intermediate_size)
    merged = tower * MERGE_SIZE**2
    shapes |= {"model.visual.merger.ln_q.weight": (tower,)}
    shapes |= linear("model.visual.merger.mlp.0", merged, merged) | linear("model.visual.merger.mlp.2", width, merged)
    shapes |= {"model.language_model.embed_tokens.weight": (language.vocab_size, width)}
    for index in range(language.num_layers):
        shapes |= language_layer(f"model.language_model.layers.{index}", language)
    shapes |= {"model.language_model.norm.weight": (width,), "lm_head.weight": (language.vocab_size, width)}
    return shapes | dict(zip(ADDED_KEYS, ((width, width), (num_target_tokens, width)), strict=True))


# ---- geometry from shapes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Differences:
    """In what a file differs from what it should hold. misshapen: `KEY is SHAPE instead of SHAPE`."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def sentences(self, limit: int | None = NAMED_KEYS) -> list[str]:
        """`3 missing keys (a, b, c)` and so on, the first `limit` of them by name; None names all."""
        return [
            f"{len(keys)} {what} {'key' if len(keys) == 1 else 'keys'} ({', '.join(keys[:limit])}"
            + (", ...)" if limit is not None and len(keys) > limit else ")")
            for what, keys in vars(self).items()
            if keys
        ]


def differences(file: Mapping[str, Shape], shapes: Shapes, sources: Sources) -> Differences:
    """How a file differs from one that holds `shapes`, by our keys, as `sources` say."""
    missing, misshapen = [], []
    for key, source in sources.items():
        for name, shape in zip(source.keys, source.shapes(shapes[key]), strict=True):
            if name not in file:
                missing.append(name)
            elif file[name] != shape:
                misshapen.append(f"{name} is {file[name]} instead of {shape}")
    unexpected = sorted(file.keys() - {name for source in sources.values() for name in source.keys})
    return Differences(missing, unexpected, misshapen)


@dataclass(frozen=True)
class Weights:
    """What a file's tensors are. geometry: as far as shapes and a config.json tell. shapes, sources: by our keys."""

    kind: Kind
    layout: Layout
    geometry: dict[str, Any]
    shapes: Shapes
    sources: Sources
    differences: Differences


def recognise(file: Mapping[str, Shape], where: Path, config: dict[str, Any] | None = None) -> Weights:
    """What a file's tensors are, by their names and shapes.

    config: the config.json of an autoregressive model, which alone says how its attention is divided.
    Raises UserError when they are of no known kind, or lack what their geometry is read from.
    """
    kind, layout = kind_of(file, where)
    try:
        geometry, shapes, sources = measure(file, kind, layout, config)
    except KeyError as error:
        what = "key" if kind != "autoregressive" else "config field or key"
        raise UserError(
            f"{where} holds keys of {titled(kind)} and lacks the {what} {error}, by which its size is known; give "
            "the whole model"
        ) from error
    except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        what = "shapes" if kind != "autoregressive" else "a config.json or shapes"
        raise UserError(
            f"{where} holds keys of {titled(kind)} and {what} that fit none ({error}); download it again"
        ) from error
    return Weights(kind, layout, geometry, shapes, sources, differences(file, shapes, sources))


def measure(
    file: Mapping[str, Shape], kind: Kind, layout: Layout, config: dict[str, Any] | None
) -> tuple[dict[str, Any], Shapes, Sources]:
    """(geometry, our shapes, sources) of a file of known kind. Raises KeyError naming what it lacks."""
    if kind == "autoregressive":
        if config is None:
            raise KeyError("config.json")
        vision, language = autoregressive_geometry(config)
        num_target_tokens = target_tokens(file)
        shapes = autoregressive_shapes(vision, language, num_target_tokens or RELEASED_TARGET_TOKENS)
        sources = autoregressive_sources(shapes, layout)
        # A plain Qwen2.5-VL is whole without the two, and a tied one without a head.
        optional = set() if any(key in file for key in ADDED_KEYS) else set(ADDED_KEYS)
        if config.get("tie_word_embeddings") and "lm_head.weight" not in file:
            optional.add("lm_head.weight")
        shapes = {key: shape for key, shape in shapes.items() if key not in optional}
        sources = {key: sources[key] for key in shapes}
        geometry: dict[str, Any] = {"vision": vars(vision), "language": vars(language)}
        if num_target_tokens is not None:
            geometry["target"] = {"tokens": num_target_tokens}
        return geometry, shapes, sources
    if kind == "vae":
        vae = vae_geometry(file, layout)
        shapes = vae_shapes(vae)
        known = {"channels": vae.channels, "num_res_blocks": vae.num_res_blocks, "latent_channels": vae.latent_channels}
        return {"vae": known}, shapes, vae_sources(shapes, vae, layout)
    if kind == "flux":
        flux = flux_geometry(file, lambda key: flux_sources([key], layout)[key].keys[0], layout, "")
        shapes = flux_shapes(flux)
        return {"transformer": known_of(flux)}, shapes, flux_sources(shapes, layout)

    prefix = RELEASED_PREFIX if layout == "released" else "transformer."
    flux = flux_geometry(file, lambda key: prefix + key, "nexus-gen", prefix)
    if kind == "generation_decoder":
        embed_dim = file["adapter.0.weight"][1]
        shapes = generation_decoder_shapes(flux, embed_dim)
        geometry = {"transformer": known_of(flux), "embed_dim": embed_dim}
    else:
        inner, hidden = file["embedding_merger.layers.0.mlp.gate_proj.weight"]
        narrow = file["embedding_merger.layers.0.self_attn.k_proj.weight"][0]
        # Shapes tell the width of all key-value heads together; as one head of that width they come out the same.
        projector = ProjectorGeometry(hidden, inner, hidden // narrow, 1, [], 1e6, 1e-6)
        shapes = editing_decoder_shapes(flux, projector)
        merger = {"hidden_size": hidden, "intermediate_size": inner}
        geometry = {"transformer": known_of(flux), "embed_dim": hidden, "projector": merger}
    return geometry, shapes, decoder_sources(shapes, layout)


def target_tokens(file: Mapping[str, Shape]) -> int | None:
    """How many tokens a target image of an autoregressive model has: one for each of its prefill embeddings.

    None where the file has none, as a plain Qwen2.5-VL, or as many as make no square, which is a broken file.
    """
    rows = file.get(PREFILL_KEY, (0,))[0]
    return rows if rows and math.isqrt(rows) ** 2 == rows else None


def flux_geometry(
    file: Mapping[str, Shape], name_of: Callable[[str], str], layout: Layout, prefix: str
) -> FluxGeometry:
    """FLUX's geometry without its rotary axes. name_of: our key -> the file's."""
    width, patch = file[name_of("x_embedder.weight")]
    joint = {"bfl": "double_blocks", "diffusers": "transformer_blocks"}.get(layout, "blocks")
    single = "single_transformer_blocks" if layout == "diffusers" else "single_blocks"
    return FluxGeometry(
        hidden_size=width,
        num_heads=width // file[name_of("blocks.0.attn.norm_q_a.weight")][0],
        num_joint_blocks=count(file, f"{prefix}{joint}."),
        num_single_blocks=count(file, f"{prefix}{single}."),
        context_dim=file[name_of("context_embedder.weight")][1],
        pooled_dim=file[name_of("pooled_text_embedder.0.weight")][1],
        rope_axes_dim=[],
        latent_channels=patch // PATCH_AREA,
        patch_size=2,
    )


def known_of(geometry: FluxGeometry) -> dict[str, Any]:
    return {name: value for name, value in vars(geometry).items() if name != "rope_axes_dim"}


def count(keys: Mapping[str, Any], prefix: str) -> int:
    """How many blocks `<prefix>0.`, `<prefix>1.`, ... the keys reach to."""
    numbers = (key.removeprefix(prefix).partition(".")[0] for key in keys if key.startswith(prefix))
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def vae_geometry(file: Mapping[str, Shape], layout: Layout) -> VaeGeometry:
    """The autoencoder's geometry; norm groups are unknown, so 1."""
    if layout == "nexus-gen":
        levels: list[list[int]] = [[]]
        for index in range(count(file, "encoder.blocks.")):
            block = f"encoder.blocks.{index}"
            if f"{block}.conv.weight" in file:
                levels.append([])
            elif f"{block}.conv1.weight" in file:
                levels[-1].append(file[f"{block}.conv1.weight"][0])
        levels[-1] = levels[-1][:-2]  # what follows the last level: the middle's two
    else:
        down, block = ("down", "block") if layout == "bfl" else ("down_blocks", "resnets")
        levels = []
        for level in range(count(file, f"encoder.{down}.")):
            prefix = f"encoder.{down}.{level}.{block}."
            levels.append([file[f"{prefix}{index}.conv1.weight"][0] for index in range(count(file, prefix))])
    return VaeGeometry(
        channels=[level[0] for level in levels if level] or [file["encoder.conv_in.weight"][0]],
        num_res_blocks=len(levels[0]),
        norm_groups=1,
        latent_channels=file["decoder.conv_in.weight"][1],
    )


def autoregressive_geometry(config: dict[str, Any]) -> tuple[VisionGeometry, LanguageGeometry]:
    """From a config.json, flat as released or nested as transformers writes it since 4.52. Raises KeyError."""
    text, tower = config.get("text_config") or config, config["vision_config"]
    rope = text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}
    vision = VisionGeometry(
        patch_size=tower["patch_size"],
        hidden_size=tower["hidden_size"],
        intermediate_size=tower["intermediate_size"],
        depth=tower["depth"],
        num_heads=tower["num_heads"],
        window_size=tower["window_size"],
        fullatt_block_indexes=list(tower["fullatt_block_indexes"]),
    )
    language = LanguageGeometry(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_key_value_heads"],
        mrope_section=list(rope["mrope_section"]),
        rope_theta=rope["rope_theta"],
        rms_norm_eps=text["rms_norm_eps"],
    )
    return vision, language


def read_config(directory: Path) -> dict[str, Any] | None:
    """A directory's config.json, None where there is none; UserError when it is unreadable or of quantised weights."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object; copy it again")
    how = config.get("quantization_config") or config.get("compression_config")
    if how:
        method = how.get("quant_method") if isinstance(how, dict) else how
        raise UserError(f"{path} says that the weights are quantised ({method}), which is not read here; {UNQUANTISED}")
    return config
