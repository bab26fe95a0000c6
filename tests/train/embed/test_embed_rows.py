"""What of a row enters its embeddings: which picture, cut or squashed, and which of several targets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import train.embed.stage
from data.messages.rows import Row
from data.shards.plan import PlannedSample, RowFacts
from nexus_gen.language.model import IGNORE_INDEX
from train.embed.stage import EmbedEditingStage, EmbedGenerationStage, EmbedStage, means

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def three_stripes(size: tuple[int, int], *colours: tuple[int, int, int]) -> Image.Image:
    """Stripes across the longer side: the outer two a quarter each."""
    width, height = size
    picture = Image.new("RGB", size, colours[1])
    if width > height:
        picture.paste(colours[0], (0, 0, width // 4, height))
        picture.paste(colours[2], (width - width // 4, 0, width, height))
    else:
        picture.paste(colours[0], (0, 0, width, height // 4))
        picture.paste(colours[2], (0, height - height // 4, width, height))
    return picture


def stage(kind: type, monkeypatch: pytest.MonkeyPatch, images: list[Any], **embed: Any) -> Any:
    """A stage without models, whose only row holds the pictures."""
    made: Any = object.__new__(kind)
    values = {"latents": True, "predicted": True, "pixels": "squash", "batch_size": 4, **embed}
    made.config = SimpleNamespace(
        embed=SimpleNamespace(**values), model=SimpleNamespace(image_size=8), data=SimpleNamespace(max_pixels=64)
    )
    made.processor = SimpleNamespace(
        image_processor=SimpleNamespace(patch_size=2), tokenizer=SimpleNamespace(pad_token_id=0)
    )
    made.num_target_tokens, made.consistent_edit_scale = 9, False
    made.device = torch.device("cpu")
    row = Row("1", "", images, [], "editing", "", [])
    monkeypatch.setattr(kind, "read", lambda *_: (row, images))
    monkeypatch.setattr(kind, "conversation", lambda self, row, images: {"words": torch.tensor(len(images))})
    return made


SAMPLE = PlannedSample("train", RowFacts((), "", "1", "", "", [], ""), {})


def left_and_middle(pixels: torch.Tensor) -> str:
    """The strongest colours at the left edge and in the middle of (3, H, W) pixels; borders of stripes are blurred."""
    height, width = pixels.shape[1:]
    return "".join("RGB"[int(pixels[:, height // 2, column].argmax())] for column in (0, width // 2))


def test_a_generated_picture_is_cut_alike_for_its_embeddings_and_its_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = three_stripes((48, 24), RED, GREEN, BLUE)
    made = stage(EmbedGenerationStage, monkeypatch, [three_stripes((24, 24), BLUE, BLUE, BLUE), wide])
    prepared = made.prepare(SAMPLE)
    assert prepared["target"].shape == (3, 12, 12) and prepared["pixels"].shape == (3, 8, 8)
    for pixels in (prepared["target"], prepared["pixels"]):
        assert left_and_middle(pixels) == "GG"  # the middle half of the last picture
    assert prepared["words"] == 2 and prepared["target"].dtype == torch.uint8
    made.config.embed.predicted = made.config.embed.latents = False
    assert made.prepare(SAMPLE).keys() == {"target"}
    alone = stage(EmbedGenerationStage, monkeypatch, [wide]).prepare(SAMPLE)  # the row's only picture
    assert left_and_middle(alone["target"]) == left_and_middle(alone["pixels"]) == "GG"


@pytest.mark.parametrize("pixels", ["squash", "crop"])
def test_an_edit_squashes_its_source_and_does_with_its_result_as_it_is_told(
    pixels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pictures: the last one is the result, the one before it the source."""
    images = [
        three_stripes((24, 24), BLUE, BLUE, BLUE),
        three_stripes((1000, 500), RED, GREEN, BLUE),
        three_stripes((1000, 500), GREEN, BLUE, RED),
    ]
    made = stage(EmbedEditingStage, monkeypatch, images, pixels=pixels)
    prepared = made.prepare(SAMPLE)
    assert prepared["source"].shape == (3, 72, 72) and prepared["pixels"].shape == (3, 8, 8)
    assert left_and_middle(prepared["source"]) == "RG"
    assert left_and_middle(prepared["pixels"]) == ("GB" if pixels == "squash" else "BB")
    assert prepared["words"] == 3


def test_embeddings_are_those_of_the_last_target_of_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one, three and two targets: a pair for each target, in order."""
    made = stage(EmbedEditingStage, monkeypatch, [])
    made.model = made.tower = None
    made.compiled = False
    seen: dict[str, Any] = {}

    def pairs(model: Any, batch: Any, tower: Any, layer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        seen.update(batch, layer=layer)
        return [(torch.full((9, 4), float(number)), torch.full((9, 4), 100.0 + number)) for number in range(6)]

    monkeypatch.setattr(train.embed.stage, "teacher_forced_pairs", pairs)
    monkeypatch.setattr(train.embed.stage, "scaled_patches", lambda processor, patches: patches / 10)
    rows = []
    for num_targets in (1, 3, 2):
        labels = torch.full((5 + 9 * num_targets,), IGNORE_INDEX)
        labels[5:] = 7
        rows.append(
            {
                "input_ids": torch.ones(len(labels), dtype=torch.int64),
                "labels": labels,
                "pixel_values": torch.full((4 * num_targets, 6), 10.0 * num_targets),
                "image_grid_thw": torch.ones(num_targets, 3, dtype=torch.int64),
                "source": torch.zeros(1),
            }
        )
    predicted, true = made.predicted(rows)
    assert predicted.shape == true.shape == (3, 9, 4)
    assert predicted[:, 0, 0].tolist() == [0.0, 3.0, 5.0] and true[:, 0, 0].tolist() == [100.0, 103.0, 105.0]
    # All of one length: the group's, a multiple of 64; patches as the model takes them.
    assert seen["input_ids"].shape == (3, 64)
    assert seen["pixel_values"][:, 0].tolist() == [1.0] * 4 + [3.0] * 12 + [2.0] * 8
    assert seen["layer"] is train.embed.stage.decoder_layer
    made.predicted(rows[:1])  # a group may hold one row
    assert seen["input_ids"].shape == (1, 64)


@pytest.mark.parametrize("kind", [EmbedGenerationStage, EmbedEditingStage])
def test_predicted_and_true_embeddings_keep_their_names(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(kind, monkeypatch, [])
    predicted, true, looked, latents = (torch.full((2, 1, 1), value) for value in (1.0, 2.0, 3.0, 4.0))
    monkeypatch.setattr(kind, "predicted", lambda self, rows: (predicted, true))
    monkeypatch.setattr(kind, "vision", lambda self, pictures, tokens: looked * len(pictures))
    monkeypatch.setattr(kind, "latents", lambda self, pictures: latents)
    rows = [{name: torch.zeros(1) for name in ("target", "source", "pixels")}] * 2
    outputs = {name: float(values[0]) for name, values in made.embed(rows).items()}
    if kind is EmbedEditingStage:
        expected = {"target_embeds": 1.0, "source_embeds": 6.0, "gap.predicted": 1.0, "gap.true": 2.0, "latents": 4.0}
    else:
        expected = {
            "target_embeds": 6.0,
            "predicted_embeds": 1.0,
            "gap.predicted": 1.0,
            "gap.true": 6.0,
            "latents": 4.0,
        }
    assert outputs == expected


def test_latents_are_of_pixels_from_minus_one_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(EmbedGenerationStage, monkeypatch, [])
    monkeypatch.setattr(EmbedGenerationStage, "compute_dtype", torch.float32)
    made.vae = SimpleNamespace(encode=lambda pixels: pixels)
    latents = made.latents([torch.full((3, 2, 2), level, dtype=torch.uint8) for level in (0, 51, 255)])
    assert latents[:, 0, 0, 0].tolist() == pytest.approx([-1.0, -0.6, 1.0])
    batch = made.full_batch([torch.ones(3, 2, 2)] * 3)
    assert batch.shape == (4, 3, 2, 2) and batch.sum((1, 2, 3)).tolist() == [12, 12, 12, 0]  # a batch is of four


def test_what_a_row_reads_are_the_pictures_of_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pictures an address of two names the last two."""
    images = []
    for number in range(3):
        images.append(tmp_path / f"{number}.png")
        Image.new("RGB", (4, 4), (number, 0, 0)).save(images[-1])
    checked: list[Any] = []
    monkeypatch.setattr(train.embed.stage, "require_unchanged", lambda pictures, sample: checked.extend(pictures))
    made: Any = object.__new__(EmbedEditingStage)
    made._rows = {"train": {3: Row("1", "", images, [], "editing", "", [])}}
    sample = PlannedSample("train", RowFacts(3, "", "1", "", "", [], ""), {"pictures": ["a", "b"]})  # type: ignore[arg-type]
    _, opened = made.read(sample)
    assert [picture.getpixel((0, 0)) for picture in opened] == [(1, 0, 0), (2, 0, 0)] and checked == images[1:]


def test_what_shards_say_of_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (EmbedGenerationStage.num_reference_tokens, EmbedEditingStage.num_reference_tokens) == (0, 324)
    for predicted in (True, False):
        assert stage(EmbedGenerationStage, monkeypatch, [], predicted=predicted).stores_predicted is predicted
    assert not stage(EmbedEditingStage, monkeypatch, []).stores_predicted  # they hold nothing else
    monkeypatch.setattr(EmbedStage, "recipe", lambda self: {"encoder": "abc"})
    made = stage(EmbedEditingStage, monkeypatch, [], pixels="crop")
    assert made.recipe() == {"encoder": "abc", "pixels": "crop"}


def test_means_over_samples_by_hand() -> None:
    assert means([{"cosine": 0.5, "mse": 1.0}]) == {"cosine": 0.5, "mse": 1.0}
    assert means({"cosine": value} for value in (0.25, 0.5, 0.75, 0.9)) == {"cosine": 0.6}
    assert means([]) == {}
