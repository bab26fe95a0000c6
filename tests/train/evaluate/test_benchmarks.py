"""What benchmarks' files say, and the layout that their scripts read. Painting is tested in test_evaluate.py."""

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

from data.shapes.dataset import DEFAULTS, draw_rows
from nexus_gen.parts.models import SHIPPED_RUN, ModelPaths
from nexus_gen.specs.errors import UserError
from train.evaluate.benchmarks import read_edits, read_prompts, require_same
from train.scores.scoring import TAGS


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes")
    config = {**vars(DEFAULTS), "num_train": 1, "num_heldout": 40, "num_compositional": 0, "image_size": 32}
    draw_rows(directory, type(DEFAULTS)(**config), seed=0, num_workers=1)
    return directory / "heldout.jsonl"


def test_prompts_of_all_kinds_of_files(heldout: Path, tmp_path: Path) -> None:
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(metadata) + "\n\n", encoding="utf-8")
    assert read_prompts(tmp_path / "evaluation_metadata.jsonl") == [metadata]
    (tmp_path / "prompts.txt").write_text("a cat\n\n一只狗\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == [{"prompt": "a cat"}, {"prompt": "一只狗"}]
    prompts = read_prompts(heldout)
    assert prompts and {prompt["tag"] for prompt in prompts} <= set(TAGS.values())
    assert all(prompt["include"] and "Generate" not in prompt["prompt"] for prompt in prompts)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_nothing_can_be_compared_with_are_refused(number: str, heldout: Path, tmp_path: Path) -> None:
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(f'{{"prompt": "a", "include": [{{"class": "cat", "count": {number}}}]}}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: include\.count is -?(nan|inf); it must be a finite"):
        read_prompts(metadata)
    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    row = next(row for row in rows if row["truth"]["task"] == "generation")
    row["truth"]["scenes"][0]["objects"][0]["bbox"][2] = float(number)
    (tmp_path / "images").symlink_to(heldout.parent / "images")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: truth\.scenes\.objects\.bbox is -?(nan|inf); it must be"):
        read_prompts(tmp_path / "rows.jsonl")


def test_edits_of_imgedit_and_of_rows(heldout: Path, tmp_path: Path) -> None:
    (tmp_path / "animal").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "animal" / "1.jpg")
    edits = {"1082": {"id": "animal/1.jpg", "prompt": "Make it blue.", "edit_type": "alter"}}
    (tmp_path / "basic_edit.json").write_text(json.dumps(edits), encoding="utf-8")
    (edit,) = read_edits(tmp_path / "basic_edit.json", tmp_path)
    assert (edit.key, edit.image, edit.prompt, edit.edit_type) == (
        "1082",
        tmp_path / "animal" / "1.jpg",
        "Make it blue.",
        "alter",
    )
    ours = read_edits(heldout, heldout.parent)
    assert ours and all(edit.image.is_file() and edit.key.startswith("heldout-") for edit in ours)
    assert {edit.edit_type for edit in ours} <= {"add", "remove", "alter", "action", "replace", "background"}


def test_rows_that_scripts_could_not_score_are_named(heldout: Path, tmp_path: Path) -> None:
    embedded = SHIPPED_RUN / "shapes" / "artifact" / "heldout.jsonl"
    with pytest.raises(UserError, match=r"heldout\.jsonl:\d+: its pictures are inside the row"):
        read_edits(embedded, embedded.parent)
    rows = [json.loads(line) for line in heldout.read_text(encoding="utf-8").splitlines()]
    (tmp_path / "images").symlink_to(heldout.parent / "images")
    for read, task in ((read_prompts, "generation"), (lambda path: read_edits(path, tmp_path), "editing")):
        row = next(row for row in rows if row["truth"]["task"] == task)
        for truth, sentence in (
            ({**row["truth"], "category": "taste"}, f"truth.category is 'taste'; of {task} rows there are"),
            ({**row["truth"], "scenes": []}, "truth has 0 scenes for"),
            ({**row["truth"], "scenes": [1] * len(row["images"])}, "truth.scenes must be a list of {ground, objects"),
            ({"answer": "no"}, "no ground truth"),
        ):
            path = tmp_path / "rows.jsonl"
            path.write_text(json.dumps({**row, "truth": truth}) + "\n", encoding="utf-8")
            with pytest.raises(UserError, match=rf"rows\.jsonl:1: {sentence}"):
                read(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"1": {"id": "a.jpg", "prompt": "x", "edit_type": "add"}}', "a.jpg of 1 does not exist; give --images"),
        ('{"1": {"prompt": "x"}}', "is not key -> id, prompt, edit_type"),
        ("[1]", "is not key -> id, prompt, edit_type"),
        ('{"1": {"id": "edits.json", "prompt": 3, "edit_type": "add"}}', "the prompt of 1 is 3; give a text"),
        ('{"../1": {"id": "edits.json", "prompt": "x", "edit_type": "add"}}', "the key '../1' is no file name"),
    ],
)
def test_broken_edits_are_named(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "edits.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        read_edits(tmp_path / "edits.json", tmp_path)


def test_pictures_of_other_models_or_settings_are_not_added_to(tmp_path: Path) -> None:
    for name in ("qwen", "flux"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("one")
    (tmp_path / "decoder").write_text("one")
    paths = ModelPaths(tmp_path / "qwen", 1, "generation_decoder", tmp_path / "decoder", tmp_path / "flux")

    def begin(seed: int = 42) -> None:
        output = tmp_path / "output"
        require_same(
            argparse.Namespace(run=tmp_path, output=output, seed=seed, num_inference_steps=None, cfg_scale=1.0), paths
        )

    begin()
    begin()
    with pytest.raises(UserError, match="were painted with another seed; give --output with an empty"):
        begin(seed=1)
    (tmp_path / "decoder").write_text("two")
    (tmp_path / "flux" / "weights").write_text("two")
    with pytest.raises(UserError, match="were painted with another decoder, flux;"):
        begin()
