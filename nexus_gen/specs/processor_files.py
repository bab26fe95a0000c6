"""Where an autoregressive checkpoint keeps what reads text and pictures, and what of it is missing. No torch."""

import json
import os
from pathlib import Path
from typing import Any

from nexus_gen.specs.errors import UserError

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


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
