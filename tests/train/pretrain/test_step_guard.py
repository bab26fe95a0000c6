"""What ranks of pretraining agree on in a step, of losses that are written down, and what is shown of an interval."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import TrainerControl, TrainerState

from nexus_gen.language.model import NexusGenOutput
from nexus_gen.specs.errors import UserError
from train.pretrain import callbacks
from train.pretrain.callbacks import StepGuard, StepMetrics
from train.steps.clock import StepClock

IMAGE, IGNORE = 9, -100


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def micro_batch(loss: float, text: list[float], image: list[float], padding: int = 0) -> tuple[Any, dict[str, Any]]:
    """One row: a prompt of one token, a reply of `text`, and a target image of `image`, on which the step learns."""
    ids = [1, *[3] * len(text), *[IMAGE] * len(image)]
    labels = [IGNORE, *ids[1:]]
    inputs = {
        "input_ids": torch.tensor([ids + [0] * padding]),
        "labels": torch.tensor([labels + [IGNORE] * padding]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * padding]),
    }
    outputs = NexusGenOutput(
        loss=torch.tensor(loss),
        text_loss=torch.tensor(sum(text) / len(text)),
        image_loss=torch.tensor(sum(image) / len(image) if image else 0.0),
        text_token_loss=torch.tensor(text),
        image_token_loss=torch.tensor(image),
    )
    return outputs, inputs


def test_a_step_is_the_mean_of_its_micro_batches_and_its_images_of_those_that_have_any() -> None:
    guard = StepGuard(accumulation=2, start_step=3, image_token_id=IMAGE)
    assert guard.num_tokens == guard.tokens_seen == guard.token_budget == 0 and guard.losses == {}
    guard.on_loss(*micro_batch(1.0, [2.0, 4.0], [0.5, 0.25]))
    assert guard.losses == {} and guard.num_tokens == 0  # the step is not done
    guard.on_loss(*micro_batch(3.0, [6.0], [], padding=4))
    assert guard.losses == {
        "train/loss": 2.0,
        "train/text_loss": pytest.approx((3.0 + 6.0) / 2),
        "train/image_loss": pytest.approx(0.375),
    }
    assert guard.num_tokens == guard.tokens_seen == (1 + 2 + 2) + (1 + 1)
    # Of each task: text loss, its tokens, image loss, its tokens; the first row makes a picture, the second is text.
    assert guard.task_sums == pytest.approx([*[0.0] * 4, 6.0, 2, 0.75, 2, *[0.0] * 4, 6.0, 1, 0.0, 0])
    assert not guard.stopping
    guard.on_loss(*micro_batch(5.0, [1.0], []))
    guard.on_loss(*micro_batch(9.0, [3.0], []))
    assert guard.losses == {"train/loss": 7.0, "train/text_loss": 2.0}  # nothing of the step before
    assert (guard.num_tokens, guard.tokens_seen) == (4, 11)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_step_that_it_belongs_to(loss: float) -> None:
    guard = StepGuard(accumulation=2, start_step=3, image_token_id=IMAGE)
    guard.on_loss(*micro_batch(1.0, [1.0], []))
    with pytest.raises(
        UserError, match=r"the loss of step 4 is not finite \(train/loss (nan|inf), train/text_loss 1\.5\)"
    ):
        guard.on_loss(*micro_batch(loss, [2.0], []))


def test_a_signal_stops_after_the_step_under_way() -> None:
    guard = StepGuard(1, 0, IMAGE)
    guard.on_loss(*micro_batch(1.0, [1.0], []))
    assert not guard.stopping
    guard._receive(15, None)
    guard.on_loss(*micro_batch(1.0, [1.0], []))
    assert guard.stopping


def test_a_budget_of_tokens_is_spent_from_nothing_to_all() -> None:
    guard = StepGuard(1, 0, IMAGE, token_budget=8)
    spent = []
    for _ in range(3):
        spent.append(guard.spent)
        guard.on_loss(*micro_batch(1.0, [1.0, 1.0], []))  # three tokens
    assert [*spent, guard.spent] == [0.0, 3 / 8, 6 / 8, 1.0]
    without = StepGuard(1, 0, IMAGE)
    without.on_loss(*micro_batch(1.0, [1.0], []))
    assert without.spent == 0.0
    assert not without.is_last(TrainerState(global_step=4, max_steps=5))
    assert without.is_last(TrainerState(global_step=5, max_steps=5))
    assert guard.is_last(TrainerState(global_step=4, max_steps=5))


class Bar:
    """What the progress bar was given."""

    def __init__(self, **given: Any) -> None:
        self.given, self.done, self.shown, self.closed = given, 0, "", False
        self.disable = False

    def update(self, count: int) -> None:
        self.done += count

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.shown = text

    def close(self) -> None:
        self.closed = True


class Metrics:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, values: dict[str, float]) -> None:
        self.rows[step] = values


def shown(guard: StepGuard, state: TrainerState, attributes: dict[str, Any] | None = None) -> tuple[Any, Metrics]:
    """StepMetrics at the beginning of training, whose clock stands still at each call of one second more."""
    seconds = iter(range(1000))
    config: Any = SimpleNamespace(log_every_steps=2, global_batch_size=4, checkpoint_every_steps=0)
    metrics: Any = Metrics()
    made = StepMetrics(guard, metrics, config, lambda: 0.125, StepClock(lambda: float(next(seconds))))
    kept = made.state()
    if attributes:
        kept["attributes"] |= attributes
    state.stateful_callbacks = {"StepMetrics": kept}
    made.on_train_begin(None, state, TrainerControl())
    return made, metrics


def step(made: StepMetrics, guard: StepGuard, state: TrainerState, *batch: Any) -> TrainerControl:
    control = TrainerControl()
    made.on_step_begin(None, state, control)
    guard.on_loss(*micro_batch(*batch))
    state.global_step += 1
    made.on_step_end(None, state, control)
    if control.should_log:
        made.on_log(None, state, control, logs={})
    return control


def test_the_bar_counts_steps_or_tokens_from_where_training_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "tqdm", Bar)
    guard, state = StepGuard(1, 3, IMAGE), TrainerState(global_step=3, max_steps=7, is_world_process_zero=True)
    made, _ = shown(guard, state)
    assert made._bar.given == {"total": 7, "initial": 3, "unit": "step", "disable": None}
    step(made, guard, state, 1.0, [2.0], [0.5])
    assert made._bar.done == 1 and made._bar.shown.startswith("text 2.0000, image 0.5000, ")
    made.on_train_end(None, state, TrainerControl())
    assert made._bar.closed

    guard = StepGuard(1, 3, IMAGE, token_budget=100)
    state = TrainerState(global_step=3, max_steps=7, is_world_process_zero=True)
    made, _ = shown(guard, state, {callbacks.TOKENS_SEEN: 40})
    assert made._bar.given == {"total": 100, "initial": 40, "unit": "token", "unit_scale": True, "disable": None}
    step(made, guard, state, 1.0, [2.0, 2.0], [])
    assert made._bar.done == 3 and guard.tokens_seen == 43


def test_without_a_bar_a_line_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guard, state = StepGuard(1, 0, IMAGE), TrainerState(global_step=0, max_steps=62, is_world_process_zero=True)
    made, metrics = shown(guard, state)
    assert made._bar is not None
    made._bar.disable = True
    with caplog.at_level(logging.INFO):
        step(made, guard, state, 1.0, [2.0], [])
        step(made, guard, state, 1.0, [4.0], [0.5])
    left = metrics.rows[2]["perf/eta_s"]
    assert left > 0 and left == 60 * 4 / metrics.rows[2]["perf/samples_per_s"]
    minutes, seconds = divmod(round(left), 60)
    rate = metrics.rows[2]["perf/samples_per_s"]
    assert caplog.messages[-1] == (
        f"step 2/62: text loss 3.0000, image loss 0.5000, {rate:.1f} samples/s, 0:{minutes:02d}:{seconds:02d} left"
    )


def test_an_interval_that_was_interrupted_counts_from_its_beginning() -> None:
    guard, state = StepGuard(1, 1, IMAGE), TrainerState(global_step=1, max_steps=9)
    before = [*[0.0] * 4, 1.0, 4, 0.5, 1, *[0.0] * 8]  # of generation: text 1.0 over 4 tokens, image 0.5 over 1
    made, metrics = shown(guard, state, {"losses": [{"train/loss": 1.0}], "task_sums": before})
    step(made, guard, state, 4.0, [3.0, 3.0], [1.0])
    logged = metrics.rows[2]
    assert logged["train/loss"] == 2.5
    assert logged["train/text_loss/generation"] == pytest.approx((1.0 + 6.0) / (4 + 2))
    assert logged["train/image_loss/generation"] == pytest.approx((0.5 + 1.0) / (1 + 1))
