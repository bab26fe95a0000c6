"""The figures of the report by hand from a few lines, and which model is shown before and which after training."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train.report_samples
from data.messages import Row
from nexus_gen.inference import NexusGen
from nexus_gen.specs.artifact import Manifest, building, seal
from nexus_gen.specs.models import SHIPPED_RUN
from train.report import loss_curves, mean_rate, smoothed, stage_rows
from train.report_samples import UnderstandingSample, draw_samples, models
from train.schemas.run_directory import TIMING, load_config

LINES: list[dict[str, float]] = [
    {"step": 2, "train/text_loss": 8.0, "train/image_loss": 0.5, "perf/samples_per_s": 10.0},
    {"step": 4, "train/text_loss": 1.0, "perf/samples_per_s": 20.0},
    {"step": 4, "heldout/text_loss": 99.0, "heldout/image_loss": 77.0},
    {"step": 9, "train/text_loss": 2.0, "train/image_loss": 0.75, "perf/samples_per_s": 50.0},
    {"step": 10, "train/text_loss": 4.0, "train/image_loss": 0.25, "perf/samples_per_s": 5.0},
    {"step": 10, "heldout/text_loss": 88.0, "heldout/image_loss": 66.0},
]


def write_stage(run: Path, name: str, lines: list[dict[str, float]], seconds: tuple[float, ...] = ()) -> None:
    with building(run / name / "artifact") as partial:
        seal(partial, Manifest(f"{name} made", name, {}, {}, {"commit": f"commit of {name}"}, {}))
    (run / name / "config.yaml").write_text(f"stage: {name}\n", encoding="utf-8")
    (run / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    timing = "".join(json.dumps({"seconds": s, "processes": n}) + "\n" for n, s in enumerate(seconds, start=3))
    (run / name / TIMING).parent.mkdir(parents=True, exist_ok=True)
    (run / name / TIMING).write_text(timing, encoding="utf-8")


def test_a_row_of_a_stage_sums_what_its_starts_logged(tmp_path: Path) -> None:
    write_stage(tmp_path, "pretrain", LINES, seconds=(30.0, 12.5))
    write_stage(tmp_path, "embed_generation", [{"step": 0, "perf/samples_per_s": 40.0, "gap/mse": 1.0}])
    (tmp_path / "editing_decoder").mkdir()  # has not finished
    pretrain, embed = stage_rows(tmp_path)
    assert (pretrain.name, pretrain.made, pretrain.commit) == ("pretrain", "pretrain made", "commit of pretrain")
    assert (pretrain.seconds, pretrain.processes, pretrain.steps) == (42.5, 4, 10)
    assert pretrain.config == "stage: pretrain\n"
    # 2, 2, 5 and 1 steps of one sample took 0.2 + 0.1 + 0.1 + 0.2 s; the mean of the four rates is 21.25.
    assert pretrain.samples_per_s == pytest.approx(10 / 0.6)
    assert (embed.name, embed.samples_per_s, embed.steps, embed.seconds) == ("embed_generation", 40.0, 0, 0)
    assert mean_rate([{"step": 3, "heldout/loss": 1.0}]) == 0


def curve_of(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def test_curves_end_with_the_values_that_were_logged(tmp_path: Path) -> None:
    write_stage(tmp_path, "pretrain", LINES)
    write_stage(tmp_path, "generation_decoder", [{"step": 1, "train/loss": 3.0, "heldout/loss": 5.0}])
    write_stage(tmp_path, "editing_decoder", [{"step": 1, "heldout/loss": 5.0}])
    text, image, decoder = loss_curves(tmp_path)
    assert (text["first"], text["last"]) == (8.0, 4.0)
    assert (image["first"], image["last"]) == (0.5, 0.25)
    assert (decoder["first"], decoder["last"]) == (3.0, 3.0)
    for curve, title in ((text, "pretrain: text loss"), (image, "pretrain: image loss")):
        assert curve["svg"].startswith("<svg") and f"<!-- {title} -->" in curve["svg"]
    drawn = [curve_of(path) for path in re.findall(r'<path d="([^"]*)" clip-path', text["svg"])]
    raw, bold = (curve for curve in drawn if len(curve) == 4)
    # From the top of the picture down: the curves are those of the values, and of their averages 8, 4.11, 3.25, 3.52.
    for curve, values in ((raw, (8.0, 1.0, 2.0, 4.0)), (bold, tuple(smoothed([8.0, 1.0, 2.0, 4.0])))):
        scale = (raw[1][1] - raw[0][1]) / 7
        assert [(y - raw[0][1]) / scale for _, y in curve] == pytest.approx([8 - value for value in values], abs=1e-3)
        assert [(x - curve[0][0]) / (curve[-1][0] - curve[0][0]) * 8 + 2 for x, _ in curve] == pytest.approx(
            [2, 4, 9, 10], abs=1e-3
        )


def test_the_bold_curve_weighs_the_past_with_four_fifths() -> None:
    values = [8.0, 1.0, 2.0, 4.0]
    by_hand = [
        sum(0.8 ** (last - place) * values[place] for place in range(last + 1))
        / sum(0.8**age for age in range(last + 1))
        for last in range(4)
    ]
    assert smoothed(values) == pytest.approx(by_hand)
    assert smoothed([5.0]) == [5.0]


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
        train.report_samples, "models", lambda run, kind, *_: (Named("start", kind), Named("end", kind))
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

    monkeypatch.setattr(train.report_samples, "load_autoregressive", load)
    monkeypatch.setattr(train.report_samples, "build_initial_decoder", lambda *_: torch.nn.Linear(1, 1))
    untrained, trained = models(SHIPPED_RUN, "editing_decoder", "cpu", with_start=True)
    config: Any = load_config(SHIPPED_RUN / "pretrain")
    assert asked == [(config.model.qwen, config.seed, config.model.num_target_tokens)]
    assert untrained is not None and untrained.autoregressive == "autoregressive of the start"
    assert isinstance(untrained.decoder, torch.nn.Linear) and not untrained.decoder.training
    assert {"autoregressive", "decoder"}.isdisjoint(vars(trained))  # loaded from its own paths when needed
    assert trained.paths.autoregressive == SHIPPED_RUN / "pretrain" / "artifact"
    assert trained.paths.decoder_kind == untrained.paths.decoder_kind == "editing_decoder"
    assert models(SHIPPED_RUN, "editing_decoder", "cpu", with_start=False)[0] is None
