"""The message format: rows with `id`, `source`, `images` and `messages`, as published with Nexus-Gen.

    {"id": "1", "source": "mine", "images": ["a.png"], "messages": [
      {"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}

`<image>` tags of all messages are filled by `images` in order; paths are relative to the file that names them. A
picture of a user turn is looked at, a picture of an assistant turn is learned to be made. Instead of one text, a
content may be a list of texts, or lists by label ({"short": [...], "long": [...]}): each epoch one of them is drawn.
`data.records` says which files hold rows, `data.converters` which other forms of rows are taken. No torch here:
launchers check datasets before processes start.
"""

import base64
import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.converters import AUTO, ConversionError, convert
from data.records import Record, read_records
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.images import EncodedImage, StoredImage, open_image
from nexus_gen.specs.prompts import CONTROL_TOKENS, IMAGE_TAG, language_of

ROLES = ("system", "user", "assistant")
KEYS = frozenset(("id", "source", "images", "messages", "truth"))
TASKS = ("understanding", "generation", "editing", "text")
Choices = Mapping[str, list[str]]  # label -> texts; a text alone, or a list without labels, has the label ""


@dataclass(frozen=True)
class Row:
    """One conversation. images: in tag order, as `open_image` takes them. truth: what it is scored by.

    where: `file:line` and the like, what errors name it by. messages: {role, content}, of every choice the first text.
    choices: per message all its texts. task: understanding (pictures in user turns only), generation (in assistant
    turns only), editing (in both), text.
    """

    id: str
    source: str
    images: list[StoredImage]
    messages: list[dict[str, str]]
    task: str
    where: str
    choices: list[Choices] = field(repr=False)
    truth: dict[str, Any] | None = None

    @property
    def num_targets(self) -> int:
        """Pictures in assistant turns."""
        return sum(message["content"].count(IMAGE_TAG) for message in self.messages if message["role"] == "assistant")

    @property
    def language(self) -> str:
        """zh or en, by the characters of all messages."""
        return language_of("".join(message["content"] for message in self.messages))

    @property
    def labels(self) -> set[str]:
        """Of texts to choose from."""
        return {label for choice in self.choices for label in choice}

    def drawn(self, generator: np.random.Generator, label_weights: Mapping[str, float] | None = None) -> "Row":
        """This row with one text of every choice: a label by weight (all alike unless given), then any of its texts.

        A label without a weight is not drawn, unless no label of the choice has one.
        """
        if all(len(choice) == 1 == len(next(iter(choice.values()))) for choice in self.choices):
            return self
        messages = []
        for message, choice in zip(self.messages, self.choices, strict=True):
            labels = list(choice)
            weights = np.array([(label_weights or {}).get(label, 0.0) for label in labels])
            shares = weights / weights.sum() if weights.sum() else None
            texts = choice[labels[generator.choice(len(labels), p=shares)]]
            messages.append({**message, "content": texts[generator.integers(len(texts))]})
        return replace(self, messages=messages)


class RowError(UserError):
    """A row that cannot be trained on. kind: the name that problems of its sort are counted under."""

    def __init__(self, where: str, kind: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.kind, self.problem = where, kind, problem


@dataclass
class Summary:
    """What `count_rows` counted in a file.

    rows: good and broken ones. first: what is wrong with the first broken. labels: of texts to choose from.
    """

    path: Path
    rows: int = 0
    broken: int = 0
    first: str = ""
    tasks: Counter[str] = field(default_factory=Counter)
    labels: set[str] = field(default_factory=set)

    def is_good(self, max_bad_fraction: float) -> bool:
        """Whether no more than that fraction of the rows are broken."""
        return self.broken <= max_bad_fraction * self.rows

    def check(self, max_bad_fraction: float = 0.0) -> "Summary":
        """This summary; UserError with the first broken row and the number of all when they are more than that."""
        if self.is_good(max_bad_fraction):
            return self
        if self.broken == 1:
            raise UserError(self.first)
        raise UserError(
            f"{self.first} ({self.broken} of {self.rows} rows are broken; `nexus-gen data check {self.path}` names all)"
        )


def read_rows(path: str | os.PathLike[str], row_format: str = AUTO) -> Iterator[Row]:
    """The rows of a dataset file, each checked for form.

    Raises UserError naming file and line, what is wrong with both numbers, and the remedy.
    """
    for record in read_records(path):
        yield parse_record(record, row_format)


def count_rows(
    path: str | os.PathLike[str],
    check_images: Literal["exists", "open"],
    row_format: str = AUTO,
    left_out: Collection[int] = (),
) -> Summary:
    """Read every row of a dataset file; check_images: `exists` asks the file system, `open` decodes each picture.

    left_out: indices of rows that do not count. Raises UserError for a file without rows; `Summary.check` for others.
    """
    summary = Summary(Path(path))
    missing_picture = MissingPictures()
    for index, record in enumerate(read_records(path)):
        if index in left_out:
            continue
        summary.rows += 1
        try:
            row = parse_record(record, row_format)
            if error := missing_picture.of(row):
                raise error
            if check_images == "open":
                for image in row.images:
                    open_image(image)
        except UserError as error:
            summary.broken += 1
            summary.first = summary.first or str(error)
        else:
            summary.tasks[row.task] += 1
            summary.labels |= row.labels
    if not summary.rows:
        none = f"but the {len(left_out)} that are quarantined" if left_out else "at all"
        raise UserError(f"{path} holds no rows {none}; a row is one JSON object with images and messages")
    return summary


class MissingPictures:
    """Finds pictures that do not exist, by one listing of each directory instead of a question for each picture."""

    def __init__(self) -> None:
        self._entries: dict[str, set[str]] = {}

    def of(self, row: Row) -> RowError | None:
        """What to raise for the row's first missing picture."""
        for image in row.images:
            if not isinstance(image, Path):
                continue
            directory, name = os.path.split(image)
            if directory not in self._entries:
                self._entries[directory] = _entries(directory)
            if name not in self._entries[directory]:
                problem = f"picture {image} does not exist; paths are relative to the file that names them"
                return RowError(row.where, "missing_picture", problem)
        return None


def _entries(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory or "."))
    except OSError:
        return set()


@lru_cache(maxsize=1024)  # rows of one file share their keys, and difflib would take most of the time
def _known_key_like(key: str) -> str | None:
    return next(iter(difflib.get_close_matches(key, sorted(KEYS), n=1)), None)


def parse_record(record: Record, row_format: str = AUTO) -> Row:
    """A raw row as a Row; RowError says what is wrong with it, whether in reading, in its form or in its pictures.

    row_format: a key of `data.converters.CONVERTERS`, or `auto`. Pictures are not opened.
    """

    def refuse(kind: str, problem: str) -> RowError:
        return RowError(record.where, kind, problem)

    if record.values is None:
        raise refuse(record.kind, record.problem or "unreadable")
    try:
        values = convert(record.values, row_format)
    except ConversionError as error:
        raise refuse(error.kind, str(error)) from error
    for key in values.keys() - KEYS:
        meant = _known_key_like(key)
        if meant and meant not in values:  # `image_size` beside `images` is somebody's own key
            raise refuse("key", f"unknown key '{key}'; did you mean '{meant}'?")
    messages, images = values.get("messages"), values.get("images", list(record.members))
    if not isinstance(messages, list) or not messages:
        raise refuse("messages", "no messages; give a list of {role, content}")
    if not isinstance(images, list) or not all(isinstance(image, str | bytes | dict) and image for image in images):
        raise refuse("images", "images must be a list of file paths")
    if not isinstance(values.get("truth"), dict | None):
        raise refuse("truth", f"truth is a {type(values['truth']).__name__}; give an object or leave it out")
    choices: list[Choices] = []
    for message in messages:
        choice = _choices(message.get("content")) if isinstance(message, dict) else None
        if choice is None:
            raise refuse("messages", "every message needs a role and a content of text, or of texts to choose from")
        if message.get("role") not in ROLES:
            raise refuse("role", f"role {message.get('role')!r} is none of {', '.join(ROLES)}")
        choices.append(choice)
    roles = [message["role"] for message in messages]
    turns = [role for role in roles if role != "system"]
    if "system" in roles[1:]:
        raise refuse("order", "a system message stands first or not at all")
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise refuse(
            "order",
            f"turns are {', '.join(turns) or 'missing'}; user and assistant must alternate and an assistant ends",
        )
    tags = dict.fromkeys(ROLES, 0)
    for role, choice in zip(roles, choices, strict=True):
        texts = [text for of_label in choice.values() for text in of_label]
        counts = {text.count(IMAGE_TAG) for text in texts}
        if len(counts) > 1:
            numbers = " and ".join(map(str, sorted(counts)))
            raise refuse("placeholders", f"texts of one choice hold {numbers} {IMAGE_TAG} tags; give all the same")
        tags[role] += counts.pop()
        if not all(_is_unicode(text) for text in texts):
            raise refuse("encoding", "a message holds half of a surrogate pair, which is no character; write it again")
        if token := next((token for text in texts if "<|" in text for token in CONTROL_TOKENS if token in text), None):
            raise refuse("markup", f"a message holds {token}, which the chat template writes itself; take it out")
        if role == "user" and not all(text.strip() for text in texts):
            raise refuse("empty_prompt", "a user message is empty; say what the reply answers")
        if role == "assistant" and not all(text.strip() for text in texts):
            raise refuse("empty_reply", "an assistant message is empty; there is nothing to learn from it")
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
    return Row(
        id=str(values.get("id", record.name)),
        source=str(values.get("source", record.file.stem)),
        images=[stored_image(image, number, record) for number, image in enumerate(images, start=1)],
        messages=[
            {"role": role, "content": next(iter(choice.values()))[0]}
            for role, choice in zip(roles, choices, strict=True)
        ],
        task=TASKS[3] if not images else TASKS[bool(tags["assistant"]) + bool(tags["assistant"] and tags["user"])],
        where=record.where,
        choices=choices,
        truth=values.get("truth"),
    )


def _choices(content: Any) -> Choices | None:
    """All texts of a content by label; None when it is none."""
    by_label = content if isinstance(content, dict) else {"": content}
    choices = {label: [texts] if isinstance(texts, str) else texts for label, texts in by_label.items()}
    well_formed = choices and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in choices.values()
    )
    return choices if well_formed else None


def stored_image(image: Any, number: int, record: Record) -> StoredImage:
    """A picture of a row: the member of its tar, a path, or the bytes that came with it. number: from 1."""

    def refuse(kind: str, problem: str) -> RowError:
        return RowError(record.where, kind, problem)

    name = f"{number} of {record.where}"
    if isinstance(image, dict):  # Hugging Face's Image feature: the bytes, or a path where they were not embedded
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and image:
        return EncodedImage(name, image)
    if not isinstance(image, str) or not image:
        raise refuse("images", f"image {number} is neither a path nor bytes")
    if image.startswith("data:"):
        head, _, text = image.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError("not base64")
            return EncodedImage(name, base64.b64decode(text, validate=True))
        except ValueError as error:
            raise refuse("images", f"image {number} is a data: address that cannot be decoded ({error})") from error
    if "://" in image:
        raise refuse(
            "url", f"image {image[:80]} is an address; download it and give its path, nothing is fetched while training"
        )
    if record.members:
        key = os.path.basename(record.name).removesuffix("json")
        for member in (os.path.basename(image), f"{key}{image}"):
            if member in record.members:
                return record.members[member]
        beside = ", ".join(record.members)
        raise refuse("missing_picture", f"picture {image} is not in the tar; beside the row are {beside}")
    if not _is_unicode(image) or "\0" in image:
        raise refuse("images", f"image {number} has a path that no file can have")
    return record.file.parent / image


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
