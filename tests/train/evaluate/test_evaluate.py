"""`nexus-gen evaluate` on a whole run: the artifact, its page, going on after an interruption, and batches."""

import json
import re
from pathlib import Path

import pytest
import torch
from pages import Page
from runs import nexus_gen, succeed

from data.messages.rows import read_rows
from nexus_gen.artifacts.artifact import verify
from nexus_gen.inference import NexusGen
from nexus_gen.parts.models import ModelPaths
from train.scores.outcomes import scores_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluation(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(The artifact of an evaluation of all tasks, what the command printed)."""
    output = tmp_path_factory.mktemp("evaluation") / "compositional"
    return output, succeed("evaluate", tiny_run, *ARGUMENTS, "--split", "compositional", "--output", output)


ARGUMENTS = ("--num", "3", "--batch-size", "2", "--device", "cpu")
PHASES = {
    "understanding",
    "generation",
    "reconstruction/generation_decoder",
    "editing",
    "reconstruction/editing_decoder",
}


def outcomes_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_evaluation_is_an_artifact_that_says_what_it_is_of(evaluation: tuple[Path, str], tiny_run: Path) -> None:
    directory, printed = evaluation
    manifest = verify(directory)
    assert (manifest.kind, manifest.config["split"], manifest.config["num"]) == ("evaluation", "compositional", 3)
    assert set(manifest.inputs) == {"rows", "autoregressive", "generation_decoder", "editing_decoder", "flux"}
    scores = json.loads((directory / "scores.json").read_text(encoding="utf-8"))
    assert manifest.details["scores"] == scores
    outcomes = outcomes_of(directory)
    assert {outcome["phase"] for outcome in outcomes} == PHASES
    assert {name: score["value"] for name, score in scores.items()} == {
        name: score.value for name, score in scores_of(outcomes).items()
    }
    for name in ("understanding/overall", "editing/outside_psnr", "reconstruction/editing_decoder/ssim"):
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    assert str(directory / "index.html") in printed
    for path in directory.rglob("*.json*"):  # it can be moved
        assert str(tiny_run) not in path.read_text(encoding="utf-8"), path
    for outcome in outcomes:
        assert ("picture" in outcome) == (outcome["phase"] != "understanding")


def test_an_interrupted_evaluation_goes_on_to_the_same_scores(
    evaluation: tuple[Path, str], tiny_run: Path, tmp_path: Path
) -> None:
    whole = evaluation[0]
    output = tmp_path / "again"
    arguments = ("evaluate", tiny_run, *ARGUMENTS, "--split", "compositional", "--output", output)
    begun = tmp_path / "again.partial"
    begun.mkdir()
    (begun / "identity.json").write_bytes((whole / "identity.json").read_bytes())
    lines = (whole / "outcomes.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    # All but the last two rows are done, and the power went out in the middle of a line.
    (begun / "outcomes.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20], encoding="utf-8")
    for path in (whole / "pictures").rglob("*.png"):
        copied = begun / path.relative_to(whole)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    succeed(*arguments)
    assert outcomes_of(output) == outcomes_of(whole)
    assert not begun.exists()


def test_the_page_shows_the_failures_and_fetches_nothing(evaluation: tuple[Path, str]) -> None:
    directory, _ = evaluation
    text = (directory / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(url.startswith("data:") for url in page.fetched)
    outcomes = outcomes_of(directory)
    wrong = {phase: [r for r in outcomes if r["phase"] == phase and r.get("right") is False] for phase in PHASES}
    assert wrong["generation"]  # six steps of training paint no shapes
    pictures = len(wrong["understanding"]) + 2 * len(wrong["generation"]) + 3 * len(wrong["editing"]) + 2 * 2 * 3
    assert page.tags["img"] == pictures
    for outcome in wrong["generation"]:
        assert outcome["prompt"] in text


def test_understanding_alone_needs_no_decoder(tiny_run: Path, tmp_path: Path) -> None:
    arguments = ["--autoregressive", tiny_run / "pretrain" / "artifact", "--num", "1", "--device", "cpu"]
    arguments += ["--rows", tiny_run / "shapes" / "artifact" / "heldout.jsonl"]
    refused = nexus_gen("evaluate", tmp_path, *arguments)
    assert refused.returncode == 2 and "or give --generation-decoder\n" in refused.stderr
    printed = succeed("evaluate", tmp_path, *arguments, "--tasks", "understanding")
    page = (tmp_path / "evaluation" / "heldout" / "index.html").read_text(encoding="utf-8")
    assert ", 1 row<" in page and "1 rows" not in page
    assert set(verify(tmp_path / "evaluation" / "heldout").inputs) == {"rows", "autoregressive"}
    assert "generation" not in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "has not begun stage=pretrain"),
        (["--num", "0"], "--num is 0; it must be 1 or more"),
        (["--rows", "plain.jsonl"], "plain.jsonl holds no rows of one exchange about pictures"),
        (["--rows", "slip.jsonl"], "slip.jsonl:1: truth has an unknown key 'awnser'; split, task,"),
    ],
)
def test_mistakes_give_one_sentence(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"images": [], "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("plain.jsonl").write_text(json.dumps(row), encoding="utf-8")
    Path("slip.jsonl").write_text(json.dumps({**row, "truth": {"awnser": "b"}}), encoding="utf-8")
    ended = nexus_gen("evaluate", tmp_path, *arguments)
    assert ended.returncode == 2 and sentence in ended.stderr.strip().splitlines()[-1], ended.stderr


def test_a_batch_gives_what_its_rows_give_alone(tiny_run: Path) -> None:
    model = NexusGen(ModelPaths.find(tiny_run, decoder="editing_decoder"), "cpu")
    rows = list(read_rows(tiny_run / "shapes" / "artifact" / "heldout.jsonl"))
    asked = [row for row in rows if row.task == "understanding"][:3]
    users = [row.messages[0]["content"] for row in asked]
    alone = [model.answer(user, list(row.images), 8) for user, row in zip(users, asked, strict=True)]
    assert model.answer_all(users, [list(row.images) for row in asked], 8) == alone
    mixed = [next(row for row in rows if row.task == task) for task in ("generation", "editing")]
    turns = [[message["content"] for message in row.messages] for row in mixed]
    context = [list(row.images[:-1]) for row in mixed]
    together = model.imagine_all(*map(list, zip(*turns, strict=True)), context)
    for embeds, (user, reply), images in zip(together, turns, context, strict=True):
        # Padding changes the order of sums: 2e-6 at most where values reach 3.
        torch.testing.assert_close(embeds[None], model.imagine(user, reply, images), rtol=0, atol=1e-4)
    pictures = [row.images[-1] for row in mixed]
    targets, sources = model.target_embeds(*pictures), model.source_embeds(*pictures)
    torch.testing.assert_close(targets[1:], model.target_embeds(pictures[1]), rtol=0, atol=1e-4)
    painted = model.paint(targets, sources, seed=[7, 8])
    (one,) = model.paint(targets[1:], sources[1:], seed=[8])
    difference = torch.tensor(list(painted[1].tobytes())) - torch.tensor(list(one.tobytes()))
    assert difference.abs().max() <= 1  # of 255 levels: rounding


def test_geneval_and_imgedit_find_their_layouts(tiny_run: Path, tmp_path: Path) -> None:
    heldout = tiny_run / "shapes" / "artifact" / "heldout.jsonl"
    once = ("--num", "1", "--num-inference-steps", "1", "--device", "cpu")
    geneval = ("evaluate", "geneval", tiny_run, "--prompts", heldout, "--num-samples", "2", "--output")
    assert "2 pictures painted" in succeed(*geneval, tmp_path / "geneval", *once)
    folder = tmp_path / "geneval" / "00000"
    samples = sorted(path.name for path in (folder / "samples").iterdir())
    metadata = json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8"))
    assert samples == ["0000.png", "0001.png"] and {"tag", "include", "prompt"} <= metadata.keys()
    first, second = ((folder / "samples" / name).read_bytes() for name in samples)
    assert first != second
    (folder / "samples" / "0001.png").unlink()
    assert "1 pictures painted" in succeed(*geneval, tmp_path / "geneval", *once)
    assert (folder / "samples" / "0001.png").read_bytes() == second
    imgedit = tmp_path / "imgedit"
    succeed("evaluate", "imgedit", tiny_run, "--edits", heldout, "--output", imgedit, *once)
    ((key, edit),) = json.loads((imgedit / "edits.json").read_text(encoding="utf-8")).items()
    assert (imgedit / f"{key}.png").is_file() and (heldout.parent / edit["id"]).is_file()


def test_multiple_choice_is_answered_and_scored(tiny_run: Path, tmp_path: Path) -> None:
    pictures = sorted((tiny_run / "shapes" / "artifact" / "images").iterdir())[:2]
    questions = [
        {
            "question": "What is it?",
            "options": ["red", "blue"],
            "answer": "A",
            "images": [str(path)],
            "subject": "colour",
        }
        for path in pictures
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, [*questions, {"question": "Why?", "options": []}])), encoding="utf-8")
    output = tmp_path / "choices.json"
    printed = succeed("evaluate", "choices", tiny_run, "--questions", file, "--output", output, "--device", "cpu")
    report = json.loads(output.read_text(encoding="utf-8"))
    assert "left out: 1 questions without options" in printed and report["not_multiple_choice"] == 1
    assert [answer["answer"] for answer in report["answers"]] == ["A", "A"]
    assert report["scores"]["accuracy"]["count"] == report["scores"]["subject/colour"]["count"] == 2
    assert set(report["inputs"]) == {"autoregressive", "questions"}
    unread = [{name: row[name] for name in ("id", "answer", "reply")} for row in report["answers"] if not row["letter"]]
    assert report["unreadable"] == unread
    assert report["scores"]["unreadable"]["value"] == len(unread) / 2
    assert ("unreadable, scored as wrong" in printed) == bool(unread)
