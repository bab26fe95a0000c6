"""Keys of configs that explain themselves: a line of documentation and a unit for every field of a config dataclass."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

Class = TypeVar("Class")
DOC, UNIT = "doc", "unit"  # of a field's metadata


def key(doc: str, unit: str = "", *, default: Any = dataclasses.MISSING, kw_only: bool = False) -> Any:
    """A field of a config dataclass: `max_steps: int = key("Optimizer steps that the stage trains", "steps")`.

    doc: one line, which `nexus-gen run --keys` prints. unit: of its numbers, where they have one. A key without a
    default is required.
    """
    return dataclasses.field(default=default, kw_only=kw_only, metadata={DOC: doc, UNIT: unit})


def key_of(other: type, name: str) -> Any:
    """A field with the line and the unit that another config dataclass gives to `name`: it means the same there."""
    found = {field.name: field for field in dataclasses.fields(other)}[name]
    return key(found.metadata[DOC], found.metadata[UNIT])


@dataclass_transform(field_specifiers=(key, key_of))
def described(schema: type[Class]) -> type[Class]:
    """A dataclass each of whose fields is a `key`. Raises TypeError for one that is not.

    Not frozen: omegaconf takes that for read-only and then cannot fill it.
    """
    made = dataclasses.dataclass(schema)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        if not field.metadata.get(DOC):
            raise TypeError(
                f"{schema.__name__}.{field.name} needs a line of documentation: {field.name}: ... = key(...)"
            )
    return made
