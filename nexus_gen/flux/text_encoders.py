"""CLIP and T5 as FLUX reads prompts: the constants of the empty and of the negative prompt.

The decoders paint from image embeddings, so prompts are encoded once, before any transformer is on the device.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_gen.flux.text_shapes import FOLDERS, text_weights
from nexus_gen.specs.errors import UserError, first_line
from nexus_gen.tensors.compat import ensure_torchvision
from nexus_gen.tensors.files import TensorFiles
from nexus_gen.tensors.kinds import TextEncoder
from nexus_gen.tensors.pretrained import load_pretrained
from nexus_gen.tensors.tensor_shapes import read_config
from nexus_gen.tensors.translation import require_fit

ensure_torchvision()

from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel  # noqa: E402

KINDS: dict[TextEncoder, Any] = {"CLIP": CLIPTextModel, "T5": T5EncoderModel}
CONTEXT_LENGTH = 512  # T5 tokens of FLUX.1-dev
POOLED_LENGTH = 77  # CLIP tokens


@torch.no_grad()
def encode_pooled(flux_dir: str | Path, text: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """CLIP's output at the end of the text: (1, pooled_dim) in `dtype` on `device`; the model is freed afterwards.

    flux_dir: a FLUX.1-dev directory. Raises UserError when its CLIP is missing or incomplete.
    """
    ids = tokenize(Path(flux_dir) / FOLDERS["CLIP"][1], text, POOLED_LENGTH)
    model = load_encoder("CLIP", Path(flux_dir), dtype, device)
    return model(ids.to(device)).pooler_output


@torch.no_grad()
def encode_context(flux_dir: str | Path, text: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """T5's output for the text padded to 512 tokens: (1, 512, context_dim); padding is attended, as FLUX was trained.

    Otherwise as `encode_pooled`, from the directory's `text_encoder_2` and `tokenizer_2`.
    """
    ids = tokenize(Path(flux_dir) / FOLDERS["T5"][1], text, CONTEXT_LENGTH)
    model = load_encoder("T5", Path(flux_dir), dtype, device)
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
    except Exception as error:  # as of `load_processor`
        raise UserError(f"{directory} holds no whole tokenizer ({first_line(error)}); download it again") from error
    return tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def load_encoder(encoder: TextEncoder, flux_dir: Path, dtype: torch.dtype, device: str | torch.device) -> Any:
    """A text encoder of a FLUX.1-dev directory, sized by its config.json, in eval mode.

    Raises UserError, before weights are read, for every key that is missing, unexpected or misshapen.
    """
    directory = flux_dir / FOLDERS[encoder][0]
    require_directory(directory)
    config = read_config(directory)
    files = TensorFiles(directory, device)
    weights = text_weights(encoder, {key: files.header(key).shape for key in files}, directory, config)
    require_fit(files.path, KINDS[encoder].__name__, weights.differences)
    for first, second in weights.repeated:
        if not torch.equal(files[first], files[second]):
            raise UserError(
                f"{directory} holds {first} and {second}, one embedding, with two values; download it again"
            )
        files.release(second)
    return load_pretrained(KINDS[encoder], KINDS[encoder].config_class.from_dict(config), files, weights.sources, dtype)


def require_directory(directory: Path) -> None:
    """UserError unless this part of a FLUX.1-dev directory is there."""
    if not directory.is_dir():
        raise UserError(
            f"{directory} does not exist; give a FLUX.1-dev directory with its text encoders and tokenizers"
        )
