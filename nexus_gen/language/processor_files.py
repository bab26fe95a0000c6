"""Where an autoregressive checkpoint keeps what reads text and pictures; what of it is missing or unfit. No torch."""

import json
import os
from pathlib import Path
from typing import Any

from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.tensor_shapes import read_config

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# Of the image processor -> of config.json's vision_config: how pictures are cut into patches.
PATCHES = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": "temporal_patch_size"}
# Of the tokenizer -> of config.json: the model finds pictures by their ids.
MARKS = {
    "<|image_pad|>": "image_token_id",
    "<|video_pad|>": "video_token_id",
    "<|vision_start|>": "vision_start_token_id",
    "<|vision_end|>": "vision_end_token_id",
}


def processor_directory(autoregressive: str | os.PathLike[str]) -> Path:
    """Where a checkpoint keeps its tokenizer and processor: beside the weights, or in `processor/`, which wins."""
    inside = Path(autoregressive) / "processor"
    return inside if inside.is_dir() else Path(autoregressive)


def image_processor_config(autoregressive: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """(the file, its values) by which pictures become patches, as transformers chooses them; None without any.

    The whole processor's config wins where it describes the image processor. Raises UserError for an unreadable one.
    """
    directory = processor_directory(autoregressive)
    for name in (PROCESSOR, PREPROCESSOR):
        path = directory / name
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                values = values.get("image_processor") if name == PROCESSOR else values
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(f"{path} is not readable ({error}); download it again") from error
            if values is not None:
                return path, values
    return None


def missing_processor_files(autoregressive: str | os.PathLike[str]) -> list[str]:
    """What a checkpoint lacks to read text and pictures, as sentences."""
    directory = processor_directory(autoregressive)

    def lacks(*names: str) -> bool:
        return not any((directory / name).is_file() for name in names)

    alternatives = (("tokenizer.json", "vocab.json"), ("tokenizer_config.json",))
    lacking = [" or ".join(names) for names in alternatives if lacks(*names)]
    if image_processor_config(autoregressive) is None:
        lacking.append(PREPROCESSOR)
    if not lacks("vocab.json") and lacks("tokenizer.json", "merges.txt"):
        lacking.append("merges.txt")
    return [f"no {', '.join(lacking)}: text and pictures cannot be read"] if lacking else []


def unfit_processor(autoregressive: str | os.PathLike[str]) -> list[str]:
    """Where a checkpoint's tokenizer and processor do not fit its config.json, as sentences.

    Raises UserError for configs that are unreadable.
    """
    config = read_config(Path(autoregressive)) or {}
    problems = []
    found = image_processor_config(autoregressive)
    if found is not None:
        path, values = found
        vision = config.get("vision_config") or {}
        problems += [
            f"{path.name} has {name} {values[name]} and config.json {field} {vision[field]}"
            for name, field in PATCHES.items()
            if name in values and field in vision and values[name] != vision[field]
        ]
    path = processor_directory(autoregressive) / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = json.loads(path.read_text(encoding="utf-8"))
            ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
            largest = max((*ids.values(), *tokenizer["model"]["vocab"].values()), default=0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [*problems, f"{path.name} cannot be read ({error!r})"]
        problems += [
            f"{path.name} has {mark} at {ids[mark]} and config.json {field} {config[field]}"
            for mark, field in MARKS.items()
            if mark in ids and field in config and ids[mark] != config[field]
        ]
        rows = (config.get("text_config") or config).get("vocab_size")
        if isinstance(rows, int) and largest >= rows:
            problems.append(f"{path.name} has ids up to {largest} and the model {rows} embeddings")
    return problems


def require_processor(directory: Path) -> None:
    """UserError unless a checkpoint has a tokenizer and a processor, and those of this model."""
    for problem in missing_processor_files(directory):
        raise UserError(f"{directory} holds {problem}; copy them from the checkpoint that it was trained from")
    if problems := unfit_processor(directory):
        raise UserError(
            f"the tokenizer and processor in {directory} do not fit its model: {'; '.join(problems)}; copy them from "
            "the checkpoint that it was trained from"
        )
