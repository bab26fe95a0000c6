"""The switches of docs/compatibility.md reach what they switch, and the better behaviour is the default."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_qwen
import yaml
from PIL import Image

from launch.compose import Override, compose_stage
from nexus_gen.inference import NexusGen
from nexus_gen.parts.models import RELEASED, SHIPPED_RUN, ModelPaths
from nexus_gen.pictures.images import cover_crop, squash
from nexus_gen.specs.errors import UserError
from train.decoders.stage import meta_decoder
from train.embed.stage import EmbedEditingStage
from train.runs.directory import load_config


def composed(*overrides: str):
    return compose_stage([Override.parse(text) for text in overrides])


@pytest.mark.parametrize("given", [None, True, False])
def test_token_positions_of_the_editing_decoder(tmp_path: Path, given: bool | None) -> None:
    tiny_qwen.write_checkpoint(tmp_path / "qwen")
    switch = [] if given is None else [f"objective.round_positions={str(given).lower()}"]
    config = composed("stage=editing_decoder", f"model.qwen={tmp_path / 'qwen'}", *switch)
    decoder = meta_decoder(config, embed_dim=32)
    assert decoder.embedding_merger.round_positions is bool(given)
    assert RELEASED["editing_decoder"]["round_positions"], "released files are sampled as they were trained"


def test_what_does_not_say_rounds_positions_as_all_did_before(tmp_path: Path) -> None:
    paths = ModelPaths.find(SHIPPED_RUN, decoder="editing_decoder")
    assert paths.details is not None
    details = {name: value for name, value in paths.details.items() if name != "round_positions"}
    assert NexusGen(replace(paths, details=details), "cpu").decoder.embedding_merger.round_positions
    values = yaml.safe_load((SHIPPED_RUN / "editing_decoder" / "config.yaml").read_text(encoding="utf-8"))
    del values["objective"]["round_positions"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_config(tmp_path).objective.round_positions is True


@pytest.mark.parametrize(("switch", "square"), [([], squash), (["embed.pixels=crop"], cover_crop)])
def test_pixels_of_an_edits_result(switch: list[str], square) -> None:
    """Which picture the autoencoder is given; the models before it are of no matter here."""
    config = composed("stage=embed_editing", "data.train=t.jsonl", "data.heldout=h.jsonl", *switch)
    stage = EmbedEditingStage(config)
    picture = Image.effect_noise((90, 40), 80).convert("RGB")
    assert stage.square(picture).tobytes() == square(picture, config.model.image_size).tobytes()
    assert squash(picture, 64).tobytes() != cover_crop(picture, 64).tobytes()


def test_misspelt_pixels_are_refused() -> None:
    with pytest.raises(UserError, match=r"embed\.pixels"):
        composed("stage=embed_editing", "embed.pixels=cropped", "data.train=t.jsonl", "data.heldout=h.jsonl")


def test_one_timestep_for_a_batch_is_an_option() -> None:
    assert composed("stage=generation_decoder").objective.timesteps == "per_sample"
    assert composed("stage=generation_decoder", "objective.timesteps=per_batch").objective.timesteps == "per_batch"
