"""Which model the report shows as before training, and which as after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train.report.samples
from data.messages.rows import Row
from nexus_gen.inference import NexusGen
from nexus_gen.parts.models import SHIPPED_RUN
from train.report.samples import UnderstandingSample, draw_samples, models
from train.runs.directory import load_config


class Named(NexusGen):
    """Answers and paints with its name, and the decoder's."""

    def __init__(self, name: str, decoder: str) -> None:
        self.name = f"{name} {decoder}"
        self.details = {"image_size": 16, "sampling": {}, "vae": {}, "aspect": "stretch"}

    def picture(self, words: str) -> Image.Image:
        picture = Image.new("RGB", (16, 16))
        picture.info["made"] = f"{self.name}: {words}"
        return picture

    def answer(self, content: str, *_: Any) -> str:
        return f"{self.name}: {content}"

    def imagine(self, content: str, *_: Any) -> Any:
        return f"{self.name} imagined {content}"

    def target_embeds(self, *_: Any) -> Any:
        return f"{self.name} looked"

    def paint(self, target_embeds: Any, *_: Any, **__: Any) -> list[Image.Image]:
        return [self.picture(target_embeds)]

    def edit_all(self, contents: list[str], *_: Any, **__: Any) -> list[Image.Image]:
        return [self.picture(contents[0])]

    def repaint(self, target_embeds: Any, *_: Any, **__: Any) -> list[Image.Image]:
        return [self.picture(target_embeds)]


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path)
    asked = {"understanding": 1, "generation": 1, "editing": 2}
    return [
        Row(
            "1",
            "",
            [path] * count,
            [{"role": "user", "content": task}, {"role": "assistant", "content": "b"}],
            task,
            "",
            [],
        )
        for task, count in asked.items()
    ]


def test_before_is_what_training_began_with(rows: list[Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        train.report.samples, "models", lambda run, kind, *_: (Named("start", kind), Named("end", kind))
    )
    samples = draw_samples(tmp_path, rows, 2, "cpu", with_start=True)
    (generation,), (editing,), (understanding,) = samples.generation, samples.editing, samples.understanding
    assert generation.before is not None and editing.before is not None
    start, end = "start generation_decoder", "end generation_decoder"
    assert generation.before.info["made"] == f"{start}: {start} imagined generation"
    assert generation.after.info["made"] == f"{end}: {end} imagined generation"
    assert generation.reconstruction.info["made"] == f"{end}: {end} looked"
    assert (understanding.before, understanding.after) == (f"{start}: understanding", f"{end}: understanding")
    assert editing.before.info["made"] == "start editing_decoder: editing"
    imagined = "end editing_decoder imagined editing"
    assert editing.editing_decoder.info["made"] == f"end editing_decoder: {imagined}"
    assert editing.generation_decoder.info["made"] == f"{end}: {imagined}"


def test_answers_are_right_as_an_evaluation_scores_them() -> None:
    picture = Image.new("RGB", (1, 1))
    for after, right in (("red", True), ("It is red.", True), ("blue", False)):
        assert UnderstandingSample("?", picture, "red", after, "red").right is right


def test_the_start_has_the_weights_that_stages_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shipped run, whose start is not there: what would be loaded is recorded."""
    asked = []

    def load(path: str, **options: Any) -> str:
        asked.append((path, options["init_seed"], options["num_target_tokens"]))
        return "autoregressive of the start"

    monkeypatch.setattr(train.report.samples, "load_autoregressive", load)
    monkeypatch.setattr(train.report.samples, "build_initial_decoder", lambda *_: torch.nn.Linear(1, 1))
    untrained, trained = models(SHIPPED_RUN, "editing_decoder", "cpu", with_start=True)
    config: Any = load_config(SHIPPED_RUN / "pretrain")
    assert asked == [(config.model.qwen, config.seed, config.model.num_target_tokens)]
    assert untrained is not None and untrained.autoregressive == "autoregressive of the start"
    assert isinstance(untrained.decoder, torch.nn.Linear) and not untrained.decoder.training
    assert {"autoregressive", "decoder"}.isdisjoint(vars(trained))  # loaded from its own paths when needed
    assert trained.paths.autoregressive == SHIPPED_RUN / "pretrain" / "artifact"
    assert trained.paths.decoder_kind == untrained.paths.decoder_kind == "editing_decoder"
    assert models(SHIPPED_RUN, "editing_decoder", "cpu", with_start=False)[0] is None
