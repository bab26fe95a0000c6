"""The rule of rooms of docs/architecture.md, read from the imports themselves."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("nexus_gen", "data", "train", "launch")
TRAINERS = ("swift", "lightning", "deepspeed", "pytorch_lightning")
HEAVY = ("torch", "transformers", "diffsynth", "safetensors", "webdataset", *TRAINERS)
MOST_FILES = 12  # of source in a room
# room -> the rooms that it may import, beside itself. A room may import only rooms that stand above it here.
ALLOWED = {
    "nexus_gen.specs": "",
    "nexus_gen.artifacts": "nexus_gen.specs",
    "nexus_gen.pictures": "nexus_gen.specs",
    "nexus_gen.tensors": "nexus_gen.specs nexus_gen.artifacts",
    "nexus_gen.flux": "nexus_gen.specs nexus_gen.tensors",
    "nexus_gen.language": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.tensors",
    "nexus_gen.parts": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.tensors nexus_gen.flux "
    "nexus_gen.language",
    "nexus_gen.decoders": "nexus_gen.specs nexus_gen.tensors nexus_gen.flux nexus_gen.parts",
    "nexus_gen": "nexus_gen.specs nexus_gen.pictures nexus_gen.flux nexus_gen.language nexus_gen.parts "
    "nexus_gen.decoders",
    "nexus_gen.commands": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.tensors "
    "nexus_gen.language nexus_gen.parts nexus_gen",
    "nexus_gen.ui": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.parts nexus_gen "
    "nexus_gen.commands",
    "data": "",
    "data.shapes": "nexus_gen.specs nexus_gen.artifacts",
    "data.records": "nexus_gen.specs nexus_gen.pictures data",
    "data.messages": "nexus_gen.specs nexus_gen.pictures nexus_gen.language data data.shapes data.records",
    "data.mixture": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.parts data data.records "
    "data.messages",
    "data.shards": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures data.records data.messages data.mixture",
    "data.doctor": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.parts data data.shapes "
    "data.records data.messages data.mixture",
    "train.schemas": "nexus_gen.specs nexus_gen.artifacts data.shapes data.mixture data.shards",
    "train.preflight": "nexus_gen.specs nexus_gen.artifacts nexus_gen.tensors nexus_gen.language nexus_gen.parts "
    "data.records data.mixture data.shards train.schemas",
    "train.runs": "nexus_gen.specs nexus_gen.artifacts train.schemas train.preflight",
    "train.pages": "",
    "train.steps": "nexus_gen.specs nexus_gen.artifacts nexus_gen.tensors train.schemas train.runs",
    "train": "nexus_gen.specs nexus_gen.artifacts nexus_gen.tensors nexus_gen.parts data.shapes train.schemas "
    "train.runs train.steps",
    "train.standins": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.flux nexus_gen.language "
    "nexus_gen.decoders data.mixture train.schemas train.preflight train",
    "train.pretrain": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.language nexus_gen.parts "
    "data.records data.messages data.mixture data.shards train.schemas train.preflight train.runs train.steps train",
    "train.embed": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.tensors nexus_gen.flux "
    "nexus_gen.language nexus_gen.parts nexus_gen.decoders data.messages data.mixture data.shards train.schemas "
    "train.preflight train.steps train",
    "train.decoders": "nexus_gen.specs nexus_gen.artifacts nexus_gen.tensors nexus_gen.flux nexus_gen.language "
    "nexus_gen.parts nexus_gen.decoders data.shards train.schemas train.preflight train.runs train.steps train",
    "train.schedule": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.flux nexus_gen.language "
    "nexus_gen.parts nexus_gen.decoders data.messages data.mixture train.schemas train.preflight train.steps train "
    "train.decoders",
    "train.scores": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures data.shapes data.messages",
    "train.evaluate": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.parts nexus_gen "
    "nexus_gen.commands data.records data.messages data.mixture train.preflight train.runs train.pages train "
    "train.scores",
    "train.report": "nexus_gen.specs nexus_gen.artifacts nexus_gen.pictures nexus_gen.tensors nexus_gen.language "
    "nexus_gen.parts nexus_gen nexus_gen.commands data.messages data.mixture train.schemas train.preflight train.runs "
    "train.pages train.steps train train.decoders train.scores train.evaluate",
    "launch": "nexus_gen.specs nexus_gen.artifacts nexus_gen.parts train.schemas train.preflight train.runs",
}
# With all that they import: no wait for torch.
LIGHT = ("launch", "train.schemas", "train.preflight", "train.runs", "nexus_gen.specs")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


@cache
def imported(path: Path, at_once: bool = False) -> tuple[str, ...]:
    """Dotted names that a file imports: of modules, where a module is imported from its room.

    at_once: only those that it imports while it is imported itself.
    """
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in MODULES else node.module or "" for name in whole]
    return tuple(names)


def ours(name: str) -> bool:
    return name.split(".")[0] in (*PACKAGES, "tests")


def room(module: str) -> str:
    """The folder of a module."""
    return module.removesuffix(".__init__") if module.endswith(".__init__") else module.rpartition(".")[0]


def used_rooms(name: str) -> set[str]:
    paths = {module: path for module, path in MODULES.items() if room(module) == name}
    return {room(of) for path in paths.values() for of in imported(path) if ours(of)} - {name}


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rule_of_rooms(module: str) -> None:
    own = room(module)
    assert own in ALLOWED, f"{own} is a room that the rule does not know"
    for name in imported(MODULES[module]):
        if ours(name):
            assert name in MODULES, f"{module} imports {name}: import a module of a room"
            assert room(name) in (own, *ALLOWED[own].split()), f"{own} may not import {name}"
        if name.split(".")[0] in TRAINERS:
            assert own.split(".")[0] == "train", f"{name} belongs in train only"


@pytest.mark.parametrize("name", ALLOWED)
def test_rooms_stand_above_those_that_use_them(name: str) -> None:
    order = list(ALLOWED)
    allowed = ALLOWED[name].split()
    assert all(order.index(other) < order.index(name) for other in allowed), "a circle of rooms begins so"
    assert set(allowed) == used_rooms(name), "the rule allows what nobody uses"


@pytest.mark.parametrize("name", [*ALLOWED, "tests"])
def test_a_room_is_small_enough_to_look_through(name: str) -> None:
    where = ROOT / name.replace(".", "/")
    files = [path.name for path in where.iterdir() if path.suffix in (".py", ".j2", ".css")]
    assert len([file for file in files if file != "__init__.py"]) <= MOST_FILES


def test_what_a_launcher_reads_is_light() -> None:
    waiting = [module for module in MODULES if room(module) in LIGHT]
    seen = set(waiting)
    while waiting:
        module = waiting.pop()
        for name in imported(MODULES[module], at_once=room(module) not in LIGHT):
            assert name.split(".")[0] not in HEAVY, f"{module} imports {name}, which a launcher should not wait for"
            if name in MODULES and name not in seen:
                seen.add(name)
                waiting.append(name)


def test_every_package_file_is_empty() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            assert path.read_text() == "", f"{module} must stay empty"
