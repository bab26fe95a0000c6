"""CLIP and T5 as FLUX reads prompts: the constants of the empty and of the negative prompt.

The decoders paint from image embeddings, so prompts are encoded once, before any transformer is on the device.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from nexus_gen.compat import ensure_torchvision, quiet_loading
from nexus_gen.specs.errors import UserError

ensure_torchvision()

from transformers import (  # noqa: E402
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    T5EncoderModel,
)

CONTEXT_LENGTH = 512  # T5 tokens of FLUX.1-dev
POOLED_LENGTH = 77  # CLIP tokens


@torch.no_grad()
def encode_pooled(flux_dir: str | Path, text: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """CLIP's output at the end of the text: (1, pooled_dim) in `dtype` on `device`; the model is freed afterwards.

    flux_dir: a FLUX.1-dev directory. Raises UserError when its CLIP is missing or incomplete.
    """
    ids = tokenize(Path(flux_dir) / "tokenizer", text, POOLED_LENGTH)
    model = load_encoder(CLIPTextModel, Path(flux_dir) / "text_encoder", dtype, device)
    return model(ids.to(device)).pooler_output


@torch.no_grad()
def encode_context(flux_dir: str | Path, text: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """T5's output for the text padded to 512 tokens: (1, 512, context_dim); padding is attended, as FLUX was trained.

    Otherwise as `encode_pooled`, from the directory's `text_encoder_2` and `tokenizer_2`.
    """
    ids = tokenize(Path(flux_dir) / "tokenizer_2", text, CONTEXT_LENGTH)
    model = load_encoder(T5EncoderModel, Path(flux_dir) / "text_encoder_2", dtype, device)
    return model(ids.to(device)).last_hidden_state


def encode_prompt(
    flux_dir: str | Path, text: str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """(context, pooled): (1, 512, context_dim) and (1, pooled_dim), one model in memory at a time."""
    return encode_context(flux_dir, text, dtype, device), encode_pooled(flux_dir, text, dtype, device)


def tokenize(directory: Path, text: str, length: int) -> Tensor:
    """Token ids padded or cut to `length`: (1, length)."""
    require_directory(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} does not hold a whole tokenizer: {first_line(error)}") from error
    return tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load_encoder(
    kind: type[PreTrainedModel], directory: Path, dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    """A text encoder sized by the directory's config.json; UserError when a weight is missing or misshapen."""
    require_directory(directory)
    try:
        with quiet_loading():
            loaded: Any = kind.from_pretrained(
                directory, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory} does not hold a whole {kind.__name__}: {first_line(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{directory} lacks {len(missing)} tensors of a {kind.__name__}, the first is {missing[0]}")
    return model.to(device).eval()


def require_directory(directory: Path) -> None:
    """UserError unless this part of a FLUX.1-dev directory is there."""
    if not directory.is_dir():
        raise UserError(
            f"{directory} does not exist; give a FLUX.1-dev directory with its text encoders and tokenizers"
        )


def first_line(error: Exception) -> str:
    """What a library's error says, without the pages of advice that follow."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
