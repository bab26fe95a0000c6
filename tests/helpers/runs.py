"""Runs of the console script for the end-to-end tests: real processes, the smallest sizes."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from safetensors.torch import load_file
from torch import Tensor

from train.schemas.fields import keys
from train.steps.metrics import read_metrics

NEXUS_GEN = str(Path(sys.executable).parent / "nexus-gen")
STAGES = (
    "shapes",
    "standins",
    "pretrain",
    "embed_generation",
    "generation_decoder",
    "embed_editing",
    "editing_decoder",
)
TRAINED = ("pretrain", "generation_decoder", "editing_decoder")
STEPS = 6
# An optimizer step is four micro batches of two rows: one process accumulates all, each of two processes two of them.
# Two steps are logged as one, so a checkpoint after an odd number of steps falls between.
SMALLEST = (
    "shapes.num_train=48",
    "shapes.num_heldout=12",
    "shapes.num_compositional=12",
    "standins.vae_steps=20",
    "standins.num_images=24",
    f"trainer.max_steps={STEPS}",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=8",
    "trainer.log_every_steps=2",
    "optim.warmup_steps=2",
    "embed.samples_per_shard=4",
    "embed.batch_size=2",
    "embed.num_workers=0",
    "embed.null_context=true",
    "sampling.num_inference_steps=2",
    "average.decay=0.9",
    "average.export=average",
    "objective.condition_dropout=0.3",
    "heldout.every_steps=4",
    "heldout.num_samples=3",
    "samples.num_pictures=2",
    "launch.device=cpu",
    "launch.processes_per_node=1",
    "launch.threads_per_process=1",
)


def nexus_gen(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command to its end; its output is in `stdout` and `stderr`."""
    return subprocess.run([NEXUS_GEN, *map(str, arguments)], capture_output=True, text=True)


def run_arguments(run: Path, *overrides: str) -> list[str]:
    return ["run", f"runs_dir={run.parent}", f"name={run.name}", *overrides]


def stage_arguments(run: Path, stage: str, *overrides: str) -> list[str]:
    """One stage of the smallest size, as `pipeline=tiny` runs it."""
    own = [override for override in SMALLEST if override.split("=")[0] in keys(stage)]
    if stage == "editing_decoder":
        own.append(f"init.transformer={run / 'generation_decoder' / 'artifact'}")
    return run_arguments(run, f"stage={stage}", *own, *overrides)


def succeed(*arguments: str | Path) -> str:
    """All that a command printed, which has to end well."""
    ended = nexus_gen(*arguments)
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"
    return ended.stdout + ended.stderr


def copy_run(run: Path, to: Path, *without: str) -> Path:
    """A copy of a run's artifacts and records, without some of its stages."""
    left_out = {run / stage for stage in without}

    def ignore(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if name == "checkpoints" or Path(directory, name) in left_out]

    shutil.copytree(run, to, ignore=ignore)
    return to


def losses(stage: Path) -> dict[tuple[int, str], float]:
    """What a stage logged about its training, by step and name."""
    return {
        (int(row["step"]), name): value
        for row in read_metrics(stage)
        for name, value in row.items()
        if name.startswith(("train/", "heldout/"))
    }


def weights(stage: Path) -> dict[str, Tensor]:
    """The tensors of a stage's artifact."""
    files = sorted((stage / "artifact").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def wait_for(event: Callable[[], bool], command: psutil.Popen, output: Path) -> None:
    """Wait until something has happened, while a command that writes to `output` runs."""
    while not event():
        assert command.poll() is None, f"it ended too early:\n{output.read_text()[-6000:]}"
        time.sleep(0.005)


@contextmanager
def started(arguments: list[str], output: Path) -> Iterator[psutil.Popen]:
    """A command that writes to `output`; a test that fails leaves none of its processes behind."""
    with open(output, "w", encoding="utf-8") as file:
        command = psutil.Popen(
            [NEXUS_GEN, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            # Tests that run under nohup would hand on that SIGHUP is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        try:
            yield command
        finally:
            with suppress(psutil.NoSuchProcess):
                for process in [command, *command.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            command.wait()


def interrupt(arguments: list[str], when: Callable[[], bool], number: signal.Signals, output: Path) -> int:
    """Start a command, signal it as soon as `when` holds, and wait; returns its exit status.

    SIGKILL hits the command and all its processes at once, as a power cut would; other signals hit the command alone.
    """
    with started(arguments, output) as command:
        wait_for(when, command, output)
        if number == signal.SIGKILL:
            processes = [command, *command.children(recursive=True)]
            for process in processes:
                process.kill()
            psutil.wait_procs(processes)
        else:
            command.send_signal(number)
        return command.wait()
