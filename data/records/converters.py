"""Rows of other projects as rows of ours: each converter is a function of the row's values.

A converter changes the form only. What it makes is checked as every row is, so it need not check twice.
"""

import json
import re
from collections.abc import Callable, Collection
from typing import Any

from data.quotes import brief
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
# How a text begins that holds messages, and not a prompt in brackets; Python's own quotes too, which are no JSON.
MESSAGES_TEXT = re.compile(r"\s*\[\s*[{\]]")
PATHS_TEXT = re.compile(r"""\s*(?:$|\[\s*(?:["'{\]]|null))""")  # and one that holds a list of pictures, or none
# ShareGPT's names of the speakers, and the developer of newer OpenAI rows; any other stays, to be named as an error.
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}
TEXT_PARTS = ("text", "input_text", "output_text")  # the latter two and `input_image` are of OpenAI's responses
AUTO = "auto"


class ConversionError(ValueError):
    """A row that is not in the format that it was taken for. kind: what such problems are counted under."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


def from_messages(values: Values) -> Values:
    """The published format; Parquet files and others may hold the messages as JSON text, and a single `image`.

    As in the other formats of chats, a `system` prompt may stand apart.
    """
    if "messages" not in values:
        return _rest(values)
    return _rest(values, "messages", "system") | {"messages": _after_system(values, _parsed(values["messages"]))}


def from_sharegpt(values: Values) -> Values:
    """ShareGPT and LLaVA: `conversations` of {from, value}; `image` or `images`; the system prompt may stand apart."""
    turns = _parsed(values["conversations"])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversionError("messages", "conversations must be a list of {from, value}")
    messages = [
        {"role": _role(turn.get("from", turn.get("role"))), "content": turn.get("value", turn.get("content"))}
        for turn in turns
    ]
    return _rest(values, "conversations", "system") | {"messages": _after_system(values, messages)}


def from_openai(values: Values) -> Values:
    """OpenAI-chat and Hugging Face: contents may be parts, {type: text, text} and {type: image_url, image_url: {url}}.

    Parts {type: image} without a picture of their own take those of `images` or `image`, in order.
    """
    parts_of = [_parsed(message) for message in _parsed(values["messages"])]
    rest = _rest(values, "messages", "system")
    images: list[Any] = []
    messages: list[Values] = []
    num_tags = 0  # that stand in the words of parts already
    for message in parts_of:
        if not isinstance(message, dict):
            raise ConversionError("messages", "every message needs a role and a content")
        if message.get("tool_calls"):
            raise ConversionError("messages", "a message calls tools, which the model does not learn; drop the row")
        content = message.get("content")
        if isinstance(content, list):
            before = len(images)
            content = "".join(_part(part, images) for part in content)
            num_tags += content.count(IMAGE_TAG) - (len(images) - before)
        messages.append({"role": _role(message.get("role")), "content": content})
    if num_tags and (images or not rest.get("images")):
        raise ConversionError("placeholders", f"a text part holds {IMAGE_TAG} beside picture parts; take it out")
    own = [image for image in images if image is not None]
    if own:
        if rest.get("images") or len(own) < len(images):
            raise ConversionError("images", "pictures both among the parts of messages and in images; keep one")
        rest["images"] = own
    return rest | {"messages": _after_system(values, messages)}


def from_prompt(values: Values) -> Values:
    """TRL: `prompt` and `completion`, each a text or a list of messages; `images` or `image`."""
    messages = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        said = values[key]
        if isinstance(said, str) and not MESSAGES_TEXT.match(said):
            said = [{"role": role, "content": said}]
        said = _parsed(said)
        messages += said if isinstance(said, list) else [said]
    return _with_tags(from_openai(_without(values, "prompt", "completion") | {"messages": messages}))


def from_query(values: Values) -> Values:
    """ms-swift: `query` and `response`, `history` of [query, response] before, `system`, `images` or `image`."""
    history = _parsed(values["history"]) if values.get("history") else []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ConversionError("messages", "history must be a list of [query, response]")
    messages = []
    for query, response in (*history, (values["query"], values["response"])):
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    rest = _rest(values, "query", "response", "history", "system")
    return _with_tags(rest | {"messages": _after_system(values, messages)})


def from_captions(values: Values) -> Values:
    """{image, caption | captions | text} -> paint what the caption says. captions: a list, or lists by label."""
    values = with_pictures(values)
    used = next((key for key in CAPTION_KEYS if key in values), "caption")
    texts = _given(values[used], used, "write what the picture shows")
    language = _language(values, texts)
    template = GENERATION_PROMPT[language]
    return _rest(values, used, "language") | {
        "messages": [
            {"role": "user", "content": _for_each(template.format, texts)},
            {"role": "assistant", "content": GENERATION_REPLY[language]},
        ]
    }


def from_edits(values: Values) -> Values:
    """{source_image, target_image, instruction | instructions} -> edit the one into the other."""
    used = "instructions" if "instructions" in values else "instruction"
    instructions = _given(values[used], used, "write what to change")
    for key in ("source_image", "target_image"):
        if is_empty(values[key]):
            raise ConversionError("images", f"{key} is empty; give its path, or take the row out")
    return _without(values, used, "source_image", "target_image", "language") | {
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
    "trl": from_prompt,
    "swift": from_query,
    "captions": from_captions,
    "edits": from_edits,
}
CAPTION_KEYS = ("captions", "caption", "text")
PICTURE_KEYS = frozenset(("image", "images", "source_image", "target_image"))
# A format by the keys that together only its rows have; the first that fits is taken. A `text` alone is no caption.
DETECTED_BY = (
    (("conversations",), "sharegpt"),
    (("source_image",), "edits"),
    (("captions",), "captions"),
    (("caption",), "captions"),
    (("query", "response"), "swift"),
    (("prompt", "completion"), "trl"),
)
# What the rows of each format have, to say which one a row is nearest to.
KEYS_OF = {
    "captions": ("image", "caption"),
    "edits": ("source_image", "target_image", "instruction"),
    "swift": ("query", "response"),
    "trl": ("prompt", "completion"),
}


def known_form(values: Values, has_pictures: bool = False) -> str | None:
    """The name of the format that a row is in; None when its keys are of none. has_pictures: beside the row."""
    messages = values.get("messages")
    if messages is not None:
        is_openai = isinstance(messages, list) and any(_is_openai(message) for message in messages)
        return "openai" if is_openai else "messages"
    given = {key for key, value in values.items() if value is not None}
    for keys, name in DETECTED_BY:
        if given.issuperset(keys):
            return name
    has_pictures = has_pictures or not given.isdisjoint(("image", "images", "file_name", "file_names"))
    return "captions" if "text" in given and has_pictures else None


def convert(values: Values, form: str, empty: Collection[str] = ()) -> Values:
    """The row in our format. form: a key of CONVERTERS. empty: keys that were null. Raises ConversionError."""
    try:
        return CONVERTERS[form](values)
    except KeyError as error:
        key = error.args[0]
        raise ConversionError(
            "key", _needed(form, key) if key in empty else f"a row of format {form} needs {key!r}"
        ) from error


def empty_key(values: Values, empty: Collection[str], has_pictures: bool) -> str:
    """What to say of a row that would have a format if one of its keys were not null; empty for other rows."""
    for key in sorted(empty):
        if form := known_form({**values, key: ""}, has_pictures):
            return _needed(form, key)
    return ""


def _needed(form: str, key: str) -> str:
    return f"{key!r}, which a row of format {form} needs, is empty; give it, or take the row out"


def nearest_form(values: Values) -> str:
    """Which format a row without messages is nearest to and what it lacks for that; empty when it is near none."""
    same = {"text": "caption", "captions": "caption", "images": "image", "file_name": "image"}
    given = {same.get(key, key) for key in values}
    lacking = {name: [key for key in keys if key not in given] for name, keys in KEYS_OF.items()}
    shared = {name: len(keys) - len(lacking[name]) for name, keys in KEYS_OF.items()}
    nearest = max(shared, key=lambda name: (shared[name], -len(lacking[name])))
    if not shared[nearest]:
        return ""
    return f"; the nearest format is {nearest}, which also needs {' and '.join(map(repr, lacking[nearest]))}"


def with_pictures(values: Values) -> Values:
    """Hugging Face's imagefolder: `file_name` is an image, `source_image_file_name` a source_image; others stay."""
    renamed = {}
    for key, value in values.items():
        new = {"file_name": "image", "file_names": "images"}.get(key) or re.sub("_file_names?$", "", key)
        renamed[new if new in PICTURE_KEYS and new not in values else key] = value
    return renamed


def _without(values: Values, *keys: str) -> Values:
    return {key: value for key, value in values.items() if key not in keys}


def _rest(values: Values, *without: str) -> Values:
    """What a converter passes on, with a single `image` as `images`."""
    rest = _without(values, *without)
    one, several = (_paths(rest.pop(key, None)) for key in ("image", "images"))
    if several is None and one is not None:
        several = [image for image in one if not is_empty(image)] or None
    elif one is not None:
        rest["image"] = values["image"]  # a key of the row's own
    return rest if several is None else rest | {"images": several}


def _paths(images: Any) -> list[Any] | None:
    """What a column of pictures holds: several, one alone, either as JSON text, or none."""
    if isinstance(images, str) and PATHS_TEXT.match(images):
        images = _parsed(images.strip() or "null", "images")
    return images if isinstance(images, list) or images is None else [images]


def _after_system(values: Values, messages: Any) -> Any:
    """The messages, behind the system prompt that stands apart from them."""
    if not values.get("system") or not isinstance(messages, list):
        return messages
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise ConversionError("order", "a system prompt both in system and as the first message; keep one")
    return [{"role": "system", "content": values["system"]}, *messages]


def _given(texts: Any, key: str, remedy: str) -> Any:
    """Texts of a caption or an instruction, nulls of a table left out; ConversionError where none is left."""
    if isinstance(texts, dict):
        texts = {label: of_label for label, of_label in texts.items() if of_label is not None}
    elif isinstance(texts, list):
        texts = [text for text in texts if text is not None]
    if not texts or (isinstance(texts, str) and not texts.strip()):
        raise ConversionError("empty_prompt", f"{key} is empty; {remedy}, or take the row out")
    return texts


def is_empty(image: Any) -> bool:
    """What stands where a row has no picture: null, no text, or Hugging Face's {bytes, path} with neither."""
    return (
        image is None
        or image in ("", b"")
        or (isinstance(image, dict) and all(value is None for value in image.values()))
    )


def _with_tags(values: Values) -> Values:
    """The row with a tag for each picture before its first question, where it has none: what its trainers do."""
    messages, images = values["messages"], values.get("images")
    texts = [message.get("content") for message in messages]
    if not isinstance(images, list) or any(IMAGE_TAG in text for text in texts if isinstance(text, str)):
        return values
    tags = IMAGE_TAG * sum(not is_empty(image) for image in images)
    for message in messages:
        if message["role"] == "user" and isinstance(message["content"], str):
            message["content"] = tags + message["content"]
            break
    return values


def _parsed(value: Any, name: str = "messages") -> Any:
    """Parquet columns often hold JSON as text. name: what errors call it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ConversionError(name, f"{name} are text but not JSON ({error})") from error


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
    """The text of a part of a message; a picture is added to `images` and becomes a tag, None for one from outside."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind is None:  # Qwen's own, which say it by their key
        kind = next((key for key in ("image", "image_url", "text") if part.get(key) is not None), None)
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    if kind in ("image_url", "input_image"):
        url = part.get("image_url")
        images.append(url.get("url") if isinstance(url, dict) else url)
        return IMAGE_TAG
    if kind == "image":
        source = part.get("source")  # Anthropic's name
        held = {**part, **source} if isinstance(source, dict) else part
        given = (held.get(key) for key in ("image", "path", "url", "base64", "data"))
        images.append(next((image for image in given if not is_empty(image)), None))
        return IMAGE_TAG
    raise ConversionError("messages", f"a message part of type {brief(kind)}; text, image_url and image are known")


def _for_each(template: Callable[[str], str], choices: Any) -> Any:
    """A template filled with every text of a choice; what is no text stays, to be named as an error."""
    if isinstance(choices, str):
        return template(choices) if choices.strip() else ""
    if isinstance(choices, list):
        return [_for_each(template, choice) for choice in choices]
    if isinstance(choices, dict):
        return {label: _for_each(template, choice) for label, choice in choices.items()}
    return choices


def _language(values: Values, texts: Any) -> str:
    language = values.get("language", language_of(str(texts)))
    if language not in LANGUAGES:
        raise ConversionError("language", f"language is {brief(language)}; {' and '.join(LANGUAGES)} are known")
    return language
