"""A finished training stage whose steps are raised trains on from its weights, on the next rows, under the new plan."""

import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import STEPS, TRAINED, copy_run, losses, stage_arguments, succeed
from safetensors.torch import load_file
from torch import Tensor

from data.shards.loader import ShardLoader
from launch import cli, processes
from nexus_gen.artifacts.artifact import verify
from nexus_gen.decoders.checkpoint import load_decoder
from nexus_gen.language.checkpoint import load_autoregressive
from train.decoders.stage import meta_decoder
from train.runs.directory import load_config
from train.schemas.decoders import DecoderConfig
from train.schemas.pretrain import PretrainConfig

pytestmark = pytest.mark.slow

TELLING_WORKER = Path(__file__).parent / "helpers" / "telling_worker.py"
LONGER = STEPS + 2
WARMUP = 2  # steps, as of runs.SMALLEST


def learning_rate(stage: str, peak: float, step: int, steps: int) -> float:
    """That the step-th step is taken with, counted from 1, under a cosine over `steps`.

    Decoders reach the peak with the last step of the warmup, transformers' schedule with the one after it.
    """
    done = step - 1
    if done < WARMUP:
        return peak * (done + (stage != "pretrain")) / WARMUP
    return peak * math.cos(math.pi / 2 * (done - WARMUP) / (steps - WARMUP)) ** 2


def artifact_tensors(stage_dir: Path) -> dict[str, Tensor]:
    """The weights of an artifact by their names in memory."""
    config: Any = load_config(stage_dir)
    if isinstance(config, PretrainConfig):
        model = load_autoregressive(stage_dir / "artifact", dtype=torch.float32)
        return dict(model.named_parameters())
    assert isinstance(config, DecoderConfig)
    details = verify(stage_dir / "artifact").details
    decoder = meta_decoder(config, details["embed_dim"]).to_empty(device="cpu")
    (file,) = (stage_dir / "artifact").glob("*.safetensors")
    load_decoder(decoder, file)
    return dict(decoder.named_parameters())


def train_on(arguments: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a stage with a worker that tells; what it told."""
    directory.mkdir()
    worker_command = processes.worker_command

    def telling(launch: Any, config_path: Path, **_: Any) -> list[str]:
        *command, _, _, config = worker_command(launch, config_path)
        return [*command, str(TELLING_WORKER), str(directory), config]

    monkeypatch.setattr(processes, "worker_command", telling)
    # Every step is logged: that the first of them has the rate of the new plan is the point.
    assert cli.main([*arguments, "trainer.log_every_steps=1"]) == 0
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    tensors = {path.stem: load_file(path) for path in directory.glob("*.safetensors")}
    return {"samples": [sample for batch in samples for sample in batch], **tensors}


def assert_trained_on(stage_dir: Path, before: dict[tuple[int, str], float], samples: list[int]) -> None:
    """Metrics go on behind those of the first part, under the longer plan; the samples are those that come next."""
    config: Any = load_config(stage_dir)
    logged = losses(stage_dir)
    assert {key: logged[key] for key in before} == before
    steps = [step for step, name in logged if name == "train/lr"]
    assert steps == sorted(steps) == [2, 4, 6, 7, 8]
    peak = config.optim.learning_rate
    for step in steps:
        planned = learning_rate(stage_dir.name, peak, step, STEPS if step <= STEPS else LONGER)
        assert logged[step, "train/lr"] == pytest.approx(planned, rel=1e-9), step
    measured = {step for step, name in logged if name.startswith("heldout/")}
    assert measured == {4, STEPS, LONGER}  # at both ends, and every four
    details = verify(stage_dir / "artifact").details
    assert details["steps"] == LONGER
    assert details["continued"] == [{"step": STEPS, "was": {"trainer.max_steps": STEPS}}]
    assert samples == next_samples(config)


def next_samples(config: PretrainConfig | DecoderConfig) -> list[int]:
    """The samples of the steps behind the first part, as training without an interruption meets them."""
    size = config.trainer.global_batch_size
    if isinstance(config, PretrainConfig):
        return list(range(STEPS * size, LONGER * size))  # places in an order that test_mixture.py knows
    loader = ShardLoader(
        config.shards,
        "train",
        micro_batch_size=size,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=config.seed,
        num_workers=0,
    )
    return [index for batch in islice(loader, STEPS, LONGER) for index in batch["index"].tolist()]


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found
    assert [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])] == []


@pytest.mark.parametrize("stage", TRAINED)
def test_a_finished_stage_trains_on_from_its_average(
    stage: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy_run(tiny_run, tmp_path / "run")
    shutil.copytree(tiny_run / stage / "checkpoints", run / stage / "checkpoints", dirs_exist_ok=True)
    before, finished = losses(run / stage), artifact_tensors(run / stage)
    arguments = stage_arguments(run, stage, f"trainer.max_steps={LONGER}")
    told = train_on(arguments, tmp_path / "told", monkeypatch)
    out, err = capfd.readouterr()
    assert f"{stage}: continues from step {STEPS} of {STEPS} to {LONGER}; learning rate re-planned" in out
    assert "Traceback" not in err
    assert_equal(told["average"], finished)
    assert_trained_on(run / stage, before, told["samples"])


@pytest.mark.parametrize("stage", ["pretrain", "generation_decoder"])
def test_a_finished_stage_trains_on_from_its_weights(
    stage: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_run(tiny_run, tmp_path / "run", stage)
    raw = ("average.decay=0", "average.export=raw")
    succeed(*stage_arguments(run, stage, *raw))
    before, finished = losses(run / stage), artifact_tensors(run / stage)
    told = train_on(stage_arguments(run, stage, *raw, f"trainer.max_steps={LONGER}"), tmp_path / "told", monkeypatch)
    assert_equal(told["weights"], finished)
    assert_trained_on(run / stage, before, told["samples"])
    after = artifact_tensors(run / stage)
    assert [name for name in told["weights"] if not torch.equal(after[name], finished[name])]
