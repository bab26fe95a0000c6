"""`nexus-gen run --keys`: what each key of a composed config means."""

import os
import subprocess

import pytest
from runs import NEXUS_GEN, nexus_gen

from launch import run
from launch.compose import compose_stage
from launch.overrides import Override
from nexus_gen.specs.errors import UserError
from train.schemas.fields import keys
from train.schemas.listing import listing

LOGGER = """\
logger.tensorboard    bool  true
    Whether to write event files for TensorBoard
logger.wandb_mode     str   disabled
    Weights & Biases: disabled, offline (no account needed; `wandb sync`
    uploads later) or online
logger.wandb_project  str   nexus-gen
    Project at Weights & Biases that runs are listed under
"""


def shown(*arguments: str, columns: int = 72) -> str:
    """What the command prints into a pipe."""
    environment = {**os.environ, "COLUMNS": str(columns)}
    command = [NEXUS_GEN, "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_keys_types_values_units_and_lines_in_columns() -> None:
    assert shown("stage=pretrain", "--keys", "logger.*") == LOGGER
    assert shown("stage=pretrain", "--keys", "h?ldout.*s", "heldout.every_steps=1500") == (
        "heldout.every_steps  int  1500  steps\n"
        "    Steps between measurements; 0 measures after the last step only\n"
        "heldout.num_samples  int  48    samples\n"
        "    Held-out samples that are measured; 0 measures nothing\n"
    )


def test_without_a_pattern_every_key_once_and_no_line_too_wide() -> None:
    lines = shown("--keys", "stage=embed_editing", "runs_dir=/r", columns=100).splitlines()
    named = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert len(named) == len(set(named)) and set(named) == keys("embed_editing")
    assert max(map(len, lines)) <= 100 and "\x1b" not in "".join(lines)
    assert [line.split()[1:] for line in lines if line.startswith(("embed ", "runs_dir ", "data.quarantine "))] == [
        ["path", "/r"],
        ["list[path]", "[]"],
        ["section"],
    ]


def test_a_path_is_never_cut() -> None:
    config = compose_stage([Override.parse(text) for text in ("stage=shapes", f"runs_dir=/{'long/' * 30}")])
    (line,) = [line for line in listing([config], "runs_dir", 40).splitlines() if "/long" in line]
    assert line.split()[-1] == config.runs_dir


def test_a_pipeline_shows_the_stages_that_have_the_key() -> None:
    found = shown("pipeline=tiny", "--keys", "zero_stage", "pretrain.trainer.zero_stage=3")
    blocks = [block.splitlines()[:2] for block in found.split("\n\n")]
    assert [(head, *line.split()) for head, line in blocks] == [
        ("pretrain:", "trainer.zero_stage", "int", "3"),
        ("generation_decoder:", "trainer.zero_stage", "int", "2"),
        ("editing_decoder:", "trainer.zero_stage", "int", "2"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keys", "wamrup"], "no key of stage pretrain matches 'wamrup'; --keys without a pattern shows all"),
        (["--keys", "optim", "--cfg"], "--keys explains the config that --cfg and --dry-run print; give one"),
        (["--keys", "optim.lr=1"], "stage=pretrain has no key 'optim.lr'"),
    ],
)
def test_mistakes_beside_keys(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        run.main(["run", "stage=pretrain", *arguments])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("nexus-gen run stage=pretrain --k", ["--keys "]),
        ("nexus-gen run stage=pretrain --keys optim.w", ["optim.warmup_steps ", "optim.weight_decay "]),
        ("nexus-gen run stage=pretrain --keys freeze.vision freeze.m", ["freeze.merger="]),
    ],
)
def test_completion_of_keys(line: str, completions: list[str]) -> None:
    assert nexus_gen("completion", "--for", line).stdout.split("\n")[:-1] == completions
