"""One process or two, ZeRO-2 or ZeRO-3, interrupted or not: a stage comes out the same.

Float32 on gloo. One process accumulates the same global batches; it is the shared tiny run.
"""

import json
import math
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from runs import STEPS, TRAINED, copy_run, interrupt, losses, stage_arguments, succeed, weights
from safetensors.torch import load_file
from webdataset import TarWriter

from data.messages.token_lengths import TokenLengths
from data.mixture.order import Mixture
from data.mixture.quarantine import named, read_left_out
from data.records.reading import open_records
from data.shards.files import CONSTANTS
from nexus_gen.artifacts.artifact import Manifest, seal, verify
from nexus_gen.flux.text_encoders import encode_context, encode_pooled
from nexus_gen.pictures.images import open_image
from train.runs.directory import load_config
from train.schemas.decoders import DecoderConfig

pytestmark = pytest.mark.slow

TOKENS = "train/tokens_seen"
TWO = "launch.processes_per_node=2"
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture(scope="module", params=TRAINED)
def two_processes(request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stage that two processes trained under ZeRO-2 without interruption."""
    return train(tiny_run, tmp_path_factory.mktemp("zero2") / "run", request.param)


def train(tiny_run: Path, to: Path, stage: str, *overrides: str) -> Path:
    """Train one stage of a copy of the tiny run on two processes; returns the stage's directory.

    A decoder finds no text encoders: the constants beside its shards are all that it has of the empty prompt.
    """
    copy_run(tiny_run, to, stage)
    if stage != "pretrain":
        for name in TEXT_PARTS:
            shutil.rmtree(to / "standins" / "artifact" / "FLUX.1-dev" / name)
        seal(to / "standins" / "artifact", Manifest.load(to / "standins" / "artifact"))  # a whole one, without them
    assert f"{stage}: 2 process(es)" in succeed(*stage_arguments(to, stage, TWO, *overrides))
    return to / stage


def assert_same_training(one: Path, other: Path) -> None:
    """Equal up to the order in which gradients are added.

    Measured at worst: 8e-8 of a loss, 3e-6 of a weight, where a step of the optimizer moves a weight by up to 1e-3.
    """
    assert {step for step, _ in losses(one)} == set(range(2, STEPS + 1, 2))
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    differences = {name: float((found[name].float() - wanted[name].float()).abs().max()) for name in found}
    assert {name: difference for name, difference in differences.items() if difference > 5e-5} == {}


def test_one_process_and_two_train_alike(tiny_run: Path, two_processes: Path) -> None:
    assert_same_training(two_processes, tiny_run / two_processes.name)


@pytest.mark.parametrize("two_processes", ["generation_decoder", "editing_decoder"], indirect=True)
def test_a_decoder_trains_without_text_encoders(tiny_run: Path, two_processes: Path) -> None:
    flux = two_processes.parent / "standins" / "artifact" / "FLUX.1-dev"
    assert not any((flux / name).exists() for name in TEXT_PARTS)
    config = load_config(two_processes)
    assert isinstance(config, DecoderConfig)
    assert config.objective.condition_dropout > 0  # takes T5's constant, all samples take CLIP's
    constants = load_file(Path(config.shards) / CONSTANTS)
    with_encoders = tiny_run / "standins" / "artifact" / "FLUX.1-dev"
    assert torch.equal(constants["pooled"], encode_pooled(with_encoders, "", torch.float32))
    assert torch.equal(constants["null_context"], encode_context(with_encoders, "", torch.float32))
    assert len(list((two_processes / "samples").glob("*.png"))) > 0


def test_zero_2_and_zero_3_train_alike(tiny_run: Path, two_processes: Path, tmp_path: Path) -> None:
    zero_3 = train(tiny_run, tmp_path / "run", two_processes.name, "trainer.zero_stage=3")
    assert_same_training(zero_3, two_processes)


def test_a_killed_stage_goes_on_as_if_nothing_had_happened(tiny_run: Path, two_processes: Path, tmp_path: Path) -> None:
    stage = two_processes.name
    run = copy_run(tiny_run, tmp_path / "run", stage)
    arguments = stage_arguments(run, stage, TWO, f"trainer.checkpoint_every_steps={STEPS // 2}")

    def checkpointed() -> bool:
        return bool(checkpoints(run / stage))

    interrupt(arguments, checkpointed, signal.SIGKILL, tmp_path / "output")
    assert not (run / stage / "artifact").exists()
    went_on = succeed(*arguments)
    assert f"step {STEPS // 2} of {STEPS}" in went_on
    assert losses(run / stage) == losses(two_processes)
    resumed, uninterrupted = weights(run / stage), weights(two_processes)
    assert resumed.keys() == uninterrupted.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], uninterrupted[name])] == []


def tokens_by_step(tiny_run: Path, train: Path, *quarantine: Path) -> list[int]:
    """That the first rows in training order have up to each step, from step 0 on, by arithmetic."""
    config = yaml.safe_load((tiny_run / "pretrain" / "config.yaml").read_text(encoding="utf-8"))
    mixture = Mixture(train, config["seed"], read_left_out(quarantine, [train]))
    rows = [mixture.row(mixture.draw(position)) for position in range(8 * STEPS)]
    lengths = TokenLengths(tiny_run / "standins" / "artifact" / "Qwen2.5-VL-Instruct", config["data"]["max_pixels"])
    measured = lengths.measure(rows, [[open_image(image).size for image in row.images] for row in rows])
    return [sum(length.total for length in measured[: 8 * step]) for step in range(STEPS + 1)]


def write_tar(rows: Path, path: Path) -> Path:
    """The rows of JSON lines in a webdataset tar, their pictures inside."""
    with TarWriter(str(path)) as tar:
        for number, line in enumerate(rows.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            pictures = {f"{n}.png": (rows.parent / image).read_bytes() for n, image in enumerate(row.pop("images"))}
            tar.write({"__key__": f"{number:06d}", "json": row, **pictures})
    return path


def quarantine_of(dataset: Path, path: Path, numbers: Iterable[int]) -> Path:
    """A quarantine file that names these rows of a dataset file."""
    records = open_records(dataset)
    lines = [json.dumps({**named(records[number]), "reason": "it is not liked"}) + "\n" for number in numbers]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_budget_counts_the_tokens_trained_on(tiny_run: Path, tmp_path: Path) -> None:
    """Over a kill, on one process (the shared run) and two; the learning rate follows them.

    Two processes read a tar of the rows and leave some of them out, which only the same on both gives these counts.
    """
    train = tiny_run / "shapes" / "artifact" / "train.jsonl"
    seen = tokens_by_step(tiny_run, train)
    found = {step: value for (step, name), value in losses(tiny_run / "pretrain").items() if name == TOKENS}
    assert found == {step: seen[step] for step in (2, 4, 6)}
    assert Manifest.load(tiny_run / "pretrain" / "artifact").details["tokens"] == seen[STEPS]

    train = write_tar(train, tmp_path / "train.tar")
    quarantine = quarantine_of(train, tmp_path / "quarantine.jsonl", range(0, 48, 6))
    all_seen, seen = seen, tokens_by_step(tiny_run, train, quarantine)
    assert all(seen[step] != all_seen[step] for step in range(1, STEPS + 1))
    run = copy_run(tiny_run, tmp_path / "run", "pretrain")
    budget = seen[3] + 1
    own = ["trainer.max_steps=0", f"data.token_budget={budget}", "trainer.checkpoint_every_steps=2"]
    own += [f"data.train={train}", f"data.quarantine=[{quarantine}]"]
    arguments = stage_arguments(run, "pretrain", TWO, *own)
    interrupt(arguments, lambda: bool(checkpoints(run / "pretrain")), signal.SIGKILL, tmp_path / "output")
    assert "train: 48 rows = 40 used + 8 quarantined" in succeed(*arguments)
    details = Manifest.load(run / "pretrain" / "artifact").details
    assert (details["steps"], details["tokens"]) == (4, seen[4])
    assert details["rows"]["train"] == {"rows": 48, "used": 40, "quarantined": 8}
    logged = losses(run / "pretrain")
    assert {step: value for (step, name), value in logged.items() if name == TOKENS} == {2: seen[2], 4: seen[4]}
    assert logged[4, "train/lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * seen[3] / budget)))
    shutil.rmtree(run / "pretrain" / "artifact")
    assert f"trained on {seen[4]} tokens of 32 rows in 4 steps" in succeed(*arguments)
    assert losses(run / "pretrain") == logged


def checkpoints(stage: Path) -> list[Path]:
    """Checkpoints that were written to the end: renamed by the decoder stages, marked by pretraining."""
    found = [path for path in (stage / "checkpoints").glob("step_*") if path.suffix != ".partial"]
    return found + [mark.parent for mark in (stage / "checkpoints").glob("checkpoint-*/complete")]


@pytest.mark.parametrize("stage", TRAINED[:2])
def test_a_stage_killed_after_its_last_step_only_writes_its_artifact(
    stage: str, tiny_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / stage / "artifact")
    assert f"step {STEPS} of {STEPS}" in succeed(*stage_arguments(run, stage))
    assert losses(run / stage) == losses(tiny_run / stage)
    assert verify(run / stage / "artifact").fingerprint == verify(tiny_run / stage / "artifact").fingerprint


@pytest.mark.parametrize(("stage", "number"), [("pretrain", signal.SIGHUP), ("generation_decoder", signal.SIGINT)])
def test_a_signalled_stage_saves_and_stops(stage: str, number: signal.Signals, tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run", stage)
    endless = ["trainer.max_steps=1000000", "trainer.log_every_steps=1", "trainer.checkpoint_every_steps=0"]
    output = tmp_path / "output"
    status = interrupt(stage_arguments(run, stage, TWO, *endless), lambda: len(losses(run / stage)) > 0, number, output)
    assert status == 3, output.read_text()[-6000:]
    assert "Traceback" not in output.read_text()
    assert len(checkpoints(run / stage)) == 1
    last_step = max(step for step, _ in losses(run / stage))
    assert checkpoints(run / stage)[0].name.endswith(f"{last_step}")
    assert not (run / stage / "artifact").exists()


def test_one_process_and_two_write_the_same_shards(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run", "embed_generation")
    succeed(*stage_arguments(run, "embed_generation", TWO))
    assert (
        verify(run / "embed_generation" / "artifact").files == verify(tiny_run / "embed_generation" / "artifact").files
    )


def test_a_killed_embedding_stage_keeps_its_finished_shards(tiny_run: Path, tmp_path: Path) -> None:
    stage = "embed_editing"
    run = copy_run(tiny_run, tmp_path / "run", stage)
    train_shards = run / stage / "artifact.partial" / "train"
    arguments = stage_arguments(run, stage)
    interrupt(arguments, lambda: any(train_shards.glob("0*.json")), signal.SIGKILL, tmp_path / "output")
    kept = {path: path.stat().st_mtime_ns for path in train_shards.glob("0*.json")}
    assert not (run / stage / "artifact").exists()
    assert ", 0 kept" not in (went_on := succeed(*arguments)) and " kept, 0 removed" in went_on
    for path, written in kept.items():
        assert (run / stage / "artifact" / "train" / path.name).stat().st_mtime_ns == written
    assert verify(run / stage / "artifact").files == verify(tiny_run / stage / "artifact").files
