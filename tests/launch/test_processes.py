"""Command lines, scripts and variables of a stage's processes, for paths of any characters and from any directory."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.compose import compose_stage
from launch.overrides import Override
from launch.processes import for_sbatch, slurm_script, worker_command, worker_environment
from launch.python_path import CHECKOUT, python_variables
from launch.run import describe
from nexus_gen.specs.errors import UserError
from train.schemas.stage import StageConfig

NAMES = (
    "plain",
    "my run",
    "a$b",
    "$head:29500",
    "${x}",
    "it's",
    '"',
    "`x`",
    "中文",
    "#1",
    "50%",
    "!x",
    "a;b",
    "{1..3}",
)


def stage(name: str, *texts: str) -> StageConfig:
    return compose_stage([Override.parse(text) for text in ("stage=shapes", f"name={name}", *texts)])


def sbatch_words(text: str) -> list[str]:
    """The words of a #SBATCH line as sbatch takes them apart: escaped characters first, then quotes, then #."""
    words, word, quote, characters = [], "", "", iter(text)
    for character in characters:
        if character == "\\":
            word += next(characters)
        elif quote:
            assert character != "#"
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "'\"":
            quote = character
        elif character == "#":
            break
        elif character.isspace():
            words.append(word)
            word = ""
        else:
            word += character
    return [*words, word]


@pytest.mark.parametrize("name", NAMES)
def test_a_job_names_its_config_and_log_whatever_they_are_called(name: str, tmp_path: Path) -> None:
    config = stage(name, f"runs_dir={tmp_path}", "launch=slurm", "launch.partition=gpu 2")
    script = slurm_script(config.launch, config.run_dir / "config.yaml")
    options = dict(
        word.split("=", 1)
        for line in script.splitlines()
        if line.startswith("#SBATCH ")
        for word in sbatch_words(line.removeprefix("#SBATCH "))
    )
    assert options["--output"].replace("%%", "%") == f"{config.run_dir}/log/slurm-%j.log"
    assert options["--partition"] == "gpu 2"
    (config.run_dir / "log").mkdir(parents=True)
    stubs = 'scontrol() { echo node7; }; srun() { printf "%s\\0" "$@"; env -0 >environment; }'
    ran = subprocess.run(
        ["bash", "-c", f"{stubs}\n{script}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "SLURM_JOB_ID": "3", "SLURM_JOB_NODELIST": "node[7-8]"},
    )
    words = ran.stdout.split("\0")[:-1]
    assert words[-1] == f"{config.run_dir}/config.yaml" and "--rdzv-endpoint=node7:29500" in words, ran.stderr
    variables = (tmp_path / "environment").read_text().split("\0")
    assert {"PYTHONSAFEPATH=1", f"PYTHONPATH={python_variables()['PYTHONPATH']}"} <= set(variables)


def test_slurm_takes_no_backslash_and_no_line_break_in_a_log(tmp_path: Path) -> None:
    config = stage("a\\b", f"runs_dir={tmp_path}", "launch=slurm")
    with pytest.raises(UserError, match="with its backslash; give another name or runs_dir"):
        slurm_script(config.launch, config.run_dir / "config.yaml")
    config = stage("a", f"runs_dir={tmp_path}/two\nlines", "launch=slurm")
    with pytest.raises(UserError, match="with its line break; give another name or runs_dir"):
        slurm_script(config.launch, config.run_dir / "config.yaml")
    assert for_sbatch("gpu") == "gpu"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_dry_run_prints_can_be_pasted(name: str) -> None:
    config = stage(name)
    (line,) = [line for line in describe(config).splitlines() if "train.worker" in line]
    assert shlex.split(line)[-1] == f"{config.run_dir}/config.yaml"
    assert {"PYTHONSAFEPATH=1", f"PYTHONPATH={worker_environment(config.launch)['PYTHONPATH']}"} <= set(
        shlex.split(line)
    )
    assert worker_command(config.launch, config.run_dir / "config.yaml")[-1] == f"{config.run_dir}/config.yaml"


@pytest.mark.parametrize(
    ("earlier", "places"), [(None, []), ("", []), ("/x::/y:", ["/x", "/y"]), (f"/x:{CHECKOUT}", ["/x"])]
)
def test_modules_come_from_the_checkout_and_not_from_the_working_directory(
    earlier: str | None, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if earlier is not None:
        monkeypatch.setenv("PYTHONPATH", earlier)
    assert python_variables()["PYTHONPATH"].split(os.pathsep) == [str(CHECKOUT), *places]
