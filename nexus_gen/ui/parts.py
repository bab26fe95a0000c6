"""What the page of `nexus-gen ui` needs of Gradio beyond its own components: picture and number inputs, the look."""

import os
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.component_meta import ComponentMeta
from gradio.data_classes import ImageData
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from nexus_gen.pictures.images import EncodedImage
from nexus_gen.specs.numbers import read_number

# Pictures of 72 pixels are shown as large as those of 512, with their pixels to be seen.
CSS = """
footer { display: none !important; }
.picture img { object-fit: contain !important; width: 100%; height: 100%; }
.small img { image-rendering: pixelated; }
"""
# Fonts of the system: nothing to fetch, and Chinese is in them.
FONTS = ("system-ui", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "sans-serif")


class WithoutStubs(ComponentMeta):
    """Gradio's own metaclass writes a .pyi file beside the module of every component that is defined."""

    def __new__(cls, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


class Picture(gr.Image, metaclass=WithoutStubs):
    """Gives handlers the bytes that were uploaded, under the name that the person knows, and opens nothing itself.

    Pictures come from the browser: a request that names an address is refused, where Gradio would fetch it.
    """

    is_template = True  # looks and behaves as gr.Image in the browser

    def preprocess(self, payload: ImageData | None) -> EncodedImage | None:  # type: ignore[override]
        if payload is None or payload.path is None:
            return None
        path = Path(payload.path)
        return EncodedImage(payload.orig_name or path.name, path.read_bytes())

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            raise gr.Error("pictures are uploaded here, not fetched from an address", print_exception=False)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class Number(gr.Number, metaclass=WithoutStubs):
    """Refuses infinity and NaN; the latter passes the bounds of Gradio's own, which compare."""

    is_template = True

    def preprocess(self, payload: float | None) -> float | int | None:
        return None if payload is None else super().preprocess(checked_number(self.label, payload))


class Slider(gr.Slider, metaclass=WithoutStubs):
    """Refuses what is no finite number, as `Number` does; a cleared one too."""

    is_template = True

    def preprocess(self, payload: float) -> float:
        return super().preprocess(checked_number(self.label, payload))


def checked_number(label: Any, value: Any) -> float:
    try:
        return read_number(value)
    except ValueError as error:
        raise gr.Error(f"{label} is {error}", print_exception=False) from error


def theme() -> gr.themes.Base:
    return gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace"))


def save_picture(picture: Image.Image) -> str:
    """A PNG where Gradio serves it from and, after a day, deletes it."""
    return save_pil_to_cache(picture, cache_dir=os.environ["GRADIO_TEMP_DIR"], format="png")
