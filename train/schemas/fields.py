"""Reading config dataclasses: which keys there are, plain values into a typed config, fingerprints."""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nexus_gen.specs.errors import UserError, nearest
from nexus_gen.specs.keys import DOC, UNIT
from nexus_gen.specs.numbers import not_finite
from train.schemas.common import PATH
from train.schemas.stage import StageConfig
from train.schemas.table import SCHEMAS


class Key(NamedTuple):
    """A leaf or a section of a config dataclass. name: dotted. kind: its type, of a section the dataclass."""

    name: str
    kind: Any
    marks: tuple[str, ...]
    doc: str
    unit: str

    @property
    def is_section(self) -> bool:
        return isinstance(self.kind, type) and dataclasses.is_dataclass(self.kind)


def walk_keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """Every leaf and section of a config dataclass, a section in front of what is in it."""
    hints = typing.get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        marks = getattr(hint, "__metadata__", ())
        kind = typing.get_args(hint)[0] if marks else hint
        key = Key(f"{prefix}{field.name}", kind, marks, field.metadata[DOC], field.metadata[UNIT])
        yield key
        if key.is_section:
            yield from walk_keys(kind, f"{key.name}.")


def walk(schema: type) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(dotted key, marks) of every leaf and section of a config dataclass."""
    return ((key.name, key.marks) for key in walk_keys(schema))


@functools.cache
def types_of_keys() -> dict[str, Any]:
    """The type of every dotted key of any stage; a key is of one type wherever it is read."""
    return {key.name: key.kind for schema in SCHEMAS.values() for key in walk_keys(schema)}


def keys(stage: str) -> set[str]:
    """Every dotted key of a stage's config."""
    return {key for key, _ in walk(SCHEMAS[stage])}


def counted_keys(stage: str) -> set[str]:
    """The dotted keys that `fingerprint_values` may hold."""
    return {key for key, marks in walk(SCHEMAS[stage]) if not marks}


def path_values(stage: str, values: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(section, key) or (list, index) of every path that a stage's plain values give; what is empty is left out."""
    for key, marks in walk(SCHEMAS[stage]):
        if PATH in marks:
            *sections, leaf = key.split(".")
            section = values
            for name in sections:
                section = section.get(name, {})
            value = section.get(leaf)
            if isinstance(value, list):
                yield from ((value, index) for index in range(len(value)))
            elif value and value != "???":
                yield section, leaf


def escaped(values: Any) -> Any:
    """Plain values as OmegaConf gives them back: `${` in a text is part of it, as in the name of a file."""
    if isinstance(values, dict):
        return {name: escaped(value) for name, value in values.items()}
    if isinstance(values, list):
        return [escaped(value) for value in values]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


def typed(stage: str, values: dict[str, Any]) -> StageConfig:
    """The stage's config object from plain values, whose texts are taken as they are.

    Raises UserError for an unknown key, a missing value, a wrong type, or a number that is infinite or NaN.
    """
    schema = SCHEMAS[stage]
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), escaped(whole(stage, values))))
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UserError(f"stage={stage} has no key '{key}'{nearest(key, keys(stage))}") from error
    except MissingMandatoryValue as error:
        raise UserError(f"stage={stage} needs {error.full_key}=...; it has no default") from error
    except OmegaConfBaseException as error:
        if "is not a ListConfig" in str(error.msg):
            raise UserError(f"{error.full_key} takes a list: {error.full_key}=[A,B]") from error
        raise UserError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from error
    assert isinstance(config, StageConfig)
    for key, value in not_finite(dataclasses.asdict(config)):
        raise UserError(f"{key} is {value}; it must be a finite number")
    config.check()
    return config


def whole(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values with 2e3 and the like, which are floating-point numbers to YAML, as the whole numbers that keys want."""
    kinds = {key.name: key.kind for key in walk_keys(SCHEMAS[stage])}

    def converted(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: converted(item, f"{key}.{name}".removeprefix(".")) for name, item in value.items()}
        if isinstance(value, list):
            return [converted(item, key) for item in value]
        is_whole = kinds.get(key) in (int, list[int]) and isinstance(value, float) and value.is_integer()
        return int(value) if is_whole else value

    return converted(values, "")


def as_yaml(config: StageConfig) -> str:
    """The resolved config, as `--cfg` prints it and the run directory records it."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def fingerprint_values(config: StageConfig) -> dict[str, Any]:
    """The values that decide what a stage makes: no paths (their content counts), nothing of how it runs."""
    left_out = {key for key, marks in walk(type(config)) if marks}

    def kept(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            name: kept(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in values.items()
            if f"{prefix}{name}" not in left_out
        }

    return kept(dataclasses.asdict(config), "")
