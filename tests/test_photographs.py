"""What a user brings along: message rows of photographs, through `pipeline=tiny_messages` and the three commands."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageEnhance, ImageOps
from runs import SMALLEST, STAGES, TRAINED, losses, nexus_gen, run_arguments, succeed
from skimage import data

from data.doctor.command import main as data_check
from data.mixture.order import check_dataset
from data.mixture.quarantine import read_left_out
from nexus_gen.artifacts.artifact import Manifest, verify
from nexus_gen.parts.wording import Wording

pytestmark = pytest.mark.slow

# What scikit-image installs along with its code, and a caption: colour, greyscale, landscape and portrait.
CAPTIONS = {
    "astronaut": "a portrait of an astronaut in an orange suit",
    "camera": "a black and white photograph of a man with a camera",
    "chelsea": "a close view of a tabby cat",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "old coins in rows",
    "rocket": "火箭立在发射台上",
}
EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "Turn it into a black and white photograph.": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "Mirror it.": ImageOps.mirror,
    "让图片变暗。": lambda image: ImageEnhance.Brightness(image).enhance(0.4),
}
HELD_OUT = ("chelsea", "rocket")
# Rows that every stage would refuse; the doctor names them and `data.quarantine` leaves them out.
BROKEN = {"train": ["{", '{"id": "no messages"}'], "heldout": ["not JSON"]}


def write_dataset(directory: Path) -> None:
    """train.jsonl and heldout.jsonl: per photograph a question, a caption to paint and an edit of each kind."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    (directory / "images").mkdir(parents=True)
    for name, caption in CAPTIONS.items():
        photograph = Image.fromarray(getattr(data, name)())
        photograph.thumbnail((200, 200))
        photograph.save(directory / "images" / f"{name}.jpg")
        split = rows["heldout" if name in HELD_OUT else "train"]
        picture = f"images/{name}.jpg"
        split.append(row([picture], "<image>\nWhat does the picture show?", f"It shows {caption}."))
        split.append(row([picture], f"Generate an image according to the following description: {caption}", "<image>"))
        for number, (instruction, edit) in enumerate(EDITS.items()):
            edited = f"images/{name}-{number}.png"
            edit(photograph).save(directory / edited)
            split.append(row([picture, edited], f"<image> {instruction}", "Here is the image: <image>"))
    for split_name, of_split in rows.items():
        lines = [
            json.dumps({"id": str(number), **of_split[number]}, ensure_ascii=False) for number in range(len(of_split))
        ]
        lines[1:1] = BROKEN[split_name]
        (directory / f"{split_name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    damaged = row(["images/damaged.jpg"], "A description: a cup", "<image>")
    (directory / "images" / "damaged.jpg").write_bytes((directory / "images" / "coffee.jpg").read_bytes()[:900])
    with open(directory / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(damaged) + "\n")


def row(images: list[str], question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"source": "photographs", "images": images, "messages": turns}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset beside its quarantine file, moved since it was checked."""
    checked = tmp_path_factory.mktemp("checked") / "photographs"
    write_dataset(checked)
    files = ["train.jsonl", "--heldout", "heldout.jsonl", "--quarantine", "quarantine.jsonl"]
    arguments = [name if name.startswith("--") else str(checked / name) for name in files]
    assert data_check(["check", *arguments, "--num-workers", "1"]) == 2
    return checked.rename(tmp_path_factory.mktemp("moved") / "photographs")


@pytest.fixture(scope="module")
def photograph_run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "photographs"
    dataset = [f"data.{split}={photographs / f'{split}.jsonl'}" for split in BROKEN]
    dataset += ["data.max_bad_fraction=0", f"data.quarantine=[{photographs / 'quarantine.jsonl'}]"]
    smallest = [override for override in SMALLEST if not override.startswith("shapes.")]
    short = ["trainer.max_steps=2", "trainer.global_batch_size=4"]
    short.append("embed.null_context=false")  # the decoders encode the empty prompt themselves
    said = succeed(*run_arguments(run, "pipeline=tiny_messages", *dataset, *smallest, *short))
    (run / "said").write_text(said, encoding="utf-8")
    return run


def test_every_stage_takes_photographs(photographs: Path, photograph_run: Path) -> None:
    tasks = {"understanding": 4, "generation": 4, "editing": 12}
    train = photographs / "train.jsonl"
    left_out = read_left_out([photographs / "quarantine.jsonl"], [train])
    assert check_dataset(train, left_out=left_out) == tasks
    assert left_out.of(train).keys() == {1, 2, 22}
    for stage in STAGES[1:]:
        verify(photograph_run / stage / "artifact")
    for stage in TRAINED:
        assert losses(photograph_run / stage)
    for stage, samples in (("embed_generation", (4, 2)), ("embed_editing", (12, 6))):
        splits = Manifest.load(photograph_run / stage / "artifact").details["splits"]
        assert tuple(sum(shard["samples"] for shard in splits[name]) for name in ("train", "heldout")) == samples


def test_the_language_model_records_how_the_rows_are_worded(photograph_run: Path) -> None:
    words = Wording.load(photograph_run / "pretrain" / "artifact")
    generation, editing = words.of("generation", "en"), words.of("editing", "zh")
    assert generation.user == "Generate an image according to the following description: {}"
    assert (generation.reply, generation.shares) == ("<image>", {generation.user: 1.0})
    assert (editing.user, editing.reply) == ("<image> {}", "Here is the image: <image>")
    said = (photograph_run / "said").read_text(encoding="utf-8")
    assert "prompts (understanding, en) are to be worded as rows are: released" in said


def test_quarantined_rows_are_counted_by_every_stage_and_reach_none(photographs: Path, photograph_run: Path) -> None:
    """A row that cannot be read counts in each embedding stage; the one of a damaged picture where its task is."""
    manifests = {stage: Manifest.load(photograph_run / stage / "artifact") for stage in STAGES[2:]}
    assert manifests["pretrain"].details["rows"] == {
        "train": {"rows": 23, "used": 20, "quarantined": 3},
        "heldout": {"rows": 11, "used": 10, "quarantined": 1},
    }
    assert not (photograph_run / "pretrain" / "quarantine").exists()
    for stage, embedded, quarantined in (("embed_generation", 4, 3), ("embed_editing", 12, 2)):
        rows = manifests[stage].details["rows"]
        assert rows["train"] == {"rows": embedded + quarantined, "embedded": embedded, "quarantined": quarantined}
        named = (photograph_run / stage / "artifact" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(named) == quarantined + 1
    said = (photograph_run / "said").read_text(encoding="utf-8")
    assert "train: 23 rows = 20 used + 3 quarantined" in said and "train: 7 rows = 4 embedded + 3 quarantined" in said


def test_the_commands_serve_photographs(photographs: Path, photograph_run: Path, tmp_path: Path) -> None:
    cat = photographs / "images" / "chelsea.jpg"
    models = ["--run", photograph_run, "--device", "cpu"]
    generate = ["generate", "--prompt", CAPTIONS["rocket"], "--language", "zh"]
    succeed(*generate, *models, "--result-path", tmp_path / "rocket.png")
    edit = ["edit", "--input-image", cat, "--instruction", "Mirror it."]
    succeed(*edit, *models, "--result-path", tmp_path / "cat.webp")
    for name, size in (("rocket.png", (64, 64)), ("cat.webp", (78, 52))):  # 200 x 133 in about 64 * 64 pixels
        with Image.open(tmp_path / name) as image:
            assert image.size == size
    answer = nexus_gen("understand", *models, "--input-image", cat, "--prompt", "What does the picture show?")
    assert answer.returncode == 0 and answer.stdout.endswith("\n"), answer.stderr
