"""Every key of every config has a line of documentation, and configs read nothing of what they name."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from data.shapes.contents import ShapesConfig
from launch.compose import compose_stage
from launch.overrides import Override
from nexus_gen.specs.keys import described, key, key_of
from train import schemas
from train.schemas.ablation import Ablation
from train.schemas.common import HeldoutConfig
from train.schemas.fields import walk_keys
from train.schemas.schedule import ScheduleTrainerConfig
from train.schemas.table import SCHEMAS

ROOM = Path(schemas.__path__[0])


def classes_of(schema: type) -> set[type]:
    """A config dataclass and those of its sections."""
    return {schema, *(found.kind for found in walk_keys(schema) if found.is_section)}


CLASSES = sorted({found for schema in (*SCHEMAS.values(), Ablation) for found in classes_of(schema)}, key=str)


@pytest.mark.parametrize("schema", CLASSES, ids=lambda schema: schema.__name__)
def test_every_field_has_a_line_of_its_own(schema: type) -> None:
    docs = {field.name: field.metadata["doc"] for field in dataclasses.fields(schema)}
    assert docs
    for name, doc in docs.items():
        assert doc == doc.strip() and len(doc) > 12 and "\n" not in doc, f"{schema.__name__}.{name}"
        assert doc[0].isupper() and doc[-1] != ".", f"{schema.__name__}.{name}: {doc}"
        assert doc.lower().replace(" ", "_") != name
    assert len(set(docs.values())) == len(docs)


def test_the_classes_are_those_of_whole_configs() -> None:
    assert {ShapesConfig, HeldoutConfig, Ablation, *SCHEMAS.values()} < set(CLASSES) and len(CLASSES) > 35


def test_a_key_means_the_same_in_every_stage() -> None:
    meanings: dict[str, set[tuple[str, str]]] = {}
    for schema in SCHEMAS.values():
        for found in walk_keys(schema):
            if not found.is_section:
                meanings.setdefault(found.name, set()).add((found.doc, found.unit))
    assert {name for name, lines in meanings.items() if len(lines) > 1} == set()


@pytest.mark.parametrize(("ending", "unit"), [("_steps", "steps"), ("_minutes", "minutes"), ("_pixels", "pixels")])
def test_units_are_those_of_the_names(ending: str, unit: str) -> None:
    found = [one for schema in SCHEMAS.values() for one in walk_keys(schema) if one.name.endswith(ending)]
    assert found and {one.unit for one in found} == {unit}


def test_a_field_without_a_line_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Undocumented\.size needs a line of documentation"):

        @described
        class Undocumented:
            rate: float = key("How fast it goes")
            size: int


def test_key_of_repeats_the_line_and_the_unit_of_another_class() -> None:
    @described
    class Own:
        every: int = key_of(HeldoutConfig, "every_steps")

    (field,) = dataclasses.fields(Own)  # type: ignore[arg-type]
    assert (field.metadata["doc"], field.metadata["unit"]) == (
        "Steps between measurements; 0 measures after the last step only",
        "steps",
    )
    assert "bfloat16" in dataclasses.fields(ScheduleTrainerConfig)[0].metadata["doc"]  # type: ignore[arg-type]


READING = {"open", "read_text", "read_bytes", "write_text", "is_file", "is_dir", "exists", "stat", "glob", "iterdir"}


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.stem)
def test_schemas_read_no_files(path: Path) -> None:
    """By the calls in their source: a config can be described where nothing of it is on disk."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in READING and not called.startswith(("load_", "read_", "write_", "check_dataset")), (
                called
            )


@pytest.mark.parametrize("stage", ["pretrain", "embed_generation", "embed_editing", "schedule", "standins"])
def test_configs_of_missing_files_are_complete_configs(stage: str) -> None:
    rows: list[str] = ["data.heldout=/nowhere/b.jsonl"] if stage != "standins" else []
    texts = [f"stage={stage}", "data=messages", "data.train=/nowhere/a-*.jsonl", *rows, "data.quarantine=[/nowhere/q]"]
    config: Any = compose_stage([Override.parse(text) for text in texts])
    assert config.data.train == "/nowhere/a-*.jsonl"
