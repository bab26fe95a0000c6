"""Each process of a stage gets a GPU of its own, and more processes than GPUs are refused."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from launch import gpus
from launch.gpus import require_gpus, uses_gpus
from launch.processes import slurm_script, worker_command
from nexus_gen.specs.errors import UserError
from train.schemas.common import LaunchConfig

LOCAL = LaunchConfig("local", 1, 2, "auto", 0, "", 0, "")
SHOWN = "--virtual-local-rank"


def have(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "num_gpus", lambda: number)


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(("processes", "available"), [(1, 2), (2, 2), (3, 4), (1, 1)])
def test_up_to_as_many_processes_as_gpus(
    device: str, processes: int, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(available, monkeypatch)
    launch = dataclasses.replace(LOCAL, device=device, processes_per_node=processes)
    require_gpus([launch])
    assert SHOWN in worker_command(launch, Path("config.yaml"))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    have(2, monkeypatch)
    fitting = dataclasses.replace(LOCAL, processes_per_node=2)
    with pytest.raises(
        UserError, match=r"processes_per_node is 3 and torch sees 2 GPUs .*processes_per_node=2 or less"
    ):
        require_gpus([fitting, dataclasses.replace(LOCAL, processes_per_node=3)])  # of a later stage, too
    have(1, monkeypatch)
    with pytest.raises(UserError, match=r"torch sees 1 GPU on this machine"):
        require_gpus([dataclasses.replace(LOCAL, kind="torchrun")])


def test_a_cpu_needs_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    have(0, monkeypatch)
    require_gpus([dataclasses.replace(LOCAL, processes_per_node=8)])
    assert not uses_gpus(LOCAL)
    with pytest.raises(UserError, match=r"launch.device is cuda and torch sees no GPU"):
        require_gpus([dataclasses.replace(LOCAL, device="cuda")])
    have(1, monkeypatch)
    on_cpu = dataclasses.replace(LOCAL, device="cpu", processes_per_node=8)
    require_gpus([on_cpu])
    assert SHOWN not in worker_command(on_cpu, Path("config.yaml"))


def test_a_job_shows_its_gpus_whatever_the_login_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    have(0, monkeypatch)
    slurm = dataclasses.replace(LOCAL, kind="slurm", processes_per_node=8, timeout_minutes=60)
    require_gpus([slurm])
    assert SHOWN in slurm_script(slurm, Path("/runs/a/pretrain/config.yaml"))
    assert SHOWN not in slurm_script(dataclasses.replace(slurm, device="cpu"), Path("/runs/a/pretrain/config.yaml"))


def test_torch_counts_where_there_is_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "DRIVERS", (str(tmp_path),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus.num_gpus.cache_clear()
    assert gpus.num_gpus() == 0
    gpus.num_gpus.cache_clear()
    monkeypatch.setattr(gpus, "COUNT", "raise SystemExit('no driver')")
    with pytest.raises(UserError, match=r"GPUs \(no driver\); .* launch.device=cpu"):
        gpus.num_gpus()
    gpus.num_gpus.cache_clear()


@pytest.mark.slow
def test_each_process_is_shown_one_gpu_of_those_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun itself, with a script in the worker's place that writes down what it was given."""
    have(2, monkeypatch)
    (tmp_path / "shown.py").write_text(
        "import os, pathlib, sys\n"
        "from train.worker import be_alone_with_device\n"
        "be_alone_with_device()\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'WORLD_SIZE')\n"
        "path = pathlib.Path(sys.argv[1]).with_suffix('.' + os.environ['RANK'])\n"
        "path.write_text(' '.join(map(os.environ.get, names)))\n"
    )
    command = worker_command(LOCAL, tmp_path / "config.yaml")
    module = command.index("train.worker")
    command[module - 1 : module + 1] = [str(tmp_path / "shown.py")]
    subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": "3,GPU-5ee1"}, check=True, timeout=120)
    assert (tmp_path / "config.0").read_text() == "3 0 1 2"
    assert (tmp_path / "config.1").read_text() == "GPU-5ee1 0 1 2"
