"""Whether held-out losses say that a stage trained too short or too long, on curves whose answer is known."""

import json
import math
import random
from pathlib import Path

import pytest

from train.steps.convergence import Trend, findings, trend

FALLING = [3.0, 1.2, 0.8, 0.62, 0.58, 0.54, 0.52, 0.51]  # under a cosine: nearly flat at its end
CONVERGED = [3.0, 0.9, 0.55, 0.52, 0.511, 0.507, 0.506, 0.506]
OVERFIT = [3.0, 0.9, 0.5, 0.41, 0.44, 0.48, 0.52, 0.55]


def every(step: int, values: list[float]) -> list[tuple[int, float]]:
    return [(step * number, value) for number, value in enumerate(values, start=1)]


def test_a_loss_that_fell_over_the_second_half_is_falling_however_flat_its_end_is() -> None:
    found = trend(every(100, FALLING))
    assert (found.kind, found.before, found.last) == ("falling", 0.62, 0.51)
    assert found.in_words("loss") == (
        "held-out loss still fell by 18% over the second half (0.62 -> 0.51): more=2x trains on from here"
    )


def test_what_came_before_the_second_half_does_not_matter() -> None:
    assert trend(every(100, CONVERGED)).kind == "flat"
    assert trend(every(100, CONVERGED)).in_words("loss") == ""
    assert trend(every(100, [30.0, *CONVERGED[1:]])).kind == "flat"


def test_a_loss_that_rises_names_its_best_step() -> None:
    found = trend(every(100, OVERFIT))
    assert (found.kind, found.best_step) == ("rising", 400)
    assert found.in_words("image loss") == (
        "held-out image loss was best at step 400 and rose by 34% since (0.41 -> 0.55): train shorter, or on more rows"
    )


@pytest.mark.parametrize("points", [[], every(60, [0.5]), every(30, [3.0, 0.5]), every(25, [4.0, 2.0, 1.0, 0.5])])
def test_few_measurements_cannot_tell(points: list[tuple[int, float]]) -> None:
    assert trend(points) == Trend(None)
    assert trend(points).in_words("loss") == ""


def test_measurements_of_the_first_half_alone_cannot_tell() -> None:
    assert trend([(10, 3.0), (20, 2.0), (30, 1.5), (40, 1.2), (1000, 0.5)]).kind is None


def test_a_change_is_held_against_the_noise_of_neighbours() -> None:
    """The same 18% between the same places, once along a line and once up and down by as much."""
    line = [3.0, 0.9, 0.7, 0.62, 0.59, 0.57, 0.54, 0.51]
    noisy = [3.0, 0.9, 0.7, 0.62, 0.48, 0.66, 0.49, 0.51]
    assert [trend(every(100, values)).kind for values in (line, noisy)] == ["falling", "flat"]


def test_noise_alone_is_hardly_ever_a_trend() -> None:
    dice = random.Random(0)
    for count in (5, 7, 10, 20):
        kinds = [trend(every(50, [1 + dice.gauss(0, 0.02) for _ in range(count)])).kind for _ in range(500)]
        assert kinds.count("flat") > 480


@pytest.mark.parametrize("count", [5, 6, 8, 10, 20])
def test_a_model_that_is_half_way_is_found_with_few_measurements_and_many(count: int) -> None:
    """An exponential in the sum of the rates of a cosine schedule: 14% of the loss are lost in the second half."""
    dice = random.Random(1)
    curve = []
    for number in range(1, count + 1):
        done = number / count
        learned = done / 2 + math.sin(math.pi * done) / (2 * math.pi)
        curve.append((0.5 + 2.5 * math.exp(-learned / 0.2)) * (1 + dice.gauss(0, 0.002)))
    assert trend(every(50, curve)).kind == "falling"


def test_a_stage_says_it_of_each_of_its_losses(tmp_path: Path) -> None:
    stage = tmp_path / "pretrain"
    stage.mkdir()
    assert findings(stage) == ""
    with open(stage / "metrics.jsonl", "w", encoding="utf-8") as file:
        for (step, text), (_, image) in zip(every(100, OVERFIT), every(100, FALLING), strict=True):
            file.write(json.dumps({"step": step, "train/loss": 1.0}) + "\n")
            file.write(json.dumps({"step": step, "heldout/text_loss": text, "heldout/image_loss": image}) + "\n")
    assert findings(stage).split("; ") == [
        "held-out text loss was best at step 400 and rose by 34% since (0.41 -> 0.55): train shorter, or on more rows",
        "held-out image loss still fell by 18% over the second half (0.62 -> 0.51): more=2x trains on from here",
    ]
