"""HEIC, the format of phones: read where the extra is installed, named with its remedy where it is not."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from nexus_gen.pictures import images
from nexus_gen.pictures.images import EncodedImage, open_image, open_size
from nexus_gen.specs.errors import UserError

HEADS = [b"\0\0\0\x1cftyp" + brand + b"\0\0\0\0mif1heic" for brand in (b"heic", b"heix", b"mif1")]


@pytest.fixture
def without_the_extra(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    images._formats.cache_clear()
    yield
    images._formats.cache_clear()


@pytest.mark.usefixtures("without_the_extra")
@pytest.mark.parametrize("head", HEADS)
def test_without_the_extra_the_error_names_it(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(head)
    for source in (path, EncodedImage("a.heic of rows.tar", head)):
        with pytest.raises(UserError, match=r"a\.heic.* cannot be read .*pip install pillow-heif"):
            open_image(source)
    (tmp_path / "b.heic").write_bytes(b"<html>")
    with pytest.raises(UserError, match="replace it"):
        open_image(tmp_path / "b.heic")


def test_with_the_extra_it_is_read(tmp_path: Path) -> None:
    pixels = np.full((32, 48, 3), (200, 30, 60), dtype=np.uint8)
    path = tmp_path / "a.HEIC"
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path)
    assert open_size(path) == open_image(path).size == (48, 32)
    assert np.abs(np.asarray(open_image(path)).astype(int) - pixels).max() < 16
