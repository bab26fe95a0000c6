"""docs/evaluation.md defines every score that an evaluation writes, and names a test that is there for each."""

import ast
import json
import re
from pathlib import Path

import pytest

from data.shapes.contents import CATEGORIES
from nexus_gen.parts.models import DECODER_KINDS, SHIPPED_RUN
from train.scores.outcomes import scores_of

ROOT = Path(__file__).parents[3]
TASKS = ("understanding", "generation", "editing")


def table() -> list[list[str]]:
    """The cells of the rows of the table of scores."""
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^### Scores\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def pattern(name: str) -> re.Pattern[str]:
    """What a listed name stands for. Categories are those of its task."""
    words = {
        "<category>": "|".join(CATEGORIES.get(name.split("/")[0], ())),
        "<language>": "en|zh",
        "<decoder>": "|".join(DECODER_KINDS),
    }
    return re.compile("".join(f"({words[part]})" if part in words else part for part in re.split(r"(<\w+>)", name)))


def mixed_outcomes() -> list[dict]:
    """One outcome of each category in each language, and of each decoder."""
    measures = {"psnr": 20.0, "l1": 0.1, "ssim": 0.5}
    facts = {"exact_scene": True, "ground": True, "texture": False, "kept": True, **measures}
    outcomes = [
        {"phase": task, "category": category, "language": language, "right": language == "en", **facts}
        for task in TASKS
        for category in CATEGORIES[task]
        for language in ("en", "zh")
    ]
    return [*outcomes, *({"phase": f"reconstruction/{kind}", **measures} for kind in DECODER_KINDS)]


def test_every_score_is_listed_once_and_every_listed_one_is_written() -> None:
    written = set(scores_of(mixed_outcomes()))
    for path in SHIPPED_RUN.glob("evaluation/*/scores.json"):
        written |= json.loads(path.read_text(encoding="utf-8")).keys()
    patterns = [pattern(name.strip("`")) for name, _, _ in table()]
    listed = {name: [one.pattern for one in patterns if one.fullmatch(name)] for name in written}
    assert {name: found for name, found in listed.items() if len(found) != 1} == {}
    assert [one.pattern for one in patterns if not any(map(one.fullmatch, written))] == []


@pytest.mark.parametrize(("name", "definition", "proof"), table(), ids=[name for name, *_ in table()])
def test_every_score_has_a_definition_and_a_test(name: str, definition: str, proof: str) -> None:
    assert len(definition) > 20
    file, _, test = proof.strip("`").partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, proof
