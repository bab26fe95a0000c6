"""Rows of other projects as rows of ours: each converter is a function of the row's values.

A converter changes the form only. What it makes is checked as every row is, so it need not check twice.
"""

import json
from collections.abc import Callable
from typing import Any

from nexus_gen.specs.prompts import (
    EDITING_PROMPT,
    EDITING_REPLY,
    GENERATION_PROMPT,
    GENERATION_REPLY,
    IMAGE_TAG,
    LANGUAGES,
    language_of,
)

Values = dict[str, Any]
# ShareGPT's names of the speakers, and the developer of newer OpenAI rows; any other stays, to be named as an error.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}
AUTO = "auto"


class ConversionError(ValueError):
    """A row that is not in the format that it was taken for. kind: what such problems are counted under."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def from_messages(values: Values) -> Values:
    """The published format; Parquet files and others may hold the messages as JSON text, and a single `image`."""
    rest = _rest(values, "messages")
    return rest | {"messages": _parsed(values["messages"])} if "messages" in values else rest


def from_sharegpt(values: Values) -> Values:
    """ShareGPT and LLaVA: `conversations` of {from, value}; `image` or `images`; the system prompt may stand apart."""
    turns = _parsed(values["conversations"])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversionError("messages", "conversations must be a list of {from, value}")
    messages = [
        {"role": _role(turn.get("from", turn.get("role"))), "content": turn.get("value", turn.get("content"))}
        for turn in turns
    ]
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": values["system"]})
    return _rest(values, "conversations", "system") | {"messages": messages}


def from_openai(values: Values) -> Values:
    """OpenAI-chat: contents may be lists of parts, {type: text, text} and {type: image_url, image_url: {url}}."""
    parts_of = [_parsed(message) for message in _parsed(values["messages"])]
    images: list[Any] = []
    messages = []
    for message in parts_of:
        if not isinstance(message, dict):
            raise ConversionError("messages", "every message needs a role and a content")
        if message.get("tool_calls"):
            raise ConversionError("messages", "a message calls tools, which the model does not learn; drop the row")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, images) for part in content)
        messages.append({"role": _role(message.get("role")), "content": content})
    rest = _rest(values, "messages")
    if images:
        if rest.get("images"):
            raise ConversionError("images", "pictures both among the parts of messages and in images; keep one")
        rest["images"] = images
    return rest | {"messages": messages}


def from_captions(values: Values) -> Values:
    """{image, caption | captions} -> paint what the caption says. captions: a list, or lists by label (long, short)."""
    captions = values.get("captions", values.get("caption"))
    language = _language(values, captions)
    template = GENERATION_PROMPT[language]
    return _rest(values, "caption", "captions") | {
        "messages": [
            {"role": "user", "content": _for_each(template.format, captions)},
            {"role": "assistant", "content": GENERATION_REPLY[language]},
        ]
    }


def from_edits(values: Values) -> Values:
    """{source_image, target_image, instruction | instructions} -> edit the one into the other."""
    instructions = values.get("instructions", values.get("instruction"))
    return _rest(values, "instruction", "instructions", "source_image", "target_image") | {
        "images": [values["source_image"], values["target_image"]],
        "messages": [
            {"role": "user", "content": _for_each(EDITING_PROMPT.format, instructions)},
            {"role": "assistant", "content": EDITING_REPLY[_language(values, instructions)]},
        ],
    }


CONVERTERS: dict[str, Callable[[Values], Values]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "llava": from_sharegpt,
    "openai": from_openai,
    "captions": from_captions,
    "edits": from_edits,
}
# A format by the key that only its rows have; without any of them a row is taken for one of ours.
DETECTED_BY = {"conversations": "sharegpt", "source_image": "edits", "captions": "captions", "caption": "captions"}


def detect(values: Values) -> str:
    """The name of the format that a row seems to be in."""
    messages = values.get("messages")
    if messages is None:
        return next((name for key, name in DETECTED_BY.items() if key in values), "messages")
    if isinstance(messages, list) and any(_is_openai(message) for message in messages):
        return "openai"
    return "messages"


def convert(values: Values, row_format: str = AUTO) -> Values:
    """The row in our format. row_format: a key of CONVERTERS, or `auto` to detect it. Raises ConversionError."""
    name = detect(values) if row_format == AUTO else row_format
    try:
        return CONVERTERS[name](values)
    except KeyError as error:
        raise ConversionError("key", f"a row of format {name} needs {error.args[0]!r}") from error


def _rest(values: Values, *without: str) -> Values:
    """What a converter passes on, with a single `image` as `images`."""
    rest = {key: value for key, value in values.items() if key not in (*without, "image")}
    if "images" not in rest and values.get("image") is not None:
        image = values["image"]
        rest["images"] = image if isinstance(image, list) else [image]
    return rest


def _parsed(value: Any) -> Any:
    """Parquet columns often hold JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ConversionError("messages", f"messages are text but not JSON ({error})") from error


def _role(name: Any) -> Any:
    return SPEAKERS.get(name, name) if isinstance(name, str) else name


def _is_openai(message: Any) -> bool:
    """Of OpenAI's making; parts are objects, where a list of texts is one of our choices."""
    if not isinstance(message, dict):
        return False
    content = message.get("content")
    has_parts = isinstance(content, list) and any(isinstance(part, dict) for part in content)
    return has_parts or message.get("role") == "developer" or "tool_calls" in message


def _part(part: Any, images: list[Any]) -> str:
    """The text of a part of a message; a picture is added to `images` and becomes a tag."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_TAG in part["text"]:
            raise ConversionError("placeholders", f"a text part holds {IMAGE_TAG} beside picture parts; take it out")
        return part["text"]
    if kind == "image_url":
        url = part.get("image_url")
        images.append(url.get("url") if isinstance(url, dict) else url)
        return IMAGE_TAG
    if kind == "image":
        images.append(part.get("image"))
        return IMAGE_TAG
    raise ConversionError("messages", f"a message part of type {kind!r}; text, image_url and image are known")


def _for_each(template: Callable[[str], str], choices: Any) -> Any:
    """A template filled with every text of a choice; what is no text stays, to be named as an error."""
    if isinstance(choices, str):
        return template(choices) if choices.strip() else ""
    if isinstance(choices, list):
        return [_for_each(template, choice) for choice in choices]
    if isinstance(choices, dict):
        return {label: _for_each(template, choice) for label, choice in choices.items() if choice is not None}
    return choices


def _language(values: Values, texts: Any) -> str:
    language = values.get("language", language_of(str(texts)))
    if language not in LANGUAGES:
        raise ConversionError("language", f"language is {language!r}; {' and '.join(LANGUAGES)} are known")
    return language
