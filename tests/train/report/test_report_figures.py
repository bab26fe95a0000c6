"""The figures of the report, by hand from a few lines of metrics."""

import json
import re
from pathlib import Path

import pytest

from nexus_gen.artifacts.artifact import Manifest, building, seal
from train.report.command import loss_curves, mean_rate, smoothed, stage_rows
from train.runs.directory import TIMING

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
    write_stage(tmp_path, "standins", [])
    (tmp_path / "editing_decoder").mkdir()  # has not finished
    standins, pretrain, embed = stage_rows(tmp_path)
    assert (standins.name, standins.steps, standins.samples_per_s) == ("standins", 0, 0)
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
