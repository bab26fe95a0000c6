"""`nexus-gen evaluate` on one's own rows, which say nothing of what their pictures show, with the weights that ship."""

import json
import shutil
from pathlib import Path

import pytest
from pages import Page

from nexus_gen.artifacts.artifact import verify
from nexus_gen.parts.models import SHIPPED_RUN
from train.evaluate.command import main
from train.scores.outcomes import scores_of

pytestmark = pytest.mark.slow

HELDOUT = SHIPPED_RUN / "shapes" / "artifact" / "heldout.jsonl"
TASKS = ("understanding", "generation", "editing")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of each task without their ground truth, two pictures labelled, and one question with its scene."""
    directory = tmp_path_factory.mktemp("rows")
    shipped = [json.loads(line) for line in HELDOUT.read_text(encoding="utf-8").splitlines()]
    lines = []
    for task in TASKS:
        of_task = [row for row in shipped if row["truth"]["task"] == task]
        lines += [{**row, "truth": None} for row in of_task[:3]]
        lines += of_task[3:4] if task == "understanding" else []
    for row in lines:
        if row["messages"][1]["content"].count("<image>") and "<image>" not in row["messages"][0]["content"]:
            row["truth"] = {"label": "shape"}
    path = directory / "mine.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def evaluation(rows: Path) -> Path:
    output = rows.parent / "evaluation"
    assert main(arguments(rows, output)) == 0
    return output


def arguments(rows: Path, output: Path) -> list[str]:
    options = ["--output", str(output), "--num", "2", "--num-inference-steps", "1", "--device", "cpu"]
    return ["evaluate", "--rows", str(rows), *options]


def outcomes_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_task_is_scored_beside_its_chance(evaluation: Path) -> None:
    manifest = verify(evaluation)
    scores = json.loads((evaluation / "scores.json").read_text(encoding="utf-8"))
    assert manifest.details["scores"] == scores
    assert scores == {name: score.as_json for name, score in scores_of(outcomes_of(evaluation)).items()}
    measures = {
        "understanding": ("exact", "similarity"),
        "generation": ("similarity", "retrieval_top1"),
        "editing": ("similarity", "retrieval_top1", "retrieval_top5", "changed", "inside_psnr"),
        "imagined/generation": ("cosine_distance", "mse", "retrieval_top1"),
        "imagined/editing": ("cosine_distance", "mse", "retrieval_top1", "retrieval_top5"),
        "reconstruction/generation_decoder": ("similarity", "retrieval_top1"),
        "reconstruction/editing_decoder": ("similarity", "retrieval_top1", "retrieval_top5"),
    }
    expected = {f"{phase}/{measure}" for phase, names in measures.items() for measure in names}
    assert {name for name, score in scores.items() if "chance" in score} == expected
    assert "understanding/overall" not in scores  # the row with a scene is the fourth, and two were asked
    # Three pictures are painted in all, though two were asked for; sources are among those of edits.
    assert scores["generation/retrieval_top1"]["chance"] == pytest.approx(1 / 3)
    assert scores["editing/retrieval_top1"]["chance"] == pytest.approx(1 / 6)
    assert scores["understanding/exact"]["value"] == 1.0  # as published for these weights
    imagined = scores["imagined/generation/cosine_distance"]
    assert imagined["value"] < 0.1 < imagined["chance"]


def test_the_page_shows_rows_with_their_pictures(evaluation: Path) -> None:
    text = (evaluation / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(url.startswith("data:") for url in page.fetched)
    shown = 2 * 1 + 2 * 3 + 2 * 4 + 2 * 3 * 2  # questions; prompts; edits; the worst, middle and best of each decoder
    assert page.tags["img"] == shown
    for outcome in outcomes_of(evaluation):
        assert outcome["prompt"] in text
    assert "found again" in text and "what limits" not in text  # every share is near its best


def test_an_interrupted_evaluation_resumes_to_the_same(evaluation: Path, rows: Path, tmp_path: Path) -> None:
    whole = outcomes_of(evaluation)
    output = tmp_path / "again"
    partial = output.with_name("again.partial")
    partial.mkdir()
    kept = [outcome for outcome in whole if outcome["phase"] != "generation"]
    shutil.copyfile(evaluation / "identity.json", partial / "identity.json")
    shutil.copytree(evaluation / "pictures", partial / "pictures")
    (partial / "outcomes.jsonl").write_text(
        "".join(json.dumps(outcome, ensure_ascii=False) + "\n" for outcome in kept), encoding="utf-8"
    )
    assert main(arguments(rows, output)) == 0
    scores, before = (
        json.loads((directory / "scores.json").read_text(encoding="utf-8")) for directory in (output, evaluation)
    )
    assert {name: score["value"] for name, score in scores.items()} == pytest.approx(
        {name: score["value"] for name, score in before.items()}
    )
