"""What to type next: prompts, edits and questions of a run's own held-out rows, as commands."""

import os
from pathlib import Path

from data.messages.rows import Row
from nexus_gen.commands.use import save_atomic
from nexus_gen.pictures.images import StoredImage, open_image
from train.report.samples import first_rows
from train.scores.outcomes import prompt_of

ORDER = ("generation", "editing", "understanding")


def commands_to_try(rows: list[Row], beside: Path) -> list[list[str]]:
    """The arguments of a command for each task that held-out rows have, with the words and the pictures of a row.

    beside: the page; a picture that is in no file of its own is written next to it.
    """
    commands = []
    for task in ORDER:
        for row in first_rows(rows, task, 1):
            words, given = prompt_of(row), row.images[: len(row.images) - row.num_targets]
            paths = [path_of(image, beside.with_name(f"{beside.stem}-{task}-{n}.png")) for n, image in enumerate(given)]
            images = [word for path in paths for word in ("--input-image", path)]
            language = ["--language", row.language] if row.language != "en" else []
            commands.append(
                {
                    "generation": ["generate", "--prompt", words, *language],
                    "editing": ["edit", *images, "--instruction", words, *language],
                    "understanding": ["understand", *images, "--prompt", words],
                }[task]
            )
    return commands


def path_of(image: StoredImage, otherwise: Path) -> str:
    """Where a picture is, from here if that is below; one inside a row or a tar is written to `otherwise`."""
    if isinstance(image, Path):
        path = image
    else:
        path = otherwise
        save_atomic(open_image(image), path)
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith(os.pardir) else relative
