"""The procedural dataset: questions, captions and edits about coloured shapes, with ground truth beside each row.

nexus-gen data shapes OUT --num-train 10000 --image-size 252

Deterministic in its seed. A content decides the split that it may enter, whatever the seed. `compositional` takes all
that combine a colour with a shape, or both with a place, as `data.shapes.contents` reserves them: training shows each
part, never the combination. Of the others the hash decides between `train` and `heldout`, so no held-out scene is
trained on by its task in another wording or language. No torch here: launchers import it.
"""

import dataclasses
import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.shapes.contents import CATEGORIES, Content, Imagination, ShapesConfig, with_new_names
from data.shapes.scenes import draw
from nexus_gen.artifacts.artifact import MANIFEST, Manifest, building, seal
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import (
    EDITING_PROMPT,
    EDITING_REPLY,
    GENERATION_PROMPT,
    GENERATION_REPLY,
    UNDERSTANDING_PROMPT,
)

SPLITS = ("train", "heldout", "compositional")
# Captions of single objects say no colour and no place, so they combine nothing.
NO_NEW_COMBINATION = ("compositional", "single_object")
HELDOUT_SHARE = 8  # one in so many contents may only be held out
ROWS_PER_CHUNK = 64
DEFAULTS = ShapesConfig(
    num_train=4000,
    num_heldout=200,
    num_compositional=200,
    image_size=252,
    understanding=1.0,
    generation=1.0,
    editing=1.0,
    max_objects=3,
    num_colours=6,
    num_shapes=4,
    textured_fraction=0.2,
    chinese_fraction=0.3,
    num_questions=1,
    new_names=0.0,
)


def split_of(content: Content) -> str:
    if content.is_compositional:
        return "compositional"
    return SPLITS[hashlib.sha256(content.key.encode()).digest()[0] % HELDOUT_SHARE == 0]


def content_of(config: ShapesConfig, seed: int, split: str, index: int) -> Content:
    """The index-th content of a split; task, category and language are drawn once, the rest until it belongs there."""
    imagination = Imagination(config, np.random.default_rng((seed, SPLITS.index(split), index)))
    task, language = imagination.task(), imagination.language()
    category = imagination.pick([kind for kind in CATEGORIES[task] if (split, kind) != NO_NEW_COMBINATION])
    num_questions = config.num_questions if split == "train" else 1
    while split_of(content := imagination.content(task, category, language, num_questions)) != split:
        pass
    if config.new_names and (split != "train" or imagination.happens(config.new_names)):
        return with_new_names(content)
    return content


def messages_of(content: Content) -> list[dict[str, str]]:
    if content.task == "understanding":
        turns = [UNDERSTANDING_PROMPT.format(content.words), content.answer]
        turns += [text for question in content.later for text in (question.words, question.answer)]
    elif content.task == "generation":
        turns = [GENERATION_PROMPT[content.language].format(content.words), GENERATION_REPLY[content.language]]
    else:
        turns = [EDITING_PROMPT.format(content.words), EDITING_REPLY[content.language]]
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


class Chunk(NamedTuple):
    """The rows [first, last) of a split: what one worker draws at a time."""

    directory: Path
    config: ShapesConfig
    seed: int
    split: str
    first: int
    last: int


def draw_chunk(chunk: Chunk) -> list[dict[str, Any]]:
    """Draw the chunk's pictures into images/ and return its rows."""
    return [draw_row(chunk, index) for index in range(chunk.first, chunk.last)]


def draw_row(chunk: Chunk, index: int) -> dict[str, Any]:
    content = content_of(chunk.config, chunk.seed, chunk.split, index)
    row_id = f"{chunk.split}-{index:07d}"
    images = [f"images/{row_id}-{number}.png" for number in range(len(content.scenes))]
    for image, scene in zip(images, content.scenes, strict=True):
        draw(scene, chunk.config.image_size).save(chunk.directory / image, compress_level=1)
    return {
        "id": row_id,
        "source": "shapes",
        "images": images,
        "messages": messages_of(content),
        "truth": {
            "split": chunk.split,
            "task": content.task,
            "category": content.category,
            "language": content.language,
            "answer": content.answer,
            "scenes": [scene.truth() for scene in content.scenes],
        },
    }


@contextmanager
def mapping(num_workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` in order over worker processes, or in this one."""
    if num_workers == 1:
        yield map
        return
    # Forked: a fresh interpreter would import for longer than a chunk takes, and workers use no torch. An interrupt of
    # the terminal reaches them too; this process alone answers it.
    pool = ProcessPoolExecutor(num_workers, get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool.map
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was ended from outside, as happens when memory runs out; free some or use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def draw_rows(directory: Path, config: ShapesConfig, seed: int, num_workers: int | None = None) -> dict[str, Any]:
    """Write train.jsonl, heldout.jsonl, compositional.jsonl and images/ into a directory.

    The bytes do not depend on num_workers.

    num_workers: processes, one for each core unless given. Returns the number of rows by split, task, category
    ("task/category") and language. Raises UserError for a config out of range.
    """
    config.check()
    (directory / "images").mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter[str]] = {key: Counter() for key in ("split", "task", "category", "language")}
    with mapping(num_workers or len(os.sched_getaffinity(0))) as map_chunks:
        for split in SPLITS:
            num_rows = getattr(config, f"num_{split}")
            chunks = [
                Chunk(directory, config, seed, split, first, min(first + ROWS_PER_CHUNK, num_rows))
                for first in range(0, num_rows, ROWS_PER_CHUNK)
            ]
            with open(directory / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for rows in map_chunks(draw_chunk, chunks):
                    for row in rows:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        truth = row["truth"]
                        for key in ("split", "task", "language"):
                            counts[key][truth[key]] += 1
                        counts["category"][f"{truth['task']}/{truth['category']}"] += 1
    return {key: dict(sorted(counter.items())) for key, counter in counts.items()}


def main(argv: list[str]) -> int:
    """`nexus-gen data shapes`; argv[0] is the command word."""
    parser = Parser(
        prog="nexus-gen data shapes",
        description="Draw the dataset of coloured shapes into a directory: a JSONL file for each split, images/.",
    )
    parser.add_argument("out", type=Path, help="directory to make; a dataset that is there already is replaced")
    for key, value in dataclasses.asdict(DEFAULTS).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    given = vars(parser.parse_args(argv[1:]))
    out, seed = given.pop("out"), given.pop("seed")
    config = ShapesConfig(**given)
    config.check()
    if seed < 0:
        raise UserError(f"--seed is {seed}; it must be 0 or more")
    require_free(out)
    with building(out) as directory:
        counts = draw_rows(directory, config, seed)
        settings = {**dataclasses.asdict(config), "seed": seed}
        seal(directory, Manifest("messages", "shapes", settings, inputs={}, code={}, details=counts))
    for key, counter in counts.items():
        print(f"{key}: " + ", ".join(f"{count} {value}" for value, count in counter.items()))
    print(f"wrote {out}")
    return 0


def require_free(out: Path) -> None:
    """UserError when `out` holds anything but a dataset, which may be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give an empty or a new directory")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out} holds other files; give an empty or a new directory")
        Manifest.load(out).require("messages", out)
