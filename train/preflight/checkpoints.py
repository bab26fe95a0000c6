"""Whether a directory is a Qwen2.5-VL checkpoint that a stage can use, by its config.json and its files' headers."""

import os
from pathlib import Path
from typing import Any

from nexus_gen.language.processor_files import require_processor
from nexus_gen.parts.models import target_tokens_of
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.fit import require_autoregressive
from nexus_gen.tensors.headers import read_checkpoint
from nexus_gen.tensors.tensor_shapes import read_config
from nexus_gen.tensors.weight_files import has_weights


def require_checkpoint(key: str, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a Qwen2.5-VL checkpoint directory; UserError when it is something else."""
    config = Path(directory) / "config.json"
    if not config.is_file():
        raise UserError(f"{key}: {directory} holds no config.json; give a Qwen2.5-VL or Nexus-Gen checkpoint directory")
    values = read_config(Path(directory)) or {}
    if values.get("model_type") != "qwen2_5_vl":
        raise UserError(f"{key}: {directory} holds a {values.get('model_type')} model; a qwen2_5_vl one is needed")
    return values


def require_whole(checkpoint: Path) -> None:
    """UserError when a checkpoint's weights, tokenizer or processor do not fit its config.json.

    Some stages read them before they load them.
    """
    if has_weights(checkpoint):  # the loader names a directory that holds none
        require_autoregressive(checkpoint, read_checkpoint(checkpoint).shapes)
        require_processor(checkpoint)


def require_target_tokens(checkpoint: str, wanted: int) -> None:
    """UserError when the model that pretraining begins with makes pictures of other than `wanted` tokens."""
    own = target_tokens_of(Path(checkpoint))
    if own is not None and own != wanted:
        raise UserError(
            f"model.num_target_tokens is {wanted} and model.qwen {checkpoint} makes pictures of {own} tokens; "
            f"give model.num_target_tokens={own}, or begin with a plain Qwen2.5-VL"
        )
