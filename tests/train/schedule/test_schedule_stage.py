"""What stage=schedule measures, on values that are known beforehand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.messages.rows import Row
from nexus_gen.specs.errors import UserError
from train.schedule.stage import Measuring, as_pixels, resampled, spread


def test_pixels_lie_between_minus_one_and_one() -> None:
    picture = Image.new("RGB", (3, 2), (0, 255, 51))
    pixels = as_pixels(picture)
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 1, 2].tolist() == pytest.approx([-1.0, 1.0, 51 / 127.5 - 1])


def test_the_spread_is_the_cosine_distance_of_different_pictures() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])  # N = 1, D = 2
    assert spread(torch.stack([one, other])) == pytest.approx(1.0)
    assert spread(torch.stack([one, 3 * one])) == pytest.approx(0.0, abs=1e-6)
    assert spread(torch.stack([one, -one])) == pytest.approx(2.0)
    # Around the ring of three: 0 between the first two, 1 and 1 on to the third and back.
    assert spread(torch.stack([one, one, other])) == pytest.approx(2 / 3)
    assert spread(one[None]) == 0.0


def test_references_repeat_the_nearest_token() -> None:
    grid = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])  # 2 x 2
    wanted = [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]
    assert resampled(grid, 4).flatten().tolist() == wanted


class Blurred:
    """An autoencoder that gives every value back too large by `error`."""

    def __init__(self, error: float) -> None:
        self.error = error

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents + self.error


def test_the_reconstruction_is_in_dB_of_the_whole_range() -> None:
    measuring: Any = object.__new__(Measuring)
    measuring.config = SimpleNamespace(model=SimpleNamespace(image_size=4))
    measuring.device, measuring.dtype = torch.device("cpu"), torch.float32
    pictures = [Image.new("RGB", (6, 6), (51, 51, 51)), Image.new("RGB", (4, 4), (102, 102, 102))]
    latents, psnr = measuring.reconstruct(Blurred(0.2), pictures)
    assert latents.shape == (2, 3, 4, 4)
    assert psnr == pytest.approx(20.0, abs=1e-3)  # 10 log10(4 / 0.04)


def row(*images: Path, makes: bool) -> Row:
    tags = "<image>" * len(images)
    messages = [
        {"role": "user", "content": "" if makes else tags},
        {"role": "assistant", "content": tags if makes else "A dot."},
    ]
    task = "generation" if makes else "understanding"
    return Row("id", "own", list(images), messages, task, "rows.jsonl:1", [{"": [m["content"]]} for m in messages])


def test_pictures_that_cannot_be_opened_are_passed_over_and_replies_come_first(tmp_path: Path) -> None:
    paths = {}
    for name, grey in (("made", 10), ("seen", 20)):
        paths[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (4, 4), (grey, grey, grey)).save(paths[name])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    measuring: Any = object.__new__(Measuring)
    measuring.config = SimpleNamespace(
        schedule=SimpleNamespace(num_pictures=2), data=SimpleNamespace(train="rows.jsonl")
    )
    seen, made, cut = row(paths["seen"], makes=False), row(paths["made"], makes=True), row(broken, makes=True)

    def greys(*rows: Row) -> list[int]:
        return [picture.getpixel((0, 0))[0] for picture in measuring.pictures(list(rows))]

    assert greys(seen, cut, made) == [10]
    assert greys(seen) == [20]
    assert greys(made, made, made) == [10, 10]
    with pytest.raises(UserError, match=r"rows.jsonl: none of 1 rows looked at shows a picture that can be read"):
        greys(cut)
