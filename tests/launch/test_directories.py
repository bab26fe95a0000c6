"""Commands started in a directory full of names that modules have, and in no checkout at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.python_path import CHECKOUT

NEXUS_GEN = str(Path(sys.executable).parent / "nexus-gen")
OURS = ("data", "train", "launch", "nexus_gen", "tests", "configs")
OTHERS = (
    "random",
    "json",
    "torch",
    "numpy",
    "socket",
    "pickle",
    "struct",
    "select",
    "signal",
    "hydra",
    "tempfile",
    "yaml",
)
NAME = "a=b, [c] ${d}$$%(e)'s {1..3} 中"


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """A directory whose modules end the process that imports them."""
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} of the working directory')")
    for name in (*OTHERS, "train"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return tmp_path


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    variables |= {"PYTHONPATH": str(CHECKOUT), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=variables, timeout=300)


def test_modules_of_the_working_directory_are_left_alone(traps: Path) -> None:
    ran = run(NEXUS_GEN, "data", "check", "rows.jsonl", "--num-workers", "2", cwd=traps)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    for name in ("launch", "nexus_gen"):  # python -m finds these before a line of ours has run
        (traps / name).rename(traps / f"{name}_")
    ran = run(sys.executable, "-m", "launch.cli", "run", "stage=shapes", "--cfg", cwd=traps)
    assert ran.returncode == 0 and ran.stdout.startswith("stage: shapes"), ran.stderr


def test_a_checkout_needs_no_installation(tmp_path: Path) -> None:
    ran = run(sys.executable, "-m", "launch.cli", "run", "stage=shapes", "--cfg", cwd=CHECKOUT, PYTHONPATH="")
    assert ran.returncode == 0 and ran.stdout.startswith("stage: shapes"), ran.stderr


@pytest.mark.slow
def test_a_stage_runs_among_traps_under_any_name(traps: Path) -> None:
    sizes = [f"shapes.num_{what}=3" for what in ("train", "heldout", "compositional")]
    ran = run(NEXUS_GEN, "run", "--dry-run", "stage=shapes", f"name={NAME}", *sizes, cwd=traps)
    assert ran.returncode == 0, ran.stderr
    ran = run(NEXUS_GEN, "run", "stage=shapes", f"name={NAME}", *sizes, cwd=traps)
    assert ran.returncode == 0, ran.stderr
    rows = traps / "runs" / NAME / "shapes" / "artifact" / "train.jsonl"
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 3
    ran = run(NEXUS_GEN, "run", "stage=shapes", *sizes, f"name={NAME}", cwd=traps)
    assert "unchanged, skipped" in ran.stdout, ran.stderr
