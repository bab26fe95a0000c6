"""The full-size models on the meta device against a table of the released files' keys and shapes.

`released_shapes.json` was written down from the released configs and the originals' module lists, in numbers, without
our builders; `{28}` in a key stands for the indices 0 to 27.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from nexus_gen.decoders.decoders import build_editing_decoder, build_generation_decoder
from nexus_gen.language.checkpoint import SpecialTokenIds, build_autoregressive
from nexus_gen.parts.models import RELEASED, RELEASED_LANGUAGE, RELEASED_VISION
from nexus_gen.specs.geometry import FluxGeometry, ProjectorGeometry
from nexus_gen.tensors.layouts import autoregressive_sources, decoder_sources
from nexus_gen.tensors.tensor_shapes import autoregressive_shapes, editing_decoder_shapes, generation_decoder_shapes

ROOT = Path(__file__).parents[3]
TABLE = json.loads((Path(__file__).parent / "released_shapes.json").read_text())
# From the files' own indices where they are published: total_size of Qwen2.5-VL-7B-Instruct is twice its parameters.
QWEN_PARAMETERS = 8_292_166_656
FLUX_PARAMETERS = 11_901_408_320


def released(name: str) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for pattern, shape in TABLE[name].items():
        blocks = re.search(r"\{(\d+)\}", pattern)
        keys = [pattern] if not blocks else [
            pattern.replace(blocks.group(), str(index)) for index in range(int(blocks.group(1)))
        ]  # fmt: skip
        shapes |= dict.fromkeys(keys, tuple(shape))
    return shapes


def in_file(shapes: dict[str, tuple[int, ...]], sources) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for key, source in sources.items()
        for name, shape in zip(source.keys, source.shapes(shapes[key]), strict=True)
    }


def built(name: str) -> torch.nn.Module:
    details = RELEASED["editing_decoder" if name == "edit_decoder" else "generation_decoder"]
    flux = FluxGeometry(**details["transformer"])
    with torch.device("meta"):
        if name == "autoregressive":
            tokens = SpecialTokenIds(151655, 151656, 151652, 151653, end_of_turn=151645, padding=151643)
            return build_autoregressive(RELEASED_VISION, RELEASED_LANGUAGE, tokens, seed=0)
        if name == "generation_decoder":
            return build_generation_decoder(flux, details["embed_dim"])
        return build_editing_decoder(flux, ProjectorGeometry(**details["projector"]))


@pytest.mark.parametrize("name", list(TABLE))
def test_keys_and_shapes_are_the_released_ones(name: str) -> None:
    model = built(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    sources = autoregressive_sources if name == "autoregressive" else decoder_sources
    assert in_file(shapes, sources(shapes, "released")) == released(name)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_headers_are_held_against_is_the_same_table() -> None:
    flux = FluxGeometry(**RELEASED["generation_decoder"]["transformer"])
    projector = ProjectorGeometry(**RELEASED["editing_decoder"]["projector"])
    for name, shapes in (
        ("autoregressive", autoregressive_shapes(RELEASED_VISION, RELEASED_LANGUAGE)),
        ("generation_decoder", generation_decoder_shapes(flux, RELEASED["generation_decoder"]["embed_dim"])),
        ("edit_decoder", editing_decoder_shapes(flux, projector)),
    ):
        sources = autoregressive_sources if name == "autoregressive" else decoder_sources
        assert in_file(shapes, sources(shapes, "released")) == released(name)


def test_parameters_are_as_many_as_published() -> None:
    added = ("vision_head.weight", "image_prefill_embeds.weight")
    plain = {key: shape for key, shape in released("autoregressive").items() if key not in added}
    assert sum(map(math.prod, plain.values())) == QWEN_PARAMETERS
    for name in ("generation_decoder", "edit_decoder"):
        transformer = {key: shape for key, shape in released(name).items() if key.startswith("pipe.dit.")}
        assert sum(map(math.prod, transformer.values())) == FLUX_PARAMETERS


def test_the_config_group_repeats_the_released_geometry() -> None:
    group = yaml.safe_load((ROOT / "configs" / "model" / "nexus_gen_7b.yaml").read_text())
    for details in RELEASED.values():
        for name in ("transformer", "vae", "image_size"):
            assert group[name] == details[name]
