"""What both engines log of an interval, under a clock that a test moves by hand."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import distributed
from transformers import TrainerControl, TrainerState

from train.decoders import engine
from train.pretrain import callbacks as swift_callbacks
from train.schemas.common import HeldoutConfig
from train.steps.clock import StepClock, times_due


class Clock:
    """Stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds

    def passes(self, seconds: float) -> None:
        self.seconds += seconds


class Recorder:
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        row = self.rows.setdefault(step, {})
        assert not row.keys() & metrics.keys()
        row.update(metrics)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trainer_config(**changes: int) -> Any:
    values = {"max_steps": 5, "global_batch_size": 12, "log_every_steps": 2, "checkpoint_every_steps": 3}
    return SimpleNamespace(**values | {"keep_checkpoints": 9} | changes)


def test_work_is_due_at_multiples_and_after_the_last_step() -> None:
    for every in (0, 1, 3, 4):
        for last in range(1, 13):
            due = [step for step in range(1, last + 1) if step == last or (every and step % every == 0)]
            for after in range(14):
                assert times_due(after, last, every) == sum(step > after for step in due), (after, last, every)


def test_the_clock_takes_other_work_out_of_the_steps_and_adds_what_is_left_of_it() -> None:
    seconds = Clock()
    clock = StepClock(seconds)
    seconds.passes(50)  # loading weights
    clock.start()
    for step in (1, 2, 3):
        seconds.passes(2)
        clock.step_done()
        with clock.other("heldout", step, every_steps=1):
            seconds.passes(10 * step)
    interval = clock.lap()
    assert (interval.num_steps, interval.seconds, interval.step_s) == (3, 6.0, 2.0)
    assert clock.remaining_s(step=3, last_step=7, step_s=2.0) == 4 * 2 + 4 * 20
    seconds.passes(5)
    clock.step_done()
    clock.begin_other("checkpoint", 4, every_steps=0)  # a log line while it is under way
    seconds.passes(30)
    assert clock.lap() == (1, 5.0)
    seconds.passes(1)
    clock.end_other("checkpoint")
    seconds.passes(7)
    clock.step_done()
    assert clock.lap() == (1, 7.0)


@pytest.mark.usefixtures("sigterm")
def test_lightning_logs_intervals_of_steps_alone(tmp_path: Path) -> None:
    seconds, metrics = Clock(), Recorder()
    clock, config = StepClock(seconds), trainer_config()
    guard = engine.StepGuard(engine.StopRequest())
    stepping: Any = engine.StepMetrics(guard, metrics, config, 0, clock)
    checkpoints: Any = engine.StepCheckpoints(guard, tmp_path, config, clock)
    norms: list[float] = []

    def save(path: Path) -> None:
        path.mkdir()
        seconds.passes(5)

    deepspeed = SimpleNamespace(get_global_grad_norm=lambda: norms[-1])
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=2,
        global_step=0,
        is_global_zero=False,
        strategy=SimpleNamespace(barrier=lambda: None, deepspeed_engine=deepspeed),
        save_checkpoint=save,
    )
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0}])
    stepping.on_train_start(trainer, None)
    took = {1: 3, 2: 4, 3: 3, 4: 7, 5: 6}
    losses = {1: 1.0, 2: 2.0, 3: 4.0, 4: 8.0, 5: 3.0}
    for step in took:
        for micro in (0, 1):
            number = 2 * (step - 1) + micro
            optimizer.param_groups[0]["lr"] = step / 10  # of this step
            stepping.on_before_optimizer_step(trainer, None, optimizer)
            if micro:
                guard.loss, trainer.global_step = losses[step], step
                norms.append(100.0 + step)
                seconds.passes(took[step])
                optimizer.param_groups[0]["lr"] = (step + 1) / 10  # the schedule moves on
            stepping.on_train_batch_end(trainer, None, None, None, number)
            if micro and step % 2 == 0:  # where monitors stand
                with clock.other("heldout", step, 2):
                    seconds.passes(10 if step == 2 else 12)
            checkpoints.on_train_batch_end(trainer, None, None, None, number)
    assert metrics.rows == {
        2: {
            "train/loss": 1.5,
            "train/lr": 0.2,
            "train/grad_norm": 102.0,
            "perf/samples_per_s": 12 / 3.5,
            "perf/eta_s": 3 * 3.5,  # nothing else was done yet
        },
        4: {
            "train/loss": 6.0,
            "train/lr": 0.4,
            "train/grad_norm": 104.0,
            "perf/samples_per_s": 12 / 5,  # 10 s for two steps, beside 10 s of measuring and 5 s of a checkpoint
            "perf/eta_s": 1 * 5 + 2 * 10 + 1 * 5,  # measured now and at the end, and the last checkpoint
        },
        5: {
            "train/loss": 3.0,
            "train/lr": 0.5,
            "train/grad_norm": 105.0,
            "perf/samples_per_s": 12 / 6,
            "perf/eta_s": (10 + 12) / 2 + 5,
        },
    }
    assert stepping.last == metrics.rows[5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003.partial", "step_00000005.partial"]


@pytest.mark.usefixtures("sigterm")
def test_what_belongs_to_an_interval_of_a_decoder_outlives_a_resumption() -> None:
    guard, clock, metrics = engine.StepGuard(engine.StopRequest()), StepClock(Clock()), Recorder()
    stepping: Any = engine.StepMetrics(guard, metrics, trainer_config(), 0, clock)
    stepping.last, stepping._losses = {"train/loss": 9.0}, [1.0]
    resumed: Any = engine.StepMetrics(guard, metrics, trainer_config(), 3, StepClock(seconds := Clock()))
    resumed.load_state_dict(stepping.state_dict())
    strategy = SimpleNamespace(deepspeed_engine=SimpleNamespace(get_global_grad_norm=lambda: None))
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, global_step=4, is_global_zero=False, strategy=strategy)
    resumed.on_train_start(trainer, None)
    assert resumed.last == {"train/loss": 9.0}
    guard.loss = 2.0
    seconds.passes(3)
    resumed.on_train_batch_end(trainer, None, None, None, 3)
    assert metrics.rows[4]["train/loss"] == 1.5  # both steps of the interval
    assert metrics.rows[4]["perf/samples_per_s"] == 12 / 3  # the one that was timed
    assert "train/grad_norm" not in metrics.rows[4]


class Swift:
    """Drives the callbacks of the pretrain stage as its trainer does."""

    def __init__(self, directory: Path, token_budget: int, **config: int) -> None:
        self.seconds, self.metrics = Clock(), Recorder()
        self.clock = StepClock(self.seconds)
        self.guard = swift_callbacks.StepGuard(1, 0, 9, token_budget)
        self.rate = 0.0
        self.directory = directory
        self.state = TrainerState(global_step=0, max_steps=5, is_world_process_zero=False)
        settings, recorder = trainer_config(**config), self.metrics
        given: Any = (self.guard, recorder, settings, lambda: self.rate, self.clock)
        self.stepping = swift_callbacks.StepMetrics(*given)
        heldout: Any = swift_callbacks.HeldoutLoss(
            *(self.guard, None, [{}], recorder, HeldoutConfig(2, 1), None, None, False, self.clock)
        )
        heldout.measure = self.measure
        checkpoints = swift_callbacks.StepCheckpoints(self.guard, directory, settings, self.clock)
        self.callbacks: list[Any] = [self.stepping, heldout, checkpoints]
        self.heldout_s = iter((10, 12, 14))
        self.state.stateful_callbacks = {"StepMetrics": self.stepping.state()}
        self.call("on_train_begin", TrainerControl())

    def measure(self) -> dict[str, float]:
        self.seconds.passes(next(self.heldout_s))
        return {"heldout/text_loss": float(self.state.global_step)}

    def call(self, hook: str, control: TrainerControl, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(None, self.state, control, **kwargs)

    def step(self, seconds: float, num_tokens: int, losses: dict[str, float], task_sums: list[float]) -> bool:
        """Whether it was the last."""
        control = TrainerControl()
        step = self.state.global_step + 1
        self.rate = step / 10
        self.call("on_step_begin", control)
        self.guard.losses, self.guard.task_sums, self.guard.num_tokens = losses, task_sums, num_tokens
        self.guard.tokens_seen += num_tokens
        self.seconds.passes(seconds)
        self.rate = (step + 1) / 10  # the schedule moves on
        self.state.global_step = step
        self.call("on_step_end", control)
        if control.should_log:
            self.call("on_log", control, logs={"grad_norm": 100.0 + step})
        if control.should_save:
            swift_callbacks.checkpoint_path(self.directory, step).mkdir()
            self.seconds.passes(5)
            self.call("on_save", control)
        if control.should_training_stop:
            self.call("on_log", control, logs={"train_runtime": 9.0})  # the trainer sums up
        return control.should_training_stop


def sums(understanding: tuple[float, float], editing_image: tuple[float, float] = (0, 0)) -> list[float]:
    """`TaskSums`: understanding, generation, editing, text; each text loss, text tokens, image loss, image tokens."""
    return [*understanding, 0, 0, *[0.0] * 4, 0, 0, *editing_image, *[0.0] * 4]


def test_swift_logs_intervals_of_steps_alone(tmp_path: Path) -> None:
    run = Swift(tmp_path, token_budget=0)
    assert not run.step(3, 10, {"train/loss": 1.0, "train/image_loss": 0.5}, sums((2, 4), (1, 2)))
    assert not run.step(4, 25, {"train/loss": 2.0}, sums((4, 2)))
    assert not run.step(3, 30, {"train/loss": 4.0}, sums((1, 8)))
    assert not run.step(7, 50, {"train/loss": 8.0}, sums((3, 8)))
    assert run.step(6, 24, {"train/loss": 3.0}, sums((5, 10)))
    assert run.metrics.rows == {
        2: {
            "train/loss": 1.5,
            "train/image_loss": 0.5,
            "train/text_loss/understanding": 1.0,  # 6 over 6 tokens, not the mean of 0.5 and 2
            "train/image_loss/editing": 0.5,
            "train/lr": 0.2,
            "train/grad_norm": 102.0,
            "train/tokens_seen": 35,
            "perf/samples_per_s": 12 / 3.5,
            "perf/tokens_per_s": 35 / 7,
            "perf/eta_s": 3 * 3.5 + 2 * 10,  # measured at step 4 and at the end; no checkpoint was written yet
            "heldout/text_loss": 2.0,
        },
        4: {
            "train/loss": 6.0,
            "train/text_loss/understanding": 0.25,
            "train/lr": 0.4,
            "train/grad_norm": 104.0,
            "train/tokens_seen": 115,
            "perf/samples_per_s": 12 / 5,  # 10 s for two steps, beside 5 s of a checkpoint and 12 s of measuring
            "perf/tokens_per_s": 80 / 10,
            "perf/eta_s": 1 * 5 + 1 * 11 + 1 * 5,
            "heldout/text_loss": 4.0,
        },
        5: {
            "train/loss": 3.0,
            "train/text_loss/understanding": 0.5,
            "train/lr": 0.5,
            "train/grad_norm": 105.0,
            "train/tokens_seen": 139,
            "perf/samples_per_s": 12 / 6,
            "perf/tokens_per_s": 24 / 6,
            "perf/eta_s": 0.0,  # the last checkpoint is under way
            "heldout/text_loss": 5.0,
        },
    }


def test_the_time_left_of_a_budget_of_tokens_is_that_of_as_many_steps(tmp_path: Path) -> None:
    run = Swift(tmp_path, token_budget=100, log_every_steps=1, checkpoint_every_steps=0)
    run.state.max_steps = 1000
    assert not run.step(3, 20, {"train/loss": 1.0}, sums((1, 1)))
    assert run.metrics.rows[1]["perf/eta_s"] == 4 * 3  # 80 tokens, 20 a step
    assert not run.step(4, 30, {"train/loss": 1.0}, sums((1, 1)))
    assert run.metrics.rows[2]["perf/eta_s"] == 2 * 4 + 10  # 50 tokens in two steps; measured after the second
    assert run.step(4, 60, {"train/loss": 1.0}, sums((1, 1)))
    assert run.metrics.rows[3]["perf/eta_s"] == 0.0
    assert run.metrics.rows[3]["perf/tokens_per_s"] == 15
    by_two = Swift(tmp_path / "by two", token_budget=100, checkpoint_every_steps=0)
    by_two.state.max_steps = 1000
    for seconds in (3, 5):
        by_two.step(seconds, 15, {"train/loss": 1.0}, sums((1, 1)))
    assert by_two.metrics.rows[2]["perf/eta_s"] == 5 * 4 + 3 * 10  # 70 tokens, 15 a step; measured at 4, 6 and the end


def test_what_belongs_to_an_interval_of_pretraining_outlives_a_resumption(tmp_path: Path) -> None:
    """It ends with a SIGTERM in the middle of the interval, which the resumed run logs as a whole."""
    before = Swift(tmp_path / "before", token_budget=0)
    before.directory.mkdir()
    before.guard.stopping = True
    assert before.step(3, 10, {"train/loss": 1.0}, sums((2, 4)))
    assert before.metrics.rows == {}
    after = Swift(tmp_path / "after", token_budget=0)
    after.state = TrainerState(global_step=1, max_steps=5, is_world_process_zero=False)
    after.state.stateful_callbacks = {"StepMetrics": before.stepping.state()}
    after.stepping.on_train_begin(None, after.state, TrainerControl())
    after.step(5, 30, {"train/loss": 4.0}, sums((4, 2)))
    row = after.metrics.rows[2]
    assert (row["train/loss"], row["train/text_loss/understanding"], row["train/tokens_seen"]) == (2.5, 1.0, 40)
    assert (row["perf/tokens_per_s"], row["perf/samples_per_s"]) == (6.0, 12 / 5)  # of the step that was timed
