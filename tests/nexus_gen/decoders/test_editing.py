"""How pictures of an edit reach the models and how results come back; what is painted is a stand-in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nexus_gen.commands.use import main
from nexus_gen.inference import NexusGen
from nexus_gen.parts.models import DECODER_KINDS, RELEASED, SHIPPED_RUN, ModelPaths
from nexus_gen.specs.errors import UserError


class Recorder(NexusGen):
    """Keeps what the parts are called with; paints the number of a row and its seed as a colour."""

    def __init__(self, details: dict[str, Any]) -> None:
        # Not NexusGen's own, which looks at the files of all parts: there are none.
        self.paths = ModelPaths(Path("none"), 5184, DECODER_KINDS[1], Path("none"), Path("none"), details)
        self.prompts: list[str] = []
        self.shown: list[list[tuple[int, int]]] = []
        self.references: list[tuple[int, int]] = []
        self.batches: list[tuple[tuple[int, int], list[int]]] = []

    def imagine_all(self, contents: list[str], replies: Any, images: list[list[Any]], *_: Any) -> torch.Tensor:
        self.prompts += contents
        self.shown += [[image.size for image in of_row] for of_row in images]
        return torch.arange(len(contents))[:, None, None].float()

    def source_embeds(self, *images: Any) -> torch.Tensor:
        self.references += [image.size for image in images]
        return torch.arange(len(images))[:, None, None].float()

    def paint(self, target_embeds: Any, source_embeds: Any = None, *, width: int, height: int, seed: Any) -> Any:  # type: ignore[override]
        assert source_embeds is None or torch.equal(target_embeds, source_embeds)
        rows = [int(row) for row in target_embeds.flatten()]
        self.batches.append(((width, height), rows))
        seeds = [seed] * len(rows) if isinstance(seed, int) else seed
        return [Image.new("RGB", (width, height), (row, one, 0)) for row, one in zip(rows, seeds, strict=True)]

    def answer_all(self, contents: list[str], images: Any, *_: Any, **__: Any) -> list[str]:
        self.prompts += contents
        return ["yes"]


def sized(*sizes: tuple[int, int]) -> list[Any]:
    return [Image.new("RGB", size) for size in sizes]


def test_the_last_of_several_pictures_is_edited_and_all_are_seen_in_order() -> None:
    model = Recorder(RELEASED["editing_decoder"])
    result = model.edit(sized((30, 40), (500, 333)), "Put {it} there.", seed=7)
    assert model.prompts == ["<image> <image> Put {it} there."]
    assert model.shown == [[(30, 40), (500, 333)]] and model.references == [(500, 333)]
    assert result.size == (624, 416) and result.getpixel((0, 0)) == (0, 7, 0)
    model.edit(*sized((64, 64)), "Put {it} there.")
    assert model.prompts[1:] == ["<image> Put {it} there."]
    model.understand(sized((3, 4), (5, 6), (7, 8)), "Which?")
    model.understand(*sized((3, 4)), "Which?")
    assert model.prompts[2:] == ["<image>\n<image>\n<image>\nWhich?", "<image>\nWhich?"]


def test_a_batch_of_pictures_of_any_aspect_keeps_its_order_and_its_seeds() -> None:
    sources = [(500, 333), (64, 64), (333, 500), (500, 333), (64, 64)]
    native = Recorder(RELEASED["editing_decoder"])
    results = native.edit_all(["a"] * 5, ["b"] * 5, [sized(size) for size in sources], seed=list(range(10, 15)))
    assert native.batches == [((624, 416), [0, 3]), ((512, 512), [1, 4]), ((416, 624), [2])]
    assert [result.getpixel((0, 0)) for result in results] == [(row, 10 + row, 0) for row in range(5)]
    stretched = Recorder({**RELEASED["editing_decoder"], "aspect": "stretch", "reference": False})
    results = stretched.edit_all(["a"] * 5, ["b"] * 5, [sized(size) for size in sources], seed=3)
    assert stretched.batches == [((512, 512), [0, 1, 2, 3, 4])]  # as squares are: one batch
    assert not stretched.references and stretched.shown[1] == [(64, 64)]
    assert [result.size for result in results] == [(628, 418), (512, 512), (418, 628), (628, 418), (512, 512)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--width", "90"], "--width 90 and --height 56 must be multiples of 8"),
        (["--width", "96", "--aspect", "pad"], "leave --aspect and --size out"),
        (["--aspect", "square", "--size", "input"], "not the size of the input"),
        (["--input-image", "cut.png"], "picture cut.png cannot be read"),
        (["--input-image", "gone.png"], "--input-image gone.png does not exist"),
        (["--input-image", "thin.png", "--aspect", "native"], "more than 200 times as long"),
    ],
)
def test_impossible_edits_are_refused_before_weights_load(
    options: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nexus_gen.inference.load_autoregressive", lambda *_, **__: pytest.fail("weights were read"))
    Image.new("RGB", (500, 333)).save("source.png")
    Image.new("RGB", (4000, 5)).save("thin.png")
    Path("cut.png").write_bytes(Path("source.png").read_bytes()[:100])
    with pytest.raises(UserError, match=sentence):
        main(["edit", "--run", str(SHIPPED_RUN), "--input-image", "source.png", "--instruction", "x", *options])
