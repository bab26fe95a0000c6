"""What training gained: two evaluations that ask the same, and the interval of their difference."""

import dataclasses
from pathlib import Path

import pytest

from nexus_gen.specs.artifact import Manifest, building, seal
from nexus_gen.specs.errors import UserError
from train.gain import gains_of, summary
from train.measures import Score, difference, proportion

CONFIG = {
    "split": "heldout",
    "num": 10,
    "tasks": ["understanding"],
    "seed": 42,
    "editor": "editing_decoder",
    "num_inference_steps": None,
    "cfg_scale": None,
}


def evaluation(directory: Path, rows: str, config: dict, **scores: Score) -> Path:
    details = {"scores": {name.replace("_", "/"): dataclasses.asdict(score) for name, score in scores.items()}}
    with building(directory) as partial:
        seal(partial, Manifest("evaluation", "evaluate", config, {"rows": rows}, {}, details))
    return directory


def test_a_difference_lies_in_its_interval_and_turns_round() -> None:
    # Newcombe 1998, table II, 56/70 against 48/80, method 10: 0.0524 to 0.3339.
    high, low = proportion([True] * 56 + [False] * 14), proportion([True] * 48 + [False] * 32)
    gain, loss = difference(high, low), difference(low, high)
    assert gain.value == pytest.approx(0.2)
    assert (gain.low, gain.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low))


def test_gains_are_of_the_evaluation_on_the_same_rows(tmp_path: Path) -> None:
    few, most = proportion([True, False] * 10), proportion([True] * 19 + [False])
    before = evaluation(
        tmp_path / "before", "r1", CONFIG, understanding_overall=few, understanding_en_colour=few, old_psnr=few
    )
    evaluation(tmp_path / "run" / "evaluation" / "a", "r0", CONFIG, understanding_overall=few)
    with pytest.raises(UserError, match="has no evaluation on the rows of"):
        gains_of(tmp_path / "run", before)
    b = tmp_path / "run" / "evaluation" / "b"
    evaluation(b, "r1", CONFIG, understanding_overall=most, understanding_en_colour=most, new_psnr=few)
    (gain,) = gains_of(tmp_path / "run", before)
    assert (gain.name, gain.before[0], gain.after[0], gain.gain[0]) == (
        "understanding/overall",
        "50.0%",
        "95.0%",
        "+45.0 points",
    )
    assert gain.rows == 20 and "+45.0 points" in summary([gain])
    # Of several on these rows the one that asks the same.
    evaluation(b.with_name("aa"), "r1", {**CONFIG, "num": 3}, understanding_overall=few)
    assert gains_of(tmp_path / "run", before)[0].after[0] == "95.0%"
    with pytest.raises(UserError, match=r"b is of other weights than .*run holds now; nexus-gen evaluate"):
        gains_of(tmp_path / "run", before, stale=[b, b.with_name("aa")])
    evaluation(b, "r1", {**CONFIG, "seed": 1, "editor": "x"}, understanding_overall=most)
    evaluation(b.with_name("aa"), "r1", {**CONFIG, "seed": 1}, understanding_overall=few)
    with pytest.raises(UserError, match="differ in seed; evaluate both alike"):
        gains_of(tmp_path / "run", before)
