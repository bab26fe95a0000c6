"""The keys of composed configs, each with its type, value, unit and line: what `nexus-gen run --keys` prints."""

import textwrap
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from nexus_gen.specs.errors import UserError
from train.schemas.common import PATH
from train.schemas.fields import Key, walk_keys
from train.schemas.stage import StageConfig

INDENT = " " * 4


def listing(configs: Sequence[StageConfig], pattern: str, width: int) -> str:
    """The keys that match, of one stage, or of several each under its name; lines are wrapped at `width` columns.

    pattern: a part of a key, or all of it with `*` and `?`; empty for every key. Raises UserError where none matches.
    """
    found = {config.stage: [key for key in walk_keys(type(config)) if matches(key.name, pattern)] for config in configs}
    if not any(found.values()):
        raise UserError(f"no key of stage {', '.join(found)} matches '{pattern}'; --keys without a pattern shows all")
    texts = [
        (f"{config.stage}:\n" if len(configs) > 1 else "") + described_keys(config, found[config.stage], width)
        for config in configs
        if found[config.stage]
    ]
    return "\n\n".join(texts)


def matches(name: str, pattern: str) -> bool:
    """Whether a key is meant by a pattern, as of `listing`."""
    return fnmatchcase(name, pattern) if set(pattern) & set("*?") else pattern in name


def described_keys(config: StageConfig, found: Sequence[Key], width: int) -> str:
    """Two paragraphs per key: name, type, value and unit in columns, and its line of documentation, indented."""
    values = {key.name: "" if key.is_section else as_typed(value_of(config, key.name)) for key in found}
    of_name = max(len(key.name) for key in found)
    of_kind = max(len(kind_of(key)) for key in found)
    of_value = max((len(values[key.name]) for key in found if key.unit), default=0)
    lines = []
    for key in found:
        head = f"{key.name:{of_name}}  {kind_of(key):{of_kind}}  "
        text = f"{values[key.name]:{of_value}}  {key.unit}" if key.unit else values[key.name]
        lines.append(wrapped(text, head, " " * len(head), width) if text else head.rstrip())
        lines.append(wrapped(key.doc, INDENT, INDENT, width))
    return "\n".join(lines)


def wrapped(text: str, first: str, following: str, width: int) -> str:
    """Text behind `first` in lines of at most `width`, unless a word alone is longer: paths stay whole."""
    if len(first) + len(text) <= width:  # as it is, with the blanks between columns
        return first + text
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def kind_of(key: Key) -> str:
    """`int`, `list[path]` or `section`."""
    if key.is_section:
        return "section"
    name = key.kind.__name__ if isinstance(key.kind, type) and not getattr(key.kind, "__args__", ()) else str(key.kind)
    return name.replace("str", "path") if PATH in key.marks else name


def value_of(config: StageConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def as_typed(value: Any) -> str:
    """A value as it can be given for its key."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return str(value) or '""'
