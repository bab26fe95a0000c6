"""How a stage ends when its processes meet a mistake or a death: told once, and nobody is left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from runs import SMALLEST, copy_run, losses, nexus_gen, run_arguments, stage_arguments, started, wait_for

from data.shards.files import index_shard
from launch.compose import Override, compose_stage
from launch.processes import Processes
from nexus_gen.artifacts.artifact import Manifest, seal

pytestmark = pytest.mark.slow

TWO = "launch.processes_per_node=2"


@pytest.mark.parametrize(
    ("config", "status", "last_line"),
    [
        ("stage: pretrain\nname: tiny\nruns_dir: runs\nfoo: 1\n", 2, "error: stage=pretrain has no key 'foo'"),
        ("stage: [", 2, "config.yaml is not the config of a stage"),
        ("[" * 5000, 1, "error: rank "),
        (None, 2, "config.yaml does not exist"),
    ],
    ids=["unknown key", "no YAML", "crash", "no config"],
)
def test_what_stops_every_rank_is_told_once(config: str | None, status: int, last_line: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    torchrun = [sys.executable, "-m", "train.torchrun", "--standalone", "--nproc-per-node=2", "-m", "train.worker"]
    ended = subprocess.run([*torchrun, str(tmp_path / "config.yaml")], capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert last_line in lines[-1]
    if status == 2:
        assert len(lines) == 1, ended.stderr
    else:  # the worker's own traceback, and none of torchrun's
        assert ended.stderr.count("Traceback") == 1 and "RecursionError" in ended.stderr


def test_a_mistake_that_one_rank_meets_ends_all_of_them(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run", "generation_decoder")
    shard = run / "embed_generation" / "artifact" / "train" / "000000.tar"
    offset, _ = index_shard(shard)[0]["safetensors"]
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    artifact = run / "embed_generation" / "artifact"
    seal(artifact, Manifest.load(artifact))  # the launcher would see what only the rank that reads the sample is to see
    ended = nexus_gen(*stage_arguments(run, "generation_decoder", TWO))
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    errors = [line for line in ended.stderr.splitlines() if "rror" in line]
    assert len(errors) == 1 and errors[0].startswith(f"error: shard {shard} is damaged"), ended.stderr


def test_workers_save_and_end_when_their_launcher_is_killed(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run", "generation_decoder")
    endless = ["max_steps=1000000", "log_every_steps=1", "checkpoint_every_steps=0"]
    trainer = [f"generation_decoder.trainer.{value}" for value in endless]
    arguments = run_arguments(run, "pipeline=tiny", *SMALLEST, *trainer)
    with started(arguments, tmp_path / "output") as launcher:
        wait_for(lambda: len(losses(run / "generation_decoder")) > 0, launcher, tmp_path / "output")
        second = nexus_gen(*arguments)
        assert second.returncode == 2 and f"is in use by process {launcher.pid} on" in second.stderr
        processes = launcher.children(recursive=True)
        assert len(processes) >= 4  # torchrun and its worker, and those of the next stage
        launcher.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(processes, timeout=120)
        assert alive == []
    assert len(list((run / "generation_decoder" / "checkpoints").glob("step_*"))) == 1


def test_processes_that_wait_go_when_they_are_not_needed(tmp_path: Path) -> None:
    config = compose_stage([Override.parse(text) for text in ("stage=shapes", f"runs_dir={tmp_path}", TWO)])
    waiting = Processes(config)
    wait_for(lambda: len(waiting.torchrun.children()) == 2, waiting.torchrun, tmp_path)
    waiting.end()
    assert waiting.torchrun.returncode is not None and list(tmp_path.iterdir()) == []
