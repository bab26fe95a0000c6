"""Around the steps of the pretrain stage: agreement on losses, stopping, checkpoints that count."""

import math
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_qwen import write_rows
from torch import distributed
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState

from data.mixture.order import Mixture
from nexus_gen.language.model import NexusGenOutput
from nexus_gen.specs.errors import UserError
from train.pretrain.callbacks import (
    StepCheckpoints,
    StepGuard,
    TaskSums,
    checkpoint_path,
    means,
    remove_incomplete_checkpoints,
)
from train.pretrain.stream import MessageStream, Quarantine
from train.runs.checkpoints import COMPLETE, checkpoint_step, complete_checkpoints
from train.steps.clock import StepClock


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


IMAGE = 9  # the id of image tokens


def outputs(text: float, image: float) -> NexusGenOutput:
    """Of one row of one text token and, unless its loss is 0, a target image of one token."""
    parts = [torch.tensor(value, requires_grad=True) for value in (3 * text + 3 * image, text, image)]
    return NexusGenOutput(
        loss=parts[0],
        text_loss=parts[1],
        image_loss=parts[2],
        text_token_loss=torch.tensor([text]),
        image_token_loss=torch.tensor([image] if image else []),
    )


def inputs(num_tokens: int, with_image: bool = True) -> dict[str, Any]:
    token = IMAGE if with_image else -100
    return {
        "attention_mask": (torch.arange(10) < num_tokens).long()[None],
        "input_ids": torch.full((1, 10), 1),
        "labels": torch.tensor([[-100] * 8 + [token, 1]]),
    }


def test_losses_of_a_task_are_means_over_its_tokens() -> None:
    look, make, text, pad = [5, IMAGE, IMAGE, 1, 2], [5, 3, IMAGE, IMAGE, 6], [5, 1, 2, 3, 4], [-100] * 2
    both = [5, IMAGE, 1, IMAGE, 2]
    input_ids = torch.tensor([look, make, text, both])
    labels = torch.tensor([[*pad, -100, 1, 2], [*pad, IMAGE, IMAGE, 6], [*pad, -100, -100, 4], [*pad, 1, IMAGE, 2]])
    made = NexusGenOutput(
        text_token_loss=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), image_token_loss=torch.tensor([0.1, 0.3, 0.5])
    )
    sums = TaskSums.of(made, input_ids, labels, IMAGE)
    twice = (2 * sums).flatten().tolist()  # another micro-batch or rank like it
    assert TaskSums.means(twice, "train") == pytest.approx(
        {
            "train/text_loss/understanding": 1.5,
            "train/text_loss/generation": 3.0,
            "train/image_loss/generation": 0.2,
            "train/text_loss/editing": 5.5,
            "train/image_loss/editing": 0.5,
            "train/text_loss/text": 4.0,
        }
    )


def test_losses_are_means_over_the_micro_batches_of_a_step() -> None:
    guard = StepGuard(accumulation=2, start_step=0, image_token_id=IMAGE)
    guard.on_loss(outputs(1.0, 0.5), inputs(4))
    assert guard.losses == {}  # the step is not complete
    guard.on_loss(outputs(2.0, 0.0), inputs(7, with_image=False))
    # The loss is what is optimised, (4.5 + 6) / 2; only one of the micro-batches has an image to be wrong about.
    assert guard.losses == {"train/loss": 5.25, "train/text_loss": 1.5, "train/image_loss": 0.5}
    assert guard.num_tokens == 11
    guard.on_loss(outputs(4.0, 1.0), inputs(1))
    guard.on_loss(outputs(4.0, 1.0), inputs(1))
    assert guard.losses["train/text_loss"] == 4.0 and guard.num_tokens == 2  # nothing of the step before
    for _ in range(2):
        guard.on_loss(outputs(1.0, 0.0), inputs(1, with_image=False))
    assert guard.losses == {"train/loss": 3.0, "train/text_loss": 1.0}


def test_a_loss_of_an_interval_is_the_mean_over_the_steps_that_have_it() -> None:
    steps = [
        {"train/loss": 1.0, "train/image_loss": 0.5},
        {"train/loss": 4.0},
        {"train/loss": 1.0, "train/image_loss": 1.0},
    ]
    assert means(steps) == {"train/loss": 2.0, "train/image_loss": 0.75}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_at_the_end_of_its_step(broken: float) -> None:
    guard = StepGuard(accumulation=2, start_step=5, image_token_id=IMAGE)
    guard.on_loss(outputs(1.0, broken), inputs(4))
    with pytest.raises(UserError, match=r"the loss of step 6 is not finite .*optim.learning_rate"):
        guard.on_loss(outputs(1.0, 1.0), inputs(4))


@pytest.mark.usefixtures("sigterm")
def test_a_sigterm_ends_training_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    guard = StepGuard(accumulation=1, start_step=0, image_token_id=IMAGE)
    guard.listen()
    trainer: Any = SimpleNamespace(checkpoint_every_steps=0, keep_checkpoints=1)
    checkpoints = StepCheckpoints(guard, tmp_path, trainer, StepClock())
    state = TrainerState(global_step=3, max_steps=9)
    guard.on_loss(outputs(1.0, 1.0), inputs(4))
    control = TrainerControl()
    checkpoints.on_step_end(None, state, control)
    assert not control.should_save and not control.should_training_stop

    os.kill(os.getpid(), signal.SIGTERM)
    guard.on_loss(outputs(1.0, 1.0), inputs(4))
    checkpoints.on_step_end(None, state, control)
    assert control.should_save and control.should_training_stop


@pytest.mark.parametrize(("step", "saved"), [(4, False), (5, True), (10, True), (12, True)])
def test_checkpoints_are_due_every_few_steps_and_after_the_last(step: int, saved: bool, tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(checkpoint_every_steps=5, keep_checkpoints=1)
    control = TrainerControl()
    state = TrainerState(global_step=step, max_steps=12)
    StepCheckpoints(StepGuard(1, 0, IMAGE), tmp_path, trainer, StepClock()).on_step_end(None, state, control)
    assert control.should_save == saved and control.should_training_stop == (step == 12)


def test_a_budget_of_tokens_ends_training_with_the_step_that_reaches_it(tmp_path: Path) -> None:
    guard = StepGuard(accumulation=2, start_step=0, image_token_id=IMAGE, token_budget=20)
    trainer: Any = SimpleNamespace(checkpoint_every_steps=0, keep_checkpoints=1)
    checkpoints, control = StepCheckpoints(guard, tmp_path, trainer, StepClock()), TrainerControl()
    for step, (tokens, is_last) in enumerate([((9, 2), False), ((8, 1), True)], start=1):
        for num_tokens in tokens:
            guard.on_loss(outputs(1.0, 1.0), inputs(num_tokens))
        checkpoints.on_step_end(None, TrainerState(global_step=step, max_steps=1000), control)
        assert control.should_training_stop == control.should_save == is_last
    assert guard.tokens_seen == 20


def test_a_checkpoint_counts_when_all_ranks_are_done_and_older_ones_go_only_then(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(checkpoint_every_steps=1, keep_checkpoints=2)
    checkpoints = StepCheckpoints(StepGuard(1, 0, IMAGE), tmp_path, trainer, StepClock())
    for step in (8, 9, 10):
        checkpoint_path(tmp_path, step).mkdir()
        assert step not in map(checkpoint_step, complete_checkpoints(tmp_path))
        state = TrainerState(global_step=step, max_steps=10, is_world_process_zero=True)
        checkpoints.on_step_end(None, state, TrainerControl())
        checkpoints.on_save(None, state, TrainerControl())
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [9, 10]  # not in order of names
    assert not checkpoint_path(tmp_path, 8).exists()


def test_half_written_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (5, 10):
        checkpoint_path(tmp_path, step).mkdir()
        (checkpoint_path(tmp_path, step) / "weights").write_bytes(b"0")
    (checkpoint_path(tmp_path, 5) / COMPLETE).touch()
    (tmp_path / "identity.json").write_text("{}")
    remove_incomplete_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "identity.json"]


def test_a_loader_process_outlives_the_sigterm_of_its_process_group(tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    quarantine = Quarantine(tmp_path / "bad", 0, max_bad_fraction=0.0, num_rows=5)
    stream = MessageStream(
        Mixture(path, seed=0),
        lambda row: {"pid": os.getpid()},
        quarantine,
        num_samples=40,
        micro_batch_size=1,
        world_size=1,
    )
    batches = iter(DataLoader(stream, batch_size=1, num_workers=1, prefetch_factor=1))
    loader_process = int(next(batches)["pid"])
    assert loader_process != os.getpid()
    subprocess.run(["kill", "-TERM", str(loader_process)], check=True)  # not from the parent, whom torch lets stop it
    assert len(list(batches)) == 39
