"""The commands of docs/datasets.md, "Your own dataset in ten minutes", as they stand there, on a few rows."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from runs import NEXUS_GEN, TRAINED

from train.runs.directory import load_config
from train.schemas.schedule import SCHEDULE_FILE

CHECKOUT = Path(__file__).parents[1]
PAGE = CHECKOUT / "docs" / "datasets.md"
# What makes them short: 20 training rows of each task, and a budget that no stage can be cut down to.
SHORT = {
    "python docs/examples/icons.py": ["--rows", "60"],
    "nexus-gen run": ["budget_minutes=0.1", "launch.device=cpu", "samples.num_pictures=0", "heldout.num_samples=2"],
}


def commands() -> list[list[str]]:
    """The indented commands of the section."""
    section = PAGE.read_text(encoding="utf-8").split("## Your own dataset in ten minutes\n")[1].split("\n## ")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines if line.startswith(("python ", "nexus-gen "))]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Where the commands were run, and what each of them said."""
    place = tmp_path_factory.mktemp("own")
    (place / "docs").symlink_to(CHECKOUT / "docs")
    outputs = []
    for words in commands():
        more = next((extra for start, extra in SHORT.items() if " ".join(words).startswith(start)), [])
        program = {"python": sys.executable, "nexus-gen": NEXUS_GEN}[words[0]]
        environment = {**os.environ, "NEXUS_GEN_RUNS": "runs"}
        ran = subprocess.run(
            [program, *words[1:], *more], cwd=place, env=environment, capture_output=True, text=True, timeout=540
        )
        assert ran.returncode == 0, f"{words}: {ran.stdout[-1500:]}\n{ran.stderr[-4000:]}"
        outputs.append(ran.stdout + ran.stderr)
    return place, outputs


def test_the_section_has_its_five_commands() -> None:
    assert [words[:2] for words in commands()] == [
        ["python", "docs/examples/icons.py"],
        ["nexus-gen", "data"],
        ["nexus-gen", "run"],
        ["nexus-gen", "report"],
        ["nexus-gen", "generate"],
    ]


def test_the_run_trains_as_its_schedule_says_and_ends_with_scores(said: tuple[Path, list[str]]) -> None:
    place, (_, _, ran, reported, _) = said
    run = place / "runs" / "icons"
    schedule = json.loads((run / "schedule" / "artifact" / SCHEDULE_FILE).read_text(encoding="utf-8"))
    assert schedule["facts"]["rows"] == 60 and schedule["facts"]["decoders"]["editing_decoder"]["rows"] == 20
    for stage in TRAINED:
        config = load_config(run / stage)
        values = schedule["values"][stage]
        assert config.trainer.max_steps == values["trainer.max_steps"]  # type: ignore[attr-defined]
        assert config.optim.learning_rate == values["optim.learning_rate"]  # type: ignore[attr-defined]
        assert f"budget_minutes=0.1: {stage} gets {values['trainer.max_steps']} of the " in ran
    # Icons are new to the shipped decoder, and its autoencoder gives them back.
    facts = schedule["facts"]
    assert facts["decoders"]["generation_decoder"]["loss"] > facts["decoders"]["generation_decoder"]["known_loss"] * 5
    assert facts["psnr"] > 25
    scores = json.loads((run / "evaluation" / "heldout" / "scores.json").read_text(encoding="utf-8"))
    assert {name.split("/")[0] for name in scores} >= {"understanding", "generation", "editing", "reconstruction"}
    assert "page: " in ran and "report.html" in reported


def test_the_prompt_is_worded_as_the_rows_are(said: tuple[Path, list[str]]) -> None:
    place, outputs = said
    assert "Draw a magnifier, pink ground." in outputs[-1]
    assert Image.open(place / "magnifier.png").size == (72, 72)
