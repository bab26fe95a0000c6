"""The message format: JSON lines with `id`, `source`, `images` and `messages`, as published with Nexus-Gen.

    {"id": "1", "source": "mine", "images": ["a.png"], "messages": [
      {"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}

`<image>` tags of all messages are filled by `images` in order; paths are relative to the file that names them. A
picture of a user turn is looked at, a picture of an assistant turn is learned to be made. No torch here: launchers
check datasets before processes start.
"""

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.images import open_image
from nexus_gen.specs.prompts import IMAGE_TAG

ROLES = ("system", "user", "assistant")
KEYS = frozenset(("id", "source", "images", "messages", "truth"))
TASKS = ("understanding", "generation", "editing", "text")


@dataclass(frozen=True)
class Row:
    """One conversation. images: in tag order, joined to the directory of their file. truth: what it is scored by.

    task: understanding (pictures in user turns only), generation (in assistant turns only), editing (in both), text.
    """

    id: str
    source: str
    images: list[Path]
    messages: list[dict[str, str]]
    task: str
    line: int
    truth: dict[str, Any] | None = None

    @property
    def num_targets(self) -> int:
        """Pictures in assistant turns."""
        return sum(message["content"].count(IMAGE_TAG) for message in self.messages if message["role"] == "assistant")


class RowError(UserError):
    """A row that cannot be trained on. kind: the name that problems of its sort are counted under."""

    def __init__(self, where: str, kind: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.kind, self.problem = kind, problem


@dataclass
class Summary:
    """What `check_rows` counted."""

    rows: int = 0
    tasks: Counter[str] = field(default_factory=Counter)


def read_rows(path: str | os.PathLike[str]) -> Iterator[Row]:
    """The rows of a JSONL file, each checked for form; blank lines are passed over.

    Raises UserError naming file and line, what is wrong with both numbers, and the remedy.
    """
    path = Path(path)
    try:
        file = open(path, encoding="utf-8")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSONL file of message rows") from error
    with file:
        try:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield parse_row(text, path, line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def check_rows(path: str | os.PathLike[str], check_images: Literal["exists", "open"]) -> Summary:
    """Read every row; check_images: `exists` asks the file system, `open` decodes each picture.

    Raises UserError at the first broken row, and for a file without rows.
    """
    summary = Summary()
    known: set[str] = set()  # one directory listing instead of one question per picture
    listed: set[str] = set()
    for row in read_rows(path):
        for image in row.images:
            directory, name = os.path.split(image)
            if directory not in listed:
                listed.add(directory)
                known.update(os.path.join(directory, entry) for entry in _entries(directory))
            if os.path.join(directory, name) not in known:
                raise RowError(
                    f"{path}:{row.line}",
                    "missing_picture",
                    f"picture {image} does not exist; paths are relative to the JSONL file",
                )
            if check_images == "open":
                open_image(image)
        summary.rows += 1
        summary.tasks[row.task] += 1
    if not summary.rows:
        raise UserError(f"{path} holds no rows; each line is one JSON object with images and messages")
    return summary


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory or ".")
    except OSError:
        return []


@lru_cache(maxsize=1024)  # rows of one file share their keys, and difflib would take most of the time
def _known_key_like(key: str) -> str | None:
    return next(iter(difflib.get_close_matches(key, sorted(KEYS), n=1)), None)


def parse_row(text: str, path: Path, line: int) -> Row:
    """One line of a JSONL file as a Row; RowError says what is wrong with it."""

    def refuse(kind: str, problem: str) -> RowError:
        return RowError(f"{path}:{line}", kind, problem)

    try:
        values = json.loads(text)
    except ValueError as error:
        raise refuse("json", f"not JSON ({error}); each line is one JSON object") from error
    if not isinstance(values, dict):
        raise refuse("json", f"a {type(values).__name__} where a JSON object with images and messages is needed")
    for key in values.keys() - KEYS:
        meant = _known_key_like(key)
        if meant and meant not in values:  # `image_size` beside `images` is somebody's own key
            raise refuse("key", f"unknown key '{key}'; did you mean '{meant}'?")
    messages, images = values.get("messages"), values.get("images", [])
    if not isinstance(messages, list) or not messages:
        raise refuse("messages", "no messages; give a list of {role, content}")
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise refuse("images", "images must be a list of file paths")
    if not isinstance(values.get("truth"), dict | None):
        raise refuse("truth", f"truth is a {type(values['truth']).__name__}; give an object or leave it out")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise refuse("messages", "every message needs a role and a content of text")
        if message.get("role") not in ROLES:
            raise refuse("role", f"role {message.get('role')!r} is none of {', '.join(ROLES)}")
    turns = [message["role"] for message in messages if message["role"] != "system"]
    if "system" in [message["role"] for message in messages[1:]]:
        raise refuse("order", "a system message stands first or not at all")
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise refuse(
            "order",
            f"turns are {', '.join(turns) or 'missing'}; user and assistant must alternate and an assistant ends",
        )
    tags = {role: sum(m["content"].count(IMAGE_TAG) for m in messages if m["role"] == role) for role in ROLES}
    num_tags = sum(tags.values())
    if num_tags != len(images):
        raise refuse(
            "placeholders",
            f"{len(images)} images for {num_tags} {IMAGE_TAG} tags; give one path per tag, in their order",
        )
    if tags["system"]:
        raise refuse(
            "placeholders", f"a system message holds {IMAGE_TAG}; pictures go into user and assistant messages"
        )
    if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise refuse("empty_reply", "an assistant message is empty; there is nothing to learn from it")
    return Row(
        id=str(values.get("id", line)),
        source=str(values.get("source", path.stem)),
        images=[path.parent / image for image in images],
        messages=[{"role": message["role"], "content": message["content"]} for message in messages],
        task=TASKS[3] if not images else TASKS[bool(tags["assistant"]) + bool(tags["assistant"] and tags["user"])],
        line=line,
        truth=values.get("truth"),
    )
