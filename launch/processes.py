"""Command lines that start the processes of one stage: on this machine, on several, through Slurm."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Self

import psutil

from launch.gpus import uses_gpus
from launch.lock import SUFFIX, Lock
from launch.python_path import python_variables
from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.specs.errors import UserError
from train.preflight.stage import read_ahead
from train.runs.directory import code_version
from train.runs.failures import STOPPED, first_failure
from train.schemas.common import LaunchConfig
from train.schemas.stage import StageConfig

SHUTDOWN_TIMEOUT_S = 900  # a scheduler's SIGTERM goes through torchrun; a full-size checkpoint takes minutes


def worker_command(
    launch: LaunchConfig, config_path: Path, rendezvous: str | None = None, ahead: bool = False
) -> list[str]:
    """torchrun with the worker module; the same for one process and for many, so that one code path is tested.

    rendezvous: host:port where several nodes meet, if not launch.rendezvous. ahead: for `Processes`.
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
        "train.torchrun",
        *meeting,
        f"--nproc-per-node={launch.processes_per_node}",
        *(["--virtual-local-rank"] if uses_gpus(launch) else []),  # shows each process its own GPU, and no other
        "-m",
        "train.worker",
        *(["--ahead", launch.device] if ahead else []),
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
        **python_variables(),
    }


def slurm_script(launch: LaunchConfig, config_path: Path) -> str:
    """A batch script that starts one torchrun per node; the first node of the job is the meeting point."""
    hours, minutes = divmod(launch.timeout_minutes, 60)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in worker_environment(launch).items()]
    meeting = "$head:29500"
    command = [
        word.replace(meeting, '"$head":29500') if word.endswith(f"={meeting}") else shlex.quote(word)
        for word in worker_command(launch, config_path, rendezvous=meeting)
    ]
    lock = shlex.quote(f"{config_path.parent}/log/slurm{SUFFIX}")
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name=nexus-gen-{config_path.parent.name}",
            f"#SBATCH --nodes={launch.num_nodes}",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --gpus-per-node={launch.processes_per_node}",
            f"#SBATCH --time={hours:02d}:{minutes:02d}:00",
            f"#SBATCH --output={for_sbatch(log_directory(config_path))}/slurm-%j.log",
            *([f"#SBATCH --partition={for_sbatch(launch.partition)}"] if launch.partition else []),
            "set -euo pipefail",
            # The submitting command holds a lock of its own, which the job may outlive.
            f"exec 9<>{lock}",
            'flock --nonblock 9 || { echo "error: another job works in this directory" >&2; exit 1; }',
            f": >{lock}",
            """printf '{"host": "Slurm job %s", "pids": []}' "$SLURM_JOB_ID" >&9""",
            *exports,
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            f"srun {' '.join(command)}",
            "",
        ]
    )


def log_directory(config_path: Path) -> str:
    """A stage's log/ in Slurm's patterns of file names. UserError where these cannot name it."""
    directory = str(config_path.parent / "log")
    for character, what in (("\\", "backslash"), ("\n", "line break")):
        if character in directory:
            raise UserError(
                f"Slurm cannot write logs into {directory!r}, with its {what}; give another name or runs_dir"
            )
    return directory.replace("%", "%%")


def for_sbatch(text: str) -> str:
    """A value as sbatch reads it in a script: it knows quotes and backslashes, and # is a comment inside quotes too."""
    if shlex.quote(text) == text:
        return text
    return '"' + "".join(f"\\{character}" if character in "\"'#\\" else character for character in text) + '"'


class Processes:
    """torchrun and the workers of a stage on this machine, which import what it needs and wait for `run`.

    Until then they touch neither the stage's directory nor a GPU. They end with this process.
    """

    def __init__(self, config: StageConfig) -> None:
        self._num_workers = config.launch.processes_per_node
        self._code = code_version()
        self._word, theirs = socket.socketpair()
        # A group of its own: the terminal's Ctrl-C would otherwise reach torchrun and every worker at the same time.
        self.torchrun = psutil.Popen(
            worker_command(config.launch, config.run_dir / "config.yaml", ahead=True),
            env={**os.environ, **worker_environment(config.launch)},
            stdin=theirs.fileno(),
            start_new_session=True,
        )
        theirs.close()

    def are_ready(self) -> bool:
        """Whether they are there still, with the code of now."""
        return self.torchrun.poll() is None and self._code == code_version()

    def run(self, lock: Lock, meanwhile: Callable[[], None]) -> int:
        """Have them run the stage and wait for it; returns their exit status, STOPPED after a signal.

        An interrupt, a SIGTERM or a hang-up of the terminal reaches the workers as SIGTERM: they write a checkpoint and
        end. They have the lock open too: it stays taken until they are gone, also when this process is killed.
        """

        def forward(number: int, _frame: object) -> None:
            # The workers, not torchrun: that would kill them 30 s later, before a large checkpoint is written.
            for receiver in self.torchrun.children() or [self.torchrun]:
                receiver.terminate()

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup means it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, forward) for number in numbers}
        lock.name_holders(os.getpid(), self.torchrun.pid)
        try:
            with contextlib.suppress(BrokenPipeError):  # they have ended; torchrun says why
                for _ in range(self._num_workers):
                    socket.send_fds(self._word, [b"."], [lock.file])
            meanwhile()
            status = self.torchrun.wait()
            return STOPPED if status == -signal.SIGTERM else status
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """Let those go that wait; what still imports is ended, for nobody should wait for it."""
        self._word.close()
        try:
            self.torchrun.wait(timeout=2)
        except psutil.TimeoutExpired:
            self.torchrun.terminate()
            self.torchrun.wait()


class Crew:
    """The processes of stages that run one after the other: while one runs, those of the next import what it needs.

    That takes them many seconds. Only on this machine alone: several would meet at the address where they still are.
    This process reads the next stage's rows meanwhile.
    """

    def __init__(self, configs: Sequence[StageConfig]) -> None:
        self._following = {config.stage: following for config, following in pairwise(configs)}
        self._ahead: dict[str, Processes] = {}  # by stage, the next one's

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for processes in self._ahead.values():
            processes.end()

    def run(self, config: StageConfig, lock: Lock) -> int:
        """Run the processes of a stage, whose config is recorded, and wait; their status, as of `Processes.run`."""
        if config.launch.kind == "slurm":
            return submit(config.launch, config.run_dir / "config.yaml")
        processes = self._ahead.pop(config.stage, None)
        if processes is not None and not processes.are_ready():
            processes.end()
            processes = None
        processes = processes or Processes(config)
        following = self._following.get(config.stage)
        if following is not None and following.launch.kind == "local":
            self._ahead[following.stage] = Processes(following)
        return processes.run(lock, lambda: read_ahead(following) if following is not None else None)


def submit(launch: LaunchConfig, config_path: Path) -> int:
    """Submit a stage to Slurm and wait for the job; tells why it failed, which its processes wrote into its log."""
    script = config_path.parent / "job.sh"
    write_text_atomic(script, slurm_script(launch, config_path))
    try:
        status = subprocess.run(["sbatch", "--wait", str(script)], check=False).returncode
    except FileNotFoundError as error:
        raise UserError(
            "launch=slurm needs sbatch on this machine; submit from a login node, or use launch=local"
        ) from error
    failure = first_failure(config_path.parent / "log") if status else None
    if failure is None:
        return min(status, 1)
    print(failure, file=sys.stderr)
    return failure.status
