"""Command lines that start the processes of one stage: on this machine, on several, through Slurm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from nexus_gen.specs.artifact import write_text_atomic
from nexus_gen.specs.errors import UserError
from train.schemas.common import LaunchConfig

SHUTDOWN_TIMEOUT_S = 900  # a scheduler's SIGTERM goes through torchrun; a full-size checkpoint takes minutes


def worker_command(launch: LaunchConfig, config_path: Path, rendezvous: str | None = None) -> list[str]:
    """torchrun with the worker module; the same for one process and for many, so that one code path is tested.

    rendezvous: host:port where several nodes meet, if not launch.rendezvous.
    """
    meeting = (
        ["--standalone"]
        if launch.num_nodes == 1
        else [
            f"--nnodes={launch.num_nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={rendezvous or launch.rendezvous}",
        ]
    )
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meeting,
        f"--nproc-per-node={launch.processes_per_node}",
        "-m",
        "train.worker",
        str(config_path),
    ]


def worker_environment(launch: LaunchConfig) -> dict[str, str]:
    """The environment of a worker.

    Threads are shared out, because torchrun otherwise gives each process one; waiting threads sleep, because spinning
    ones slow a machine that does anything else down tenfold.
    """
    threads = launch.threads_per_process or max(1, (os.cpu_count() or 1) // launch.processes_per_node)
    return {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S),
    }


def slurm_script(launch: LaunchConfig, config_path: Path) -> str:
    """A batch script that starts one torchrun per node; the first node of the job is the meeting point."""
    hours, minutes = divmod(launch.timeout_minutes, 60)
    exports = [f"export {name}={value}" for name, value in worker_environment(launch).items()]
    command = worker_command(launch, config_path, rendezvous='"$head":29500')
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name=nexus-gen-{config_path.parent.name}",
            f"#SBATCH --nodes={launch.num_nodes}",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --gpus-per-node={launch.processes_per_node}",
            f"#SBATCH --time={hours:02d}:{minutes:02d}:00",
            f"#SBATCH --output={config_path.parent}/log/slurm-%j.log",
            *([f"#SBATCH --partition={launch.partition}"] if launch.partition else []),
            "set -euo pipefail",
            *exports,
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"srun {' '.join(command)}",
            "",
        ]
    )


def start(launch: LaunchConfig, config_path: Path) -> int:
    """Run the processes of a stage and wait for them; returns their exit status.

    An interrupt or SIGTERM of this process reaches the workers as SIGTERM: they write a checkpoint and end.
    """
    if launch.kind == "slurm":
        script = config_path.parent / "job.sh"
        write_text_atomic(script, slurm_script(launch, config_path))
        try:
            return subprocess.run(["sbatch", "--wait", str(script)], check=False).returncode
        except FileNotFoundError as error:
            raise UserError(
                "launch=slurm needs sbatch on this machine; submit from a login node, or use launch=local"
            ) from error
    # A group of its own: the terminal's Ctrl-C would otherwise reach torchrun and every worker at the same time.
    process = subprocess.Popen(
        worker_command(launch, config_path), env={**os.environ, **worker_environment(launch)}, start_new_session=True
    )

    def forward(number: int, _frame: object) -> None:
        # The workers, not torchrun: that would kill them 30 s later, before a large checkpoint is written.
        for worker in psutil.Process(process.pid).children():
            worker.terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
