"""Held-out rows of a run as examples of what to ask its models."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from nexus_gen.pictures.images import EncodedImage, StoredImage
from nexus_gen.specs.prompts import LANGUAGES, words_of

NUM_EXAMPLES = 3  # of each task and language, each of another category


@dataclass(frozen=True)
class Example:
    """What a person would type, and the picture that it is about; None for a prompt."""

    words: str
    picture: StoredImage | None


def stored(directory: Path, image: str) -> StoredImage:
    """A row's picture: a file beside the rows, or the row's own bytes as a data URI."""
    head, _, data = image.partition(";base64,")
    return EncodedImage("example", base64.b64decode(data)) if head.startswith("data:") else directory / image


def examples_of(run: Path) -> dict[str, list[Example]]:
    """Task -> examples in every language, from the run's own dataset; empty for a run that drew none."""
    rows = run / "shapes" / "artifact" / "heldout.jsonl"
    found: dict[str, dict[tuple[str, str], Example]] = {}
    for line in rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else ():
        row = json.loads(line)
        truth = row["truth"]
        of_task = found.setdefault(truth["task"], {})
        picture = None if truth["task"] == "generation" else stored(rows.parent, row["images"][0])
        example = Example(words_of(row["messages"][0]["content"]), picture)
        of_task.setdefault((truth["language"], truth["category"]), example)
    return {
        task: [
            example
            for language in LANGUAGES
            for example in [example for (spoken, _), example in of_task.items() if spoken == language][:NUM_EXAMPLES]
        ]
        for task, of_task in found.items()
    }
