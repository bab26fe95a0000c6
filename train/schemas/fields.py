"""Reading config dataclasses: which keys there are, plain values into a typed config, fingerprints."""

import dataclasses
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nexus_gen.specs.artifact import digest, fingerprint_inside, hash_file
from nexus_gen.specs.errors import UserError, nearest
from train.schemas.common import PATH
from train.schemas.stages import SCHEMAS, StageConfig

_SAMPLED_BYTES = 1 << 20  # of large files, the two ends and the size stand for the whole


def walk(schema: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """(dotted key, marks) of every leaf and section of a config dataclass."""
    hints = typing.get_type_hints(schema, include_extras=True)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        marks = getattr(hint, "__metadata__", ())
        kind = typing.get_args(hint)[0] if marks else hint
        yield f"{prefix}{field.name}", marks
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from walk(kind, f"{prefix}{field.name}.")


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


def typed(stage: str, values: dict[str, Any]) -> StageConfig:
    """The stage's config object; UserError for an unknown key, a missing value or a wrong type."""
    schema = SCHEMAS[stage]
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
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
    config.check()
    return config


def as_yaml(config: StageConfig) -> str:
    """The resolved config, as `--cfg` prints it and the run directory records it."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


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


def input_fingerprints(config: StageConfig) -> dict[str, str]:
    """Role -> fingerprint of what the stage reads."""
    return {role: fingerprint_path(where) for role, where in config.inputs().items()} | config.content_fingerprints()


def fingerprint_path(where: Path) -> str:
    """An artifact's own fingerprint for anything inside one; else a hash of names, sizes and contents."""
    if (inside := fingerprint_inside(where)) is not None:
        return inside
    if where.is_file():
        return _fingerprint_file(where)
    return digest(
        [
            [path.relative_to(where).as_posix(), _fingerprint_file(path)]
            for path in sorted(where.rglob("*"))
            if path.is_file()
        ]
    )


def _fingerprint_file(path: Path) -> str:
    size = path.stat().st_size
    if size <= 2 * _SAMPLED_BYTES:
        return hash_file(path)
    with open(path, "rb") as file:
        head = file.read(_SAMPLED_BYTES)
        file.seek(-_SAMPLED_BYTES, os.SEEK_END)
        return digest([size, head.hex(), file.read().hex()])
