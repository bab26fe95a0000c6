"""`key=value`, `STAGE.key=value` and `group=file`: as people type them, and as files of configs/ hold them.

What a person types for a text or a path is taken as it is: name=1.50, data.train=/数据/a=b,c${d}.jsonl. Quotes around
all of it, as Hydra's grammar has them, are taken off. Lists of paths are [A,B], quoted where one has a comma in it.
Numbers, switches and lists of numbers are read by Hydra's grammar.
"""

import re
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as Parsed
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from launch.python_path import CHECKOUT
from nexus_gen.specs.arguments import list_to_paste
from nexus_gen.specs.errors import UserError, nearest
from train.schemas.fields import escaped, types_of_keys
from train.schemas.table import SCHEMAS

CONFIGS = CHECKOUT / "configs"
NOT_OF_STAGES = ("pipeline", "ablation")  # folders of configs/ that hold plans, not parts of a stage's config
GROUPS = tuple(sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in NOT_OF_STAGES))
EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[int]: "a list of whole numbers, as in [1,2]",
    list[float]: "a list of numbers, as in [0.9,0.95]",
}
ELEMENT = re.compile(r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,]*?)\s*(?:,|$)""", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """text: the whole of it, as it was given. key: without the stage of `STAGE.key`, which is `stage`, else empty.

    is_group: it picks a file of configs/<key>/. value: in Hydra's grammar.
    """

    text: str
    key: str
    value: str
    stage: str
    is_group: bool

    @staticmethod
    def parse(text: str) -> "Override":
        """What a person typed. Raises UserError."""
        stage, key, value = split(text)
        if key in GROUPS:
            value = choice(key, value)
        elif (kind := types_of_keys().get(key)) in (str, None):  # keys that are not there are refused by their name
            value = quoted(unquoted(value))
        elif kind == list[str]:
            value = f"[{','.join(quoted(element) for element in elements(text, key, value))}]"
        else:
            if kind in (list[int], list[float]) and "," in value and value[:1] != "[":
                raise UserError(f"{key} takes a list: {text.partition('=')[0]}=[{value}]")
            read(text, key, value, EXPECTED.get(kind, "values by name, as in {name: value}"))
        return Override(text, key, value, stage, key in GROUPS)

    @staticmethod
    def of_config(text: str) -> "Override":
        """A line of a file of configs/, all of it in Hydra's grammar: `${name}` is the value of that key."""
        stage, key, value = split(text)
        read(text, key, value, "in Hydra's grammar")
        return Override(text, key, value, stage, key in GROUPS)

    @property
    def in_hydra(self) -> str:
        return f"{self.key}={self.value}"


def split(text: str) -> tuple[str, str, str]:
    """(stage, key, value) of `key=value` or `STAGE.key=value`."""
    key, equals, value = text.partition("=")
    if key.startswith("~"):
        raise UserError(f"'{text}' takes a key away, and every stage needs its keys; give key=value")
    key = key.lstrip("+")  # Hydra's signs for keys that are not there yet, of which there are none
    if not equals or not key:
        raise UserError(f"'{text}' is not key=value; give one, as in name=mine")
    stage, _, rest = key.partition(".")
    return (stage, rest, value) if rest and stage in SCHEMAS and key not in types_of_keys() else ("", key, value)


def choices(group: str) -> list[str]:
    """The files of configs/<group>/; stages in the order in which they run."""
    names = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
    return [name for name in SCHEMAS if name in names] if group == "stage" else sorted(names)


def choice(group: str, value: str) -> str:
    """A file of a group. UserError naming the nearest one."""
    value = unquoted(value)
    if value not in choices(group) and (group, value) != ("experiment", "null"):
        what = "there is no {}" if value.isidentifier() else f"'{{}}' names no file of configs/{group}/"
        raise UserError(what.format(f"{group}={value}") + nearest(value, choices(group)))
    return value


def read(text: str, key: str, value: str, expected: str) -> Parsed:
    """A value by Hydra's grammar. UserError for one that it has not, and for several."""
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise UserError(f"'{text}' cannot be read; {key} must be {expected}") from error
    if parsed.is_sweep_override():
        raise UserError(f"'{text}' is a sweep; give one value, or start one run per value")
    return parsed


def elements(text: str, key: str, value: str) -> list[str]:
    """The elements of [A,B]. UserError, with the line to type instead, for what is no list."""
    if not (value.startswith("[") and value.endswith("]")):
        raise UserError(f"{key} takes a list: {key}=[A,B], here {list_to_paste(text.partition('=')[0], value)}")
    inside = value[1:-1].strip()
    found, place = [], 0
    while place < len(inside):
        match = ELEMENT.match(inside, place)
        assert match is not None  # its last alternative takes anything
        found.append(unquoted(match[1]))
        place = match.end()
        if not found[-1]:
            raise UserError(f"'{text}' has a comma with nothing in front of it; take it out")
    return found


def quoted(value: str) -> str:
    """A text in Hydra's grammar that stays what it is."""
    return QuotedString(escaped(value), Quote.single).with_quotes()


def unquoted(value: str) -> str:
    """A text without the quotes of Hydra's grammar around the whole of it, if they are."""
    if value[:1] not in ("'", '"') or value[-1:] != value[:1]:
        return value
    try:
        parsed: Any = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return value
    return parsed.value() if not parsed.is_sweep_override() and isinstance(parsed.value(), str) else value
