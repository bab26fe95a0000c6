"""The package rule of docs/architecture.md, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("nexus_gen", "data", "train", "launch", "tests")
TRAINERS = ("swift", "lightning", "deepspeed", "pytorch_lightning")
HEAVY = ("torch", "transformers", "diffsynth", "safetensors", "webdataset", *TRAINERS)
# importer -> what of ours it may import
ALLOWED = {
    "nexus_gen": ("nexus_gen",),
    "nexus_gen.specs": ("nexus_gen.specs",),
    "data": ("data", "nexus_gen.specs"),
    "train": ("train", "data", "nexus_gen"),
    "train.schemas": ("train.schemas", "data", "nexus_gen.specs"),
    "launch": ("launch", "train.schemas", "nexus_gen.specs"),
}
MODULES = sorted(
    path for package in ("nexus_gen", "data", "train", "launch") for path in (ROOT / package).rglob("*.py")
)


def imported(path: Path, top_level_only: bool = False) -> list[str]:
    """Dotted names that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names.append(node.module or "")
    return names


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def owner(path: Path) -> str:
    """The most specific entry of ALLOWED that the file belongs to."""
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return max((package for package in ALLOWED if inside(dotted, package)), key=len)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_package_rule(path: Path) -> None:
    package = owner(path)
    for name in imported(path):
        if name.split(".")[0] in OURS:
            assert any(inside(name, allowed) for allowed in ALLOWED[package]), f"{package} may not import {name}"
        if name.split(".")[0] in TRAINERS:
            assert inside(package, "train"), f"{name} belongs in train only"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if owner(path) in ("launch", "train.schemas", "nexus_gen.specs")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_what_a_launcher_reads_is_light(path: Path) -> None:
    for name in imported(path):
        assert name.split(".")[0] not in HEAVY, f"{path} imports {name}, which a launcher should not wait for"


def test_every_package_file_is_empty() -> None:
    for package in ("nexus_gen", "data", "train", "launch"):
        for path in (ROOT / package).rglob("__init__.py"):
            assert path.read_text() == "", f"{path} must stay empty"
