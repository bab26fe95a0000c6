"""Scores of rows without ground truth, by hand on few outcomes: values, counts and chance levels."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from train.scores.outcomes import scores_of

ROOT = Path(__file__).parents[3]


def found(rank: int, among: int = 10, distance: float = 0.2, **readings: Any) -> dict[str, Any]:
    return {
        "cosine_distance": distance,
        "chance_cosine_distance": 0.6,
        "mse": 2 * distance,
        "chance_mse": 1.5,
        "rank": rank,
        "among": among,
        "nearest": None,
        **readings,
    }


def read(right: bool, chance: float, true_right: bool = True) -> dict[str, Any]:
    return {"name": "", "right": right, "chance": chance, "true_right": true_right}


def answer(question: str, said: str, reply: str, exact: bool, similarity: float, **more: Any) -> dict[str, Any]:
    about = {"phase": "understanding", "id": said, "language": "en", "prompt": question, "answer": said}
    return {**about, "exact": exact, "similarity": similarity, "truth": reply, "replies": [reply], **more}


def of_phase(phase: str, **more: Any) -> dict[str, Any]:
    return {"phase": phase, "id": "", "language": "en", "prompt": "", **more}


def test_answers_are_compared_with_always_the_commonest_one() -> None:
    scores = scores_of(
        [
            answer("What?", "red cat", "red cat", True, 1.0),
            answer("What?", "red", "red dog", False, 2 / 3),
            answer("What?", "dog", "red cat", False, 0.0),
            answer("What?", "red cat", "red cat", True, 1.0),
        ]
    )
    exact, similarity = scores["understanding/exact"], scores["understanding/similarity"]
    assert (exact.value, exact.chance, exact.count) == (0.5, 0.75, 4)  # "red cat" always: three of four
    assert similarity.value == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert similarity.chance == pytest.approx((1 + 0.5 + 1 + 1) / 4)  # "red cat" for "red dog": one word of two
    assert similarity.low <= similarity.value <= similarity.high
    assert "understanding/right" not in scores and "understanding/overall" not in scores


def test_a_true_answer_is_what_a_sentence_is_to_say() -> None:
    rows = [
        answer("What?", "It is a cat.", "That's a cat.", False, 0.5, true_answer="cat", right=True),
        answer("What?", "It is a cat.", "That's a dog.", False, 0.5, true_answer="dog", right=False),
        answer("What?", "A dog", "That's a dog.", False, 0.5, true_answer="dog", right=True),
        answer("Why?", "so", "so", True, 1.0),
    ]
    right = scores_of(rows)["understanding/right"]
    assert (right.value, right.count) == (pytest.approx(2 / 3), 3)
    assert right.chance == pytest.approx(2 / 3)  # always "dog"


def test_pictures_are_found_again_at_a_known_chance() -> None:
    rows = [
        of_phase("generation", painted=found(1), imagined=found(1, distance=0.1)),
        of_phase("generation", painted=found(5, distance=0.4), imagined=found(6, distance=0.3)),
        of_phase("generation", painted=found(6, among=20, distance=0.6), imagined=found(2, among=20, distance=0.5)),
        of_phase("generation"),  # nothing to find it among
    ]
    scores = scores_of(rows)
    assert scores["generation/similarity"].value == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert scores["generation/similarity"].chance == pytest.approx(0.4)
    top1, top5 = scores["generation/retrieval_top1"], scores["generation/retrieval_top5"]
    assert (top1.value, top1.count, top1.chance) == (pytest.approx(1 / 3), 3, pytest.approx((0.1 + 0.1 + 0.05) / 3))
    assert (top5.value, top5.chance) == (pytest.approx(2 / 3), pytest.approx((0.5 + 0.5 + 0.25) / 3))
    assert scores["imagined/generation/cosine_distance"].value == pytest.approx(0.3)
    assert scores["imagined/generation/cosine_distance"].chance == pytest.approx(0.6)
    assert scores["imagined/generation/mse"].value == pytest.approx(0.6)
    assert scores["imagined/generation/mse"].chance == pytest.approx(1.5)
    assert scores["imagined/generation/retrieval_top1"].value == pytest.approx(1 / 3)
    assert scores["imagined/generation/retrieval_top5"].value == pytest.approx(2 / 3)


def test_the_five_nearest_of_five_say_nothing() -> None:
    scores = scores_of([of_phase("generation", painted=found(3, among=5))])
    assert scores["generation/retrieval_top1"].chance == pytest.approx(0.2)
    assert "generation/retrieval_top5" not in scores


def test_prompts_and_labels_are_read_at_the_chance_of_their_frequency() -> None:
    rows = [
        of_phase(
            "generation", painted=found(1, **{"class": read(True, 0.3)}), imagined=found(1, label=read(False, 0.2))
        ),
        of_phase("generation", painted=found(1, **{"class": read(False, 0.1, true_right=False)})),
        of_phase("generation", painted=found(1)),  # of a prompt of its own
        of_phase("reconstruction/generation_decoder", psnr=20.0, ssim=0.5, painted=found(2, label=read(True, 0.4))),
    ]
    scores = scores_of(rows)
    of_class = scores["generation/class_top1"]
    assert (of_class.value, of_class.count, of_class.chance) == (0.5, 2, pytest.approx(0.2))
    assert scores["generation/true_class_top1"].value == 0.5
    assert (scores["imagined/generation/label_top1"].value, scores["imagined/generation/label_top1"].chance) == (0, 0.2)
    of_decoder = "reconstruction/generation_decoder"
    assert scores[f"{of_decoder}/label_top1"].value == 1 and scores[f"{of_decoder}/psnr"].value == 20
    assert scores[f"{of_decoder}/retrieval_top1"].value == 0 and scores[f"{of_decoder}/similarity"].value == 0.8
    assert "generation/label_top1" not in scores and f"{of_decoder}/true_label_top1" not in scores


def test_edits_are_compared_with_doing_nothing() -> None:
    nothing = {"psnr": None, "l1": None, "ssim": None}
    rows = [
        of_phase("editing", psnr=30.0, l1=0.1, ssim=0.9, inside_psnr=20.0, unchanged_psnr=5.0, changed=True),
        of_phase("editing", psnr=20.0, l1=0.3, ssim=0.7, inside_psnr=6.0, unchanged_psnr=7.0, changed=False),
        of_phase("editing", **nothing, inside_psnr=None, unchanged_psnr=None, changed=None),
    ]
    scores = scores_of(rows)
    assert scores["editing/outside_psnr"].value == 25 and scores["editing/outside_psnr"].count == 2
    assert scores["editing/outside_l1"].value == pytest.approx(0.2)
    assert scores["editing/outside_ssim"].value == pytest.approx(0.8)
    assert (scores["editing/inside_psnr"].value, scores["editing/inside_psnr"].chance) == (13, 6)
    assert (scores["editing/changed"].value, scores["editing/changed"].chance) == (0.5, 0)


def test_rows_with_scenes_keep_their_scores_beside_others() -> None:
    judged = {"phase": "understanding", "id": "1", "category": "colour", "language": "en", "prompt": "?", "right": True}
    alone = scores_of([judged])
    mixed = scores_of([judged, answer("What?", "a", "b", False, 0.0)])
    assert alone == {name: score for name, score in mixed.items() if name in alone}
    assert set(alone) == {f"understanding/{name}" for name in ("overall", "colour", "en/overall", "en/colour")}
    assert set(mixed) - set(alone) == {"understanding/exact", "understanding/similarity"}
    assert all("chance" not in score.as_json for score in alone.values())
    assert mixed["understanding/exact"].as_json["chance"] == 1.0


def listed() -> list[list[str]]:
    """The cells of the rows of the table in docs/evaluation.md."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Rows without ground truth\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line[:3] == "| `"
    ]


def test_every_score_is_listed_with_a_test_that_is_there() -> None:
    both = {"class": read(True, 0.1), "label": read(True, 0.1)}
    outside = {"psnr": 30.0, "l1": 0.1, "ssim": 0.9}
    edit = {**outside, "inside_psnr": 1.0, "unchanged_psnr": 1.0, "changed": True}
    label = {"label": read(True, 0.1)}
    written = scores_of(
        [
            answer("?", "a", "a", True, 1.0, true_answer="a", right=True),
            of_phase("generation", painted=found(1, **both), imagined=found(1, **both)),
            of_phase("editing", painted=found(1, **label), imagined=found(1, **label), **edit),
            of_phase("reconstruction/generation_decoder", painted=found(1, **both), **outside),
            of_phase("reconstruction/editing_decoder", painted=found(1, **label), **outside),
        ]
    )
    words = {
        "<task>": "(generation|editing)",
        "<decoder>": "(generation|editing)_decoder",
        "<measure>": "(psnr|l1|ssim)",
    }
    patterns = []
    for name, definition, _, proof in listed():
        assert len(definition) > 20
        file, _, test = proof.strip("`").partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, proof
        patterns.append(re.compile("".join(words.get(part, part) for part in re.split(r"(<\w+>)", name.strip("`")))))
    assert [name for name in written if sum(bool(one.fullmatch(name)) for one in patterns) != 1] == []
    assert [one.pattern for one in patterns if not any(map(one.fullmatch, written))] == []
