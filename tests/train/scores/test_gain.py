"""What training gained: two evaluations that ask the same, and the interval of their difference."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from nexus_gen.artifacts.artifact import MANIFEST, Manifest, building, seal
from nexus_gen.specs.errors import UserError
from train.scores.gain import gains, gains_of, summary
from train.scores.measures import Score, difference, proportion

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
    with building(tmp_path / "run" / "evaluation" / "b0") as partial:  # of another command, on the same rows
        seal(partial, Manifest("geneval", "evaluate", CONFIG, {"rows": "r1"}, {}, {"scores": {}}))
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
    with pytest.raises(UserError, match=r"aa and .* differ in num"):  # the other one, though it asks something else
        gains_of(tmp_path / "run", before, stale=[b])
    with pytest.raises(UserError, match=r"b is of other weights than .*run holds now; nexus-gen evaluate"):
        gains_of(tmp_path / "run", before, stale=[b, b.with_name("aa")])
    evaluation(b, "r1", {**CONFIG, "seed": 1, "editor": "x"}, understanding_overall=most)
    evaluation(b.with_name("aa"), "r1", {**CONFIG, "seed": 1}, understanding_overall=few)
    with pytest.raises(UserError, match="differ in seed; evaluate both alike"):
        gains_of(tmp_path / "run", before)


def test_a_table_of_gains_has_the_overall_scores_and_their_signs() -> None:
    before = {
        "understanding/overall": Score(0.5, 0.4, 0.6, 20),
        "understanding/colour": Score(0.5, 0.4, 0.6, 20),
        "understanding/en/colour": Score(0.5, 0.4, 0.6, 10),
        "editing/outside_psnr": Score(30.0, 29.0, 31.5, 8),
        "editing/outside_l1": Score(0.1, 0.05, 0.2, 8),
    }
    after = {
        "editing/outside_psnr": Score(28.0, 26.5, 29.0, 9),
        "editing/outside_l1": Score(0.15, 0.05, 0.2, 9),
        "understanding/overall": Score(0.5, 0.4, 0.6, 21),
        "understanding/colour": Score(0.75, 0.7, 0.78, 21),
        "understanding/en/colour": Score(0.75, 0.7, 0.78, 11),
        "understanding/shape": Score(0.75, 0.7, 0.78, 21),
    }
    found = gains(*({name: dataclasses.asdict(score) for name, score in scores.items()} for scores in (before, after)))
    assert [(one.name, one.before, one.after, one.gain, one.rows) for one in found] == [
        # 2 dB less; sqrt(1.5^2 + 1.5^2) below and sqrt(1 + 1) above.
        (
            "editing/outside_psnr",
            ("30.0 dB", "29.0 to 31.5"),
            ("28.0 dB", "26.5 to 29.0"),
            ("-2.0 dB", "-4.1 to -0.6"),
            9,
        ),
        (
            "editing/outside_l1",
            ("0.100", "0.050 to 0.200"),
            ("0.150", "0.050 to 0.200"),
            ("+0.050", "-0.091 to 0.121"),
            9,
        ),
        (
            "understanding/overall",
            ("50.0%", "40.0% to 60.0%"),
            ("50.0%", "40.0% to 60.0%"),
            ("0.0 points", "-14.1% to 14.1%"),
            21,
        ),
        (
            "understanding/colour",
            ("50.0%", "40.0% to 60.0%"),
            ("75.0%", "70.0% to 78.0%"),
            ("+25.0 points", "13.8% to 35.4%"),
            21,
        ),
    ]
    assert [re.split(r" {2,}", line) for line in summary(found).splitlines()] == [
        ["score", "before", "after", "gain", "95% interval"],
        ["editing/outside_psnr", "30.0 dB", "28.0 dB", "-2.0 dB", "-4.1 to -0.6"],
        ["understanding/overall", "50.0%", "50.0%", "0.0 points", "-14.1% to 14.1%"],
    ]
    assert len({len(line) for line in summary(found).splitlines()}) == 1


def test_readings_of_another_probe_are_no_gain(tmp_path: Path) -> None:
    """What a probe reads depends on the rows that taught it; what is found again does not."""
    few, most = proportion([True, False] * 10), proportion([True] * 19 + [False])
    before = evaluation(tmp_path / "before", "r1", CONFIG)
    evaluation(tmp_path / "run" / "evaluation" / "a", "r1", CONFIG)
    for directory, score in ((before, few), (tmp_path / "run" / "evaluation" / "a", most)):
        manifest = Manifest.load(directory)
        names = ("generation/class_top1", "understanding/label_top1", "generation/retrieval_top1")
        manifest.details["scores"] = {name: dataclasses.asdict(score) for name in names}
        manifest.inputs["probe"] = "of one"
        (directory / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest)), encoding="utf-8")
    assert len(gains_of(tmp_path / "run", before)) == 3
    manifest = Manifest.load(before)
    manifest.inputs["probe"] = "of another"
    (before / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest)), encoding="utf-8")
    assert [gain.name for gain in gains_of(tmp_path / "run", before)] == ["generation/retrieval_top1"]
