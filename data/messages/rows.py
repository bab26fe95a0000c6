"""The message format: rows with `id`, `source`, `images` and `messages`, as published with Nexus-Gen.

    {"id": "1", "source": "mine", "images": ["a.png"], "messages": [
      {"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]}

`<image>` tags of all messages are filled by `images` in order; paths are relative to the file that names them. A
picture of a user turn is looked at, a picture of an assistant turn is learned to be made. Instead of one text, a
content may be a list of texts, or lists by label ({"short": [...], "long": [...]}): each epoch one of them is drawn.
`data.records.reading` says which files hold rows, `data.records.converters` which other forms of rows are taken. No
torch here: launchers check datasets before processes start.
"""

import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.messages.stored_pictures import is_unicode, not_there, stored_image
from data.notices import Notice, Notices, notices_of
from data.quotes import brief
from data.records.converters import (
    AUTO,
    KEYS_OF,
    ConversionError,
    convert,
    empty_key,
    is_empty,
    known_form,
    nearest_form,
)
from data.records.reading import Record, RowError, is_picture, open_records, read_records
from nexus_gen.pictures.images import StoredImage, open_image
from nexus_gen.specs.errors import UserError
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
    turns only), editing (in both), text. notices: what of it is not read.
    """

    id: str
    source: str
    images: list[StoredImage]
    messages: list[dict[str, str]]
    task: str
    where: str
    choices: list[Choices] = field(repr=False)
    truth: dict[str, Any] | None = field(default=None, repr=False)
    notices: tuple[Notice, ...] = field(default=(), repr=False)

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


@dataclass
class Summary:
    """What `count_rows` counted in a file.

    rows: good and broken ones. first: what is wrong with the first broken. labels: of texts to choose from.
    notices: what was passed over.
    """

    path: Path
    rows: int = 0
    broken: int = 0
    first: str = ""
    tasks: Counter[str] = field(default_factory=Counter)
    labels: set[str] = field(default_factory=set)
    notices: Notices = field(default_factory=Notices)

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


def read_rows(path: str | os.PathLike[str], row_format: str = AUTO, picture_root: Path | None = None) -> Iterator[Row]:
    """The rows of a dataset file, each checked for form.

    Raises UserError naming file and line, what is wrong with both numbers, and the remedy.
    """
    for record in read_records(path, picture_root):
        yield parse_record(record, row_format)


def count_rows(
    path: str | os.PathLike[str],
    check_images: Literal["exists", "open"],
    row_format: str = AUTO,
    left_out: Collection[int] = (),
    picture_root: Path | None = None,
) -> Summary:
    """Read every row of a dataset file; check_images: `exists` asks the file system, `open` decodes each picture.

    left_out: indices of rows that do not count. Raises UserError for a file without rows; `Summary.check` for others.
    """
    summary = Summary(Path(path))
    missing_picture = MissingPictures()
    records = open_records(path, picture_root)
    for index, record in enumerate(records):
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
            if row.notices:
                summary.notices.update(row.notices)
    summary.notices += records.notices
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
                return RowError(row.where, "missing_picture", not_there(image))
        return None


def _entries(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory or "."))
    except OSError:
        return set()


# What holds the pictures and words of a row in any format.
ROW_KEYS = sorted({"messages", "conversations", "images", "captions", "text", *chain(*KEYS_OF.values())})
NEEDED = ("image", "images", "messages")


@lru_cache(maxsize=1024)  # rows of one file share their keys, and difflib would take most of the time
def _meant(key: str) -> str | None:
    """The key that a row needs and that this one differs from by one letter: own keys hardly do."""
    key = key.lower()
    return key if key in NEEDED else next((known for known in NEEDED if _is_slip(key, known)), None)


def _is_slip(key: str, known: str) -> bool:
    """Whether the texts differ by a letter that is missing, too many, another, or has changed places with the next."""
    if abs(len(key) - len(known)) > 1:
        return False
    first = next((n for n, (a, b) in enumerate(zip(key, known, strict=False)) if a != b), min(len(key), len(known)))
    a, b = key[first:], known[first:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def _without_messages(values: Mapping[str, Any], empty: Collection[str], has_pictures: bool) -> str:
    """What to say of a row that is in no format: a key that is empty or may be misspelt, or the nearest format."""
    if problem := empty_key(dict(values), empty, has_pictures):
        return problem
    lacking = [key for key in ROW_KEYS if key not in values]
    for key in values:
        likely = next(iter(difflib.get_close_matches(key.lower(), lacking, n=1, cutoff=0.75)), None)
        if likely and key not in ROW_KEYS:
            return f"unknown key {brief(key)}; did you mean '{likely}'?"
    return f"no messages; give a list of {{role, content}}{nearest_form(dict(values))}"


def _named_pictures(values: Mapping[str, Any], unknown: Collection[str]) -> str:
    """A hint at keys of a row without images that may hold some."""

    def first(value: Any) -> Any:
        return value[0] if isinstance(value, list) and value else value

    named = [key for key in sorted(unknown) if isinstance(name := first(values[key]), str) and is_picture(name)]
    return f"; call {brief(named[0])} image if it names one" if named else ""


def parse_record(record: Record, row_format: str = AUTO) -> Row:
    """A raw row as a Row; RowError says what is wrong with it, whether in reading, in its form or in its pictures.

    row_format: a key of `data.records.converters.CONVERTERS`, or `auto`. Pictures are not opened.
    """

    def refuse(kind: str, problem: str) -> RowError:
        return RowError(record.where, kind, problem)

    if record.values is None:
        raise refuse(record.kind, record.problem or "unreadable")
    values, notices = record.values, record.notices
    empty = [key for key, value in values.items() if value is None or (value.__class__ is float and value != value)]
    if empty:  # pandas writes null and NaN where a column has no value
        values = {key: value for key, value in values.items() if key not in empty}
        notices += notices_of("empty_value", frozenset(empty))
    empty += [notice.about for notice in record.notices if notice.kind == "empty_value"]
    has_pictures = bool(record.members)
    form = known_form(values, has_pictures) or "messages" if row_format == AUTO else row_format
    try:
        values = convert(values, form, empty)
    except ConversionError as error:
        raise refuse(error.kind, str(error)) from error
    unknown = values.keys() - KEYS
    if unknown:
        for key in sorted(unknown):
            meant = _meant(key)
            found = "messages" in values if meant == "messages" else "images" in values or has_pictures
            if meant and not found:
                raise refuse("key", f"unknown key {brief(key)}; did you mean '{meant}'?")
        notices += notices_of("ignored_key", frozenset(unknown))
    messages, images = values.get("messages"), values.get("images")
    images = list(record.members) if images is None else images
    if messages is None and row_format == AUTO:
        problem = _without_messages(values, empty, has_pictures)
        raise refuse("key" if problem.startswith("unknown key") else "messages", problem)
    if not isinstance(messages, list) or not messages:
        raise refuse("messages", "no messages; give a list of {role, content}")
    if images and all(map(is_empty, images)) and IMAGE_TAG not in str(messages):
        images = []  # a text row of a table whose other rows have pictures
    for number, image in enumerate(images, start=1):
        if is_empty(image):
            raise refuse("images", f"image {number} is empty; give its path, or take it out of images")
        if not isinstance(image, str | bytes | dict):
            raise refuse("images", f"image {number} is neither a path nor bytes, but {brief(image)}")
    if not isinstance(values.get("truth"), dict | None):
        raise refuse("truth", f"truth is a {type(values['truth']).__name__}; give an object or leave it out")
    choices: list[Choices] = []
    for message in messages:
        choice = _choices(message.get("content")) if isinstance(message, dict) else None
        if choice is None:
            raise refuse("messages", "every message needs a role and a content of text, or of texts to choose from")
        if message.get("role") not in ROLES:
            raise refuse("role", f"role {brief(message.get('role'))} is none of {', '.join(ROLES)}")
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
        if not all(is_unicode(text) for text in texts):
            raise refuse("encoding", "a message holds half of a surrogate pair, which is no character; write it again")
        if token := next((token for text in texts if "<|" in text for token in CONTROL_TOKENS if token in text), None):
            raise refuse("markup", f"a message holds {token}, which the chat template writes itself; take it out")
        if role == "user" and not all(text.strip() for text in texts):
            raise refuse("empty_prompt", "a user message is empty; say what the reply answers")
        if role == "assistant" and not all(text.strip() for text in texts):
            raise refuse("empty_reply", "an assistant message is empty; there is nothing to learn from it")
    num_tags = sum(tags.values())
    if num_tags != len(images) and form == "captions":
        raise refuse("placeholders", f"{len(images)} pictures for one caption; give one as image, or take the row out")
    if num_tags != len(images):
        raise refuse(
            "placeholders",
            f"{len(images)} images for {num_tags} {IMAGE_TAG} tags; give one path per tag, in their order"
            + ("" if images else _named_pictures(values, unknown)),
        )
    if tags["system"]:
        raise refuse(
            "placeholders", f"a system message holds {IMAGE_TAG}; pictures go into user and assistant messages"
        )
    return Row(
        id=_name(values.get("id", record.name)),
        source=_name(values.get("source", record.file.stem)),
        images=[stored_image(image, number, record) for number, image in enumerate(images, start=1)],
        messages=[
            {"role": role, "content": next(iter(choice.values()))[0]}
            for role, choice in zip(roles, choices, strict=True)
        ],
        task=TASKS[3] if not images else TASKS[bool(tags["assistant"]) + bool(tags["assistant"] and tags["user"])],
        where=record.where,
        choices=choices,
        truth=values.get("truth"),
        notices=notices,
    )


def _name(value: Any) -> str:
    """An id or a source as text; identifiers of 16 bytes are ones too."""
    return value[:32].hex() if isinstance(value, bytes) else str(value)


def _choices(content: Any) -> Choices | None:
    """All texts of a content by label; None when it is none. Labels without texts are empty columns of a table."""
    by_label = content if isinstance(content, dict) else {"": content}
    choices = {
        label: [texts] if isinstance(texts, str) else texts
        for label, texts in by_label.items()
        if texts is not None or not label
    }
    well_formed = choices and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in choices.values()
    )
    return choices if well_formed else None
