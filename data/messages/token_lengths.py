"""How many tokens a row becomes in training: its text by the checkpoint's tokenizer, its pictures by arithmetic.

No torch and no model: a million rows are measured in the time that a loader would need for their pictures. A test in
tests/train holds the lengths equal to those of the training template.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.messages.rows import Row
from nexus_gen.language.processor_files import image_processor_config, processor_directory
from nexus_gen.pictures.images import PictureSizing
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import MERGE_SIZE, RELEASED_TARGET_TOKENS
from nexus_gen.specs.prompts import IMAGE_TAG

if TYPE_CHECKING:
    from tokenizers import Tokenizer

IMAGE_TOKEN = "<|image_pad|>"
IMAGE_MARKUP = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
DEFAULT_SYSTEM = "You are a helpful assistant."
Size = tuple[int, int]  # width, height in pixels, as oriented


@dataclass(frozen=True)
class Length:
    """Tokens of a row, and where each of its pictures lies among them: (first, behind the last)."""

    total: int
    pictures: list[tuple[int, int]]


class TokenLengths:
    """Lengths under the processor of a Qwen2.5-VL directory, of pictures in the sizes of a `PictureSizing`."""

    def __init__(
        self,
        qwen: str | os.PathLike[str],
        max_pixels: int,
        dynamic_targets: bool = False,
        consistent_edit_scale: bool = False,
        num_target_tokens: int = RELEASED_TARGET_TOKENS,
    ) -> None:
        self.patch_size = read_patch_size(Path(qwen))
        self.max_pixels = max_pixels
        self._sizing = PictureSizing(
            self.patch_size, max_pixels, dynamic_targets, consistent_edit_scale, num_target_tokens
        )
        self._tokenizer = load_tokenizer(Path(qwen))
        image_token = self._tokenizer.token_to_id(IMAGE_TOKEN)
        if image_token is None:
            raise UserError(f"the tokenizer of {qwen} has no token {IMAGE_TOKEN}; give a Qwen2.5-VL directory")
        self._image_token: int = image_token

    def measure(self, rows: Sequence[Row], sizes: Sequence[Sequence[Size]]) -> list[Length]:
        """One length per row; sizes: of all pictures of each row, in tag order. ValueError for an aspect out of range.

        Of texts to choose from the longest counts. Text is tokenized in the pieces in which the training template does
        it: a reply apart from what comes before.
        """
        pieces = [row_pieces(longest(row)) for row in rows]
        encoded = self._tokenizer.encode_batch_fast([text for row in pieces for text in row], add_special_tokens=False)
        remaining = iter(encoded)
        lengths = []
        for row, texts, of_row in zip(rows, pieces, sizes, strict=True):
            ids = [token for _ in texts for token in next(remaining).ids]
            lengths.append(self._expand(ids, self.picture_tokens(row, of_row)))
        return lengths

    def picture_tokens(self, row: Row, sizes: Sequence[Size]) -> list[int]:
        """Tokens of each picture, in tag order."""
        is_target = [m["role"] == "assistant" for m in row.messages for _ in range(m["content"].count(IMAGE_TAG))]
        unit = MERGE_SIZE * self.patch_size
        return [math.prod(size) // unit**2 for size in self._sizing.sizes(sizes, is_target)]

    def _expand(self, ids: list[int], counts: list[int]) -> Length:
        """Each image token becomes as many as its picture has."""
        pictures, grown, start = [], 0, 0
        for count in counts:
            start = ids.index(self._image_token, start)
            pictures.append((start + grown, start + grown + count))
            grown += count - 1
            start += 1
        return Length(len(ids) + grown, pictures)


def longest(row: Row) -> list[dict[str, str]]:
    """The row's messages, of every choice the text of most characters."""
    return [
        {**message, "content": max((text for texts in choice.values() for text in texts), key=len)}
        for message, choice in zip(row.messages, row.choices, strict=True)
    ]


def row_pieces(messages: list[dict[str, str]]) -> list[str]:
    """The chat text of a conversation, cut where the training template cuts it."""
    pieces: list[str] = []
    head = f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    for message in messages:
        content = message["content"].replace(IMAGE_TAG, IMAGE_MARKUP)
        if message["role"] == "system":
            head = f"<|im_start|>system\n{content}<|im_end|>\n" if content else ""
        elif message["role"] == "user":
            pieces.append(f"{head}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n")
            head = ""
        else:
            pieces.append(f"{content}<|im_end|>\n")
    return pieces


def read_patch_size(qwen: Path) -> int:
    """Pixels per side of a vision patch, from the config of the image processor or of the whole processor."""
    found = image_processor_config(qwen)
    if found is None:
        raise UserError(
            f"{qwen} holds no preprocessor_config.json; give a Qwen2.5-VL directory with its processor "
            "(model.qwen, or --model)"
        )
    path, values = found
    try:
        return int(values["patch_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} gives no patch_size ({error!r}); download it again") from error


def load_tokenizer(qwen: Path) -> "Tokenizer":
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # worker processes are the parallelism; threads do not survive a fork
    )
    from tokenizers import Tokenizer

    path = processor_directory(qwen) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a Qwen2.5-VL directory with its tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is no tokenizer ({error}); download it again") from error
