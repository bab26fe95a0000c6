"""From messages and pictures to the model's inputs: chat template, image tokens, patches, labels of target images.

A message's content holds `<image>` where a picture goes; pictures of user turns are context, those of assistant turns
are targets. Legend: B rows, S sequence positions, N vision tokens after merging.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nexus_gen.language.model import IGNORE_INDEX
from nexus_gen.pictures.images import PictureSizing
from nexus_gen.specs.geometry import MERGE_SIZE, RELEASED_TARGET_TOKENS, patches_per_side
from nexus_gen.specs.prompts import IMAGE_TAG
from nexus_gen.tensors.compat import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLProcessor  # noqa: E402

Messages = Sequence[dict[str, str]]


def target_size(processor: Qwen2_5_VLProcessor, num_target_tokens: int) -> int:
    """Pixels per side of a target image: 252 for 81 tokens at patch 14."""
    return patches_per_side(num_target_tokens) * processor.image_processor.patch_size


def resized(
    images: Sequence[Image.Image],
    is_target: Sequence[bool],
    sizing: PictureSizing,
    coming: tuple[int, int] | None = None,
) -> list[Image.Image]:
    """The pictures of a conversation in the sizes that the model sees them in (bicubic); arguments as of `sizes`."""
    sizes = sizing.sizes([image.size for image in images], is_target, coming)
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(images, sizes, strict=True)]


def patches(processor: Qwen2_5_VLProcessor, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """pixel_values (patches, values) and image_grid_thw (images, 3) of pictures that already have their final size."""
    features = processor.image_processor(images=list(images), do_resize=False, return_tensors="pt")
    return features["pixel_values"], features["image_grid_thw"]


def byte_patches(processor: Qwen2_5_VLProcessor, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """`patches` as uint8 before they are scaled: a quarter to hand to another process or device."""
    features = processor.image_processor(
        images=list(images), do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    return features["pixel_values"], features["image_grid_thw"]


def scaled_patches(processor: Qwen2_5_VLProcessor, byte_patches: Tensor) -> Tensor:
    """`pixel_values` of `byte_patches`, float32 on their device: bit for bit those of `patches` on a CPU."""
    image_processor: Any = processor.image_processor
    mean, std = (
        torch.tensor(values, device=byte_patches.device) * (1.0 / image_processor.rescale_factor)
        for values in (image_processor.image_mean, image_processor.image_std)
    )
    by_channel = byte_patches.view(len(byte_patches), len(mean), -1).float()
    return ((by_channel - mean[:, None]) / std[:, None]).flatten(1)


def encode(
    processor: Qwen2_5_VLProcessor,
    messages: Messages,
    images: Sequence[Image.Image],
    max_pixels: int,
    reply_prefix: str | None = None,
    *,
    consistent_edit_scale: bool = False,
    num_target_tokens: int = RELEASED_TARGET_TOKENS,
    as_bytes: bool = False,
) -> dict[str, Tensor]:
    """One conversation as (S,) input_ids and labels, pixel_values and image_grid_thw (absent without pictures).

    labels: -100 but at the tokens of target images, which are what embeddings are predicted for.
    reply_prefix: open an assistant turn that begins with these words, for the model to go on from.
    consistent_edit_scale: context pictures take the square of the target that follows, which may be the one to come.
    num_target_tokens: the model's. as_bytes: pixel_values are `byte_patches`.
    """
    tokenizer: Any = processor.tokenizer
    is_target_image = [
        message["role"] == "assistant" for message in messages for _ in range(message["content"].count(IMAGE_TAG))
    ]
    patch_size = processor.image_processor.patch_size
    sizing = PictureSizing(
        patch_size, max_pixels, consistent_edit_scale=consistent_edit_scale, num_target_tokens=num_target_tokens
    )
    coming = sizing.target_size((1, 1)) if reply_prefix is not None else None
    sized = resized(images, is_target_image, sizing, coming)
    counts = [image.width * image.height // (MERGE_SIZE * patch_size) ** 2 for image in sized]
    remaining = iter(counts)

    def with_image_tokens(content: str) -> str:
        head, *tails = content.split(IMAGE_TAG)
        tokens = (f"<|vision_start|>{'<|image_pad|>' * next(remaining)}<|vision_end|>{tail}" for tail in tails)
        return head + "".join(tokens)

    expanded = [{"role": message["role"], "content": with_image_tokens(message["content"])} for message in messages]
    text = tokenizer.apply_chat_template(expanded, tokenize=False, add_generation_prompt=reply_prefix is not None)
    input_ids = tokenizer(text + (reply_prefix or ""), return_tensors="pt").input_ids[0]
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    of_target = torch.repeat_interleave(
        torch.tensor(is_target_image, dtype=torch.bool), torch.tensor(counts, dtype=torch.long)
    )
    positions = (input_ids == image_token).nonzero().flatten()
    labels[positions[of_target]] = image_token
    encoded = {"input_ids": input_ids, "labels": labels}
    if sized:
        encoded["pixel_values"], encoded["image_grid_thw"] = (byte_patches if as_bytes else patches)(processor, sized)
    return encoded


def collate(rows: Sequence[dict[str, Tensor]], padding_id: int, length: int = 0) -> dict[str, Tensor]:
    """Rows of `encode` as one batch, padded on the left: (B, S) input_ids, attention_mask and labels, all patches.

    S is the longest row, or `length` when that is longer.
    """

    def pad(tensors: Sequence[Tensor], value: int) -> Tensor:
        padded = torch.nn.utils.rnn.pad_sequence(
            list(tensors), batch_first=True, padding_value=value, padding_side="left"
        )
        return torch.nn.functional.pad(padded, (max(0, length - padded.shape[1]), 0), value=value)

    batch = {
        "input_ids": pad([row["input_ids"] for row in rows], padding_id),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], IGNORE_INDEX),
    }
    with_images = [row for row in rows if "pixel_values" in row]
    if with_images:
        batch["pixel_values"] = torch.cat([row["pixel_values"] for row in with_images])
        batch["image_grid_thw"] = torch.cat([row["image_grid_thw"] for row in with_images])
    return batch
