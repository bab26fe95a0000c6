"""The models to download: where they are, which of their files are needed for what, and their sizes. No torch."""

import math
from dataclasses import dataclass

from nexus_gen.parts.models import RELEASED, RELEASED_LANGUAGE, RELEASED_VISION
from nexus_gen.specs.errors import UserError, nearest
from nexus_gen.specs.geometry import FluxGeometry, ProjectorGeometry, VaeGeometry
from nexus_gen.tensors.layouts import ADDED_KEYS
from nexus_gen.tensors.tensor_shapes import (
    Shapes,
    autoregressive_shapes,
    editing_decoder_shapes,
    flux_shapes,
    generation_decoder_shapes,
    vae_shapes,
)

SOURCES = ("modelscope", "huggingface")
TEXT_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "processor/*")


@dataclass(frozen=True)
class Part:
    """Files of a model that are needed together. num_bytes: to one part in a hundred. users: stages and commands."""

    name: str
    patterns: tuple[str, ...]
    num_bytes: int
    users: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """A repository. gated: Hugging Face hands it out after its licence was accepted there."""

    name: str
    modelscope: str
    huggingface: str
    parts: tuple[Part, ...]
    gated: bool = False

    def repository(self, source: str) -> str:
        return self.modelscope if source == "modelscope" else self.huggingface


def stored(shapes: Shapes, item_bytes: int = 2) -> int:
    """Bytes of these tensors; bfloat16 unless said otherwise."""
    return item_bytes * sum(math.prod(shape) for shape in shapes.values())


def models() -> tuple[Model, ...]:
    """Everything that the stages and commands start from, sizes by the released geometry."""
    released = RELEASED["editing_decoder"]
    flux = FluxGeometry(**released["transformer"])
    projector = ProjectorGeometry(**released["projector"])
    language = autoregressive_shapes(RELEASED_VISION, RELEASED_LANGUAGE)
    plain = {key: shape for key, shape in language.items() if key not in ADDED_KEYS}
    decoders = {
        "generation_decoder": generation_decoder_shapes(flux, released["embed_dim"]),
        "edit_decoder": editing_decoder_shapes(flux, projector),
    }
    return (
        Model(
            "Nexus-GenV2",
            "DiffSynth-Studio/Nexus-GenV2",
            "modelscope/Nexus-GenV2",
            (
                Part(
                    "autoregressive",
                    ("model*.safetensors", *TEXT_FILES),
                    stored(language),
                    ("understand", "generate", "edit"),
                ),
                Part(
                    "generation_decoder",
                    ("generation_decoder.bin",),
                    stored(decoders["generation_decoder"]),
                    ("generate",),
                ),
                Part("edit_decoder", ("edit_decoder.bin",), stored(decoders["edit_decoder"]), ("edit",)),
            ),
        ),
        Model(
            "Qwen2.5-VL-7B-Instruct",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            (
                Part(
                    "all",
                    ("model*.safetensors", *TEXT_FILES),
                    stored(plain),
                    ("pretrain", "embed_generation", "editing_decoder"),
                ),
            ),
        ),
        Model(
            "FLUX.1-dev",
            "black-forest-labs/FLUX.1-dev",
            "black-forest-labs/FLUX.1-dev",
            (
                Part(
                    "transformer",
                    ("flux1-dev.safetensors",),
                    stored(flux_shapes(flux)),
                    ("generation_decoder", "editing_decoder"),
                ),
                Part(
                    "autoencoder",
                    ("ae.safetensors",),
                    stored(vae_shapes(VaeGeometry(**released["vae"])), item_bytes=4),
                    ("embed_generation", "embed_editing", "generate", "edit"),
                ),
                Part(
                    "text_encoders",  # CLIP and T5
                    ("model_index.json", "text_encoder*/*", "tokenizer*/*"),
                    246_144_352 + 9_524_648_584,
                    ("generation_decoder", "editing_decoder", "generate", "edit"),
                ),
            ),
            gated=True,
        ),
    )


def select(what: list[str]) -> list[tuple[Model, tuple[Part, ...]]]:
    """The models and parts that names mean: a model, one of its parts as MODEL/PART, or a stage or command.

    No name means everything. Raises UserError for a name that means nothing.
    """
    available = models()
    names: set[str] = set()
    for model in available:
        names |= {model.name, *(f"{model.name}/{part.name}" for part in model.parts)}
        names |= {user for part in model.parts for user in part.users}
    for name in what:
        if name not in names:
            raise UserError(f"nothing to download is called {name}{nearest(name, names)}")
    wanted = set(what)
    chosen = []
    for model in available:
        parts = tuple(
            part
            for part in model.parts
            if not wanted or wanted & {model.name, f"{model.name}/{part.name}", *part.users}
        )
        if parts:
            chosen.append((model, parts))
    return chosen
