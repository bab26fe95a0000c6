"""What happens around each optimizer step of the pretrain stage: agreement of the ranks, metrics, checkpoints.

Steps are optimizer steps. Swift's trainer runs the loop and calls these. Legend: B rows, S sequence positions.
"""

import logging
import math
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from data.messages.rows import TASKS
from nexus_gen.language.generate import generated_embeddings
from nexus_gen.language.model import IGNORE_INDEX, NexusGenForConditionalGeneration, NexusGenOutput
from nexus_gen.specs.errors import UserError
from train.runs.checkpoints import COMPLETE, PREFIX, TOKENS_SEEN, begun_checkpoints, complete_checkpoints
from train.schemas.common import HeldoutConfig, TrainerConfig
from train.steps.average import WeightAverage
from train.steps.clock import StepClock
from train.steps.learning_rate import follow_plan
from train.steps.metrics import MetricsLogger
from train.steps.retention import forget_damaged, write_listing

log = logging.getLogger(__name__)


class TaskSums:
    """Losses of each task, as sums over tokens and their number: these add up over micro-batches and ranks.

    (tasks, 4) float64: text loss, text tokens, image loss, image tokens.
    """

    @staticmethod
    def of(outputs: NexusGenOutput, input_ids: Tensor, labels: Tensor, image_token_id: int) -> Tensor:
        """Of one batch; what a row's task is can be read from its tokens (B, S)."""
        assert outputs.text_token_loss is not None and outputs.image_token_loss is not None
        target_BS = labels == image_token_id
        task_B = task_of_rows(input_ids, labels, image_token_id)
        sums = torch.zeros(len(TASKS), 4, dtype=torch.float64, device=labels.device)
        for column, scored_BS, loss in (
            (0, text_positions(labels, target_BS), outputs.text_token_loss),
            (2, target_BS, outputs.image_token_loss),
        ):
            task = task_B.repeat_interleave(scored_BS.sum(1), output_size=len(loss))
            sums[:, column].index_add_(0, task, loss.double())
            sums[:, column + 1].index_add_(0, task, torch.ones_like(loss, dtype=torch.float64))
        return sums

    @staticmethod
    def means(flat: list[float], prefix: str) -> dict[str, float]:
        """`<prefix>/text_loss/<task>` and `<prefix>/image_loss/<task>` of the tasks that had any."""
        means = {}
        for number, task in enumerate(TASKS):
            text, text_tokens, image, image_tokens = flat[4 * number : 4 * number + 4]
            if text_tokens:
                means[f"{prefix}/text_loss/{task}"] = text / text_tokens
            if image_tokens:
                means[f"{prefix}/image_loss/{task}"] = image / image_tokens
        return means


def text_positions(labels: Tensor, target: Tensor) -> Tensor:
    """Positions whose text is scored, (B, S): nothing predicts the first one."""
    scored = (labels != IGNORE_INDEX) & ~target
    scored[:, 0] = False
    return scored


def task_of_rows(input_ids: Tensor, labels: Tensor, image_token_id: int) -> Tensor:
    """The index of each row's task in TASKS, (B,)."""
    is_target = labels == image_token_id
    makes = is_target.any(1)
    looks = ((input_ids == image_token_id) & ~is_target).any(1)
    return torch.where(makes, 1 + looks.long(), torch.where(looks, 0, 3))


def embedding_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Of (N, D) embeddings: sums of squared error and cosine distance over tokens, and N; (3,) float64."""
    predicted, target = predicted.float(), target.float()
    squared_error = (predicted - target).square().mean(dim=-1)
    cosine_distance = 1 - F.cosine_similarity(predicted, target, dim=-1)
    return torch.stack([squared_error, cosine_distance, torch.ones_like(squared_error)]).double().sum(dim=1)


def means(losses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each loss over the steps that have it: one without a target image has no image loss."""
    names = dict.fromkeys(name for of_step in losses for name in of_step)
    values = {name: [of_step[name] for of_step in losses if name in of_step] for name in names}
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


class Averaging(TrainerCallback):
    """Keeps a WeightAverage up to date, from the checkpoint's or else from the weights that training starts with."""

    def __init__(self, average: WeightAverage, directory: Path) -> None:
        self._average = average
        self._directory = directory

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = checkpoint_path(self._directory, state.global_step)
        if state.global_step:
            self._average.load(checkpoint)
        else:
            self._average.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._average.update()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._average.save(checkpoint_path(self._directory, state.global_step))


class HeldoutLoss(TrainerCallback):
    """Losses on held-out rows every few steps and after the last: `heldout/text_loss`, `heldout/image_loss/editing`.

    `heldout/image_mse` and `heldout/image_cosine_distance` are what the image loss mixes, whatever the mixture.
    `heldout/accuracy/understanding` is the share of rows in whose replies every token is the likeliest: those that
    greedy decoding would answer as they stand. batches: all of them, the same on every rank; ranks share them, and
    make equally many passes. average: the weights to look at, where they are not the trained ones. prepare: makes of a
    collated batch what the model computes with, for its loss and for what it generates alike.
    generates: also measure `heldout/generated_mse` and `heldout/generated_cosine_distance`: errors of each row's first
    target image as inference generates it. They compare over `target_inputs`; the others are given the image itself
    where that is `embeddings`.
    """

    def __init__(
        self,
        guard: "StepGuard",
        model: NexusGenForConditionalGeneration,
        batches: list[dict[str, Tensor]],
        metrics: MetricsLogger,
        config: HeldoutConfig,
        average: WeightAverage | None,
        prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        generates: bool,
        clock: StepClock,
    ) -> None:
        self._guard = guard
        self._clock = clock
        self._model = model
        self._batches = batches
        self._prepare = prepare
        self._generates = generates
        self._metrics = metrics
        self._config = config
        self._average = average

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, every = state.global_step, self._config.every_steps
        due = every > 0 and step % every == 0
        if self._batches and (due or self._guard.is_last(state)):
            with self._clock.other("heldout", step, every):
                self._metrics.log(step, self.measure())

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        model = self._model
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        image_token_id = model.config.image_token_id
        losses = torch.zeros(len(TASKS), 4, dtype=torch.float64, device=model.device)
        rows = torch.zeros(2, len(TASKS), dtype=torch.float64, device=model.device)  # right, all
        forced, made = torch.zeros(2, 3, dtype=torch.float64, device=model.device)  # `embedding_errors`
        model.eval()
        with self._average.applied() if self._average is not None else nullcontext():
            for first in range(0, len(self._batches), world_size):
                number = first + rank
                batch = self._batches[number if number < len(self._batches) else 0]
                batch = self._prepare({name: tensor.to(model.device) for name, tensor in batch.items()})
                outputs = model(**batch)
                generated = generated_embeddings(model, batch) if self._generates else {}
                if number >= len(self._batches):
                    continue
                forced += embedding_errors(outputs.predicted_embeds, outputs.target_embeds)
                targets = outputs.target_embeds.split(model.num_target_tokens)
                for image, embeds in generated.items():
                    made += embedding_errors(embeds, targets[image])
                labels = batch["labels"]
                losses += TaskSums.of(outputs, batch["input_ids"], labels, image_token_id)
                scored = text_positions(labels, labels == image_token_id)
                wrong = torch.zeros_like(scored).masked_scatter(scored, ~outputs.text_token_right).any(1)
                task_B = task_of_rows(batch["input_ids"], labels, image_token_id)
                rows[0].index_add_(0, task_B, (~wrong).double())
                rows[1].index_add_(0, task_B, torch.ones_like(task_B, dtype=torch.float64))
        model.train()
        facts = torch.cat([losses.flatten(), rows.flatten(), forced, made])
        torch.distributed.all_reduce(facts)
        of_losses, of_rows, forced, made = facts.split([losses.numel(), rows.numel(), 3, 3])
        losses, rows = of_losses.view(-1, 4), of_rows.view(2, -1)
        errors = {
            f"heldout/{name}_{part}": float(sums[place] / sums[2])
            for name, sums in (("image", forced), ("generated", made))
            if sums[2]
            for place, part in enumerate(("mse", "cosine_distance"))
        }
        text, text_tokens, image, image_tokens = losses.sum(0).tolist()
        right, total = rows[:, 0].tolist()
        return {
            **({"heldout/text_loss": text / text_tokens} if text_tokens else {}),
            **({"heldout/image_loss": image / image_tokens} if image_tokens else {}),
            **errors,
            **TaskSums.means(losses.flatten().tolist(), "heldout"),
            **({"heldout/accuracy/understanding": right / total} if total else {}),
        }


class StepGuard:
    """Lets the ranks agree, once per optimizer step and before it, on the mean losses and on whether to stop.

    One reduction serves both. It runs in the forward of the step's last micro-batch: DeepSpeed steps its optimizer
    inside the backward pass, so every later hook would be too late for a loss that is not finite.
    token_budget: tokens to train on; 0 where the trainer's steps say how long. The step that reaches it is the last.
    """

    def __init__(self, accumulation: int, start_step: int, image_token_id: int, token_budget: int = 0) -> None:
        self.stopping = False  # a rank has received a SIGTERM
        self.task_sums: list[float] = []  # of the last step, `TaskSums` over its micro-batches on all ranks
        self._image_token_id = image_token_id
        # Of the last step, means over its micro-batches on all ranks; the image loss over those that have targets.
        self.losses: dict[str, float] = {}
        self.num_tokens = 0  # of the last step, on all ranks, without padding
        self.tokens_seen = 0  # of all steps, those before a resumption too
        self.token_budget = token_budget
        self._accumulation = accumulation
        self._micro_batches = start_step * accumulation
        self._sums: torch.Tensor | float = 0.0
        self.interrupted = False  # this rank is to stop after the step under way

    def listen(self) -> None:
        """Remember a SIGTERM from now on, so that training can finish its step and save."""
        signal.signal(signal.SIGTERM, self._receive)

    def is_last(self, state: TrainerState) -> bool:
        """Whether training ends with the step that is done, by its steps or by its tokens."""
        return state.global_step >= state.max_steps or self.spent >= 1

    @property
    def spent(self) -> float:
        """Of the budget of tokens, from 0 to 1; 0 where there is none."""
        return min(1.0, self.tokens_seen / self.token_budget) if self.token_budget else 0.0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def on_loss(self, outputs: NexusGenOutput, inputs: dict[str, Any]) -> None:
        """Called after each forward pass; UserError on every rank when a rank's loss is not finite."""
        assert outputs.loss is not None and outputs.text_loss is not None and outputs.image_loss is not None
        losses = torch.stack([outputs.loss, outputs.text_loss, outputs.image_loss]).detach()
        of_tasks = TaskSums.of(outputs, inputs["input_ids"], inputs["labels"], self._image_token_id)
        # float64: counts of tokens and of stops share a tensor with losses
        num_tokens = inputs["attention_mask"].sum().reshape(1)
        with_image = of_tasks[:, 3].sum() > 0
        self._sums = self._sums + torch.cat(
            [losses.double(), with_image.double()[None], of_tasks.flatten(), num_tokens.double()]
        )
        self._micro_batches += 1
        if self._micro_batches % self._accumulation == 0:
            self._agree()

    def _agree(self) -> None:
        assert isinstance(self._sums, torch.Tensor)
        facts = torch.cat([self._sums, self._sums.new_tensor([float(self.interrupted)])])
        self._sums = 0.0
        torch.distributed.all_reduce(facts)
        num_micro_batches = self._accumulation * torch.distributed.get_world_size()
        *sums, num_tokens, stop = facts.tolist()
        loss, text_loss, image_loss, with_image, *self.task_sums = sums
        self.losses = {"train/loss": loss / num_micro_batches, "train/text_loss": text_loss / num_micro_batches}
        if with_image:
            self.losses["train/image_loss"] = image_loss / with_image
        self.num_tokens = int(num_tokens)
        self.tokens_seen += self.num_tokens
        self.stopping = stop > 0
        if not math.isfinite(self.losses["train/loss"]):
            values = ", ".join(f"{name} {value}" for name, value in self.losses.items())
            raise UserError(
                f"the loss of step {self._micro_batches // self._accumulation} is not finite ({values}); training "
                "stopped before the optimizer used it: lower optim.learning_rate, set optim.max_grad_norm, or look for "
                "broken rows in data.train"
            )


class StepMetrics(TrainerCallback, ExportableState):
    """Figures of every interval of log_every_steps into the MetricsLogger; a progress bar on rank zero.

    `train/loss`, `train/text_loss`, `train/image_loss`: means over the interval's steps of `StepGuard.losses`; those
    of tasks are means over all tokens of the interval. `train/lr`, `train/grad_norm`: what its last step used, and the
    norm before clipping. `train/tokens_seen`: of all steps so far. `perf/samples_per_s`, `perf/tokens_per_s`: of
    training alone, without what `StepClock` calls other work. `perf/eta_s`: what is left until the last checkpoint,
    other work included (`StepClock.remaining_s`); of a budget of tokens, in as many steps as it takes at the
    interval's tokens per step.
    learning_rate: tells the rate that the coming step will use. The losses of the interval under way and the tokens
    seen are kept in checkpoints, so that a resumed run logs those of an uninterrupted one.
    """

    def __init__(
        self,
        guard: StepGuard,
        metrics: MetricsLogger,
        config: TrainerConfig,
        learning_rate: Callable[[], float],
        clock: StepClock,
    ) -> None:
        self._clock = clock
        self._last: dict[str, float] = {}
        self._guard = guard
        self._metrics = metrics
        self._config = config
        self._learning_rate = learning_rate
        self._rate = 0.0
        self._losses: list[dict[str, float]] = []
        self._task_sums: list[float] = []  # of the interval under way
        self._num_tokens = 0
        self._due = False  # whether the step that is done ends an interval
        self._bar: tqdm | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer writes into a checkpoint; it would restore it only by building this object anew."""
        attributes = {"losses": self._losses, "task_sums": self._task_sums, TOKENS_SEEN: self._guard.tokens_seen}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        states: Any = state.stateful_callbacks  # by name, once the trainer has taken them from its list
        attributes = states[type(self).__name__]["attributes"]
        self._losses, self._task_sums = list(attributes["losses"]), list(attributes["task_sums"])
        self._guard.tokens_seen = attributes[TOKENS_SEEN]
        self._clock.start()
        if state.is_world_process_zero:
            # disable=None: no bar where nobody watches; the log lines below are then all there is.
            tokens, budget = self._guard.tokens_seen, self._guard.token_budget
            self._bar = (
                tqdm(total=budget, initial=tokens, unit="token", unit_scale=True, disable=None)
                if budget
                else tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)
            )

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._rate = self._learning_rate()  # at the end of the step the schedule has moved on

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._losses.append(self._guard.losses)
        before = self._task_sums or [0.0] * len(self._guard.task_sums)
        self._task_sums = [old + new for old, new in zip(before, self._guard.task_sums, strict=True)]
        self._num_tokens += self._guard.num_tokens
        self._clock.step_done()
        if self._bar is not None:
            self._bar.update(self._guard.num_tokens if self._guard.token_budget else 1)
        # Not where a SIGTERM ends it: the run that resumes logs the whole interval.
        self._due = state.global_step % self._config.log_every_steps == 0 or self._guard.is_last(state)
        control.should_log = self._due

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """`logs` come from the trainer, which alone knows the gradient norm; at the end of training it sums up."""
        if not self._due:
            return
        interval = self._clock.lap()
        last_step = state.max_steps
        if self._guard.token_budget:
            tokens_left = max(0, self._guard.token_budget - self._guard.tokens_seen)
            last_step = state.global_step + math.ceil(tokens_left * interval.num_steps / self._num_tokens)
        self._last = {
            **means(self._losses),
            **TaskSums.means(self._task_sums, "train"),
            "train/lr": self._rate,
            **self._gradient_norm(logs or {}),
            "train/tokens_seen": self._guard.tokens_seen,
            "perf/samples_per_s": self._config.global_batch_size / interval.step_s,
            "perf/tokens_per_s": self._num_tokens / interval.seconds,
            "perf/eta_s": self._clock.remaining_s(state.global_step, last_step, interval.step_s),
        }
        self._metrics.log(state.global_step, self._last)
        if state.is_world_process_zero:
            self._show(state)
        self._losses = []
        self._task_sums = []
        self._num_tokens = 0
        self._due = False

    def _gradient_norm(self, logs: dict[str, float]) -> dict[str, float]:
        norm = logs.get("grad_norm")  # before clipping; DeepSpeed tells none at ZeRO stage 0 in float32
        return {} if norm is None else {"train/grad_norm": float(norm)}

    def _show(self, state: TrainerState) -> None:
        parts = {part: self._last.get(f"train/{part}_loss") for part in ("text", "image")}
        rate = self._last["perf/samples_per_s"]
        if self._bar is not None and not self._bar.disable:
            shown = ", ".join(f"{part} {loss:.4f}" for part, loss in parts.items() if loss is not None)
            self._bar.set_postfix_str(f"{shown}, {rate:.1f} samples/s", refresh=False)
            return
        shown = ", ".join(f"{part} loss {loss:.4f}" for part, loss in parts.items() if loss is not None)
        left = timedelta(seconds=round(self._last["perf/eta_s"]))
        budget = self._guard.token_budget
        step = f"step {state.global_step}" + (
            f", {self._guard.spent:.1%} of {budget} tokens" if budget else f"/{state.max_steps}"
        )
        log.info("%s: %s, %.1f samples/s, %s left", step, shown, rate, left)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class NewPlan(TrainerCallback):
    """Lets the learning rate follow the schedule of now; behind StepMetrics, which brings the tokens seen back."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        follow_plan(kwargs["lr_scheduler"])


class StepCheckpoints(TrainerCallback):
    """Checkpoints every N steps, after the last step, and when the ranks agreed to stop; that also ends training.

    The trainer writes them in place, so each is marked when all ranks are done; older ones go only after that.
    """

    def __init__(self, guard: StepGuard, directory: Path, config: TrainerConfig, clock: StepClock) -> None:
        self._guard = guard
        self._clock = clock
        self._directory = directory
        self._config = config

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step, every = state.global_step, self._config.checkpoint_every_steps
        due = every > 0 and step % every == 0
        is_last = self._guard.is_last(state)
        control.should_save = due or self._guard.stopping or is_last
        if self._guard.stopping or is_last:
            control.should_training_stop = True
        if control.should_save:
            self._clock.begin_other("checkpoint", step, every)  # until the trainer has written it, see on_save

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        torch.distributed.barrier()
        write_listing(path := checkpoint_path(self._directory, state.global_step))
        if state.is_world_process_zero:
            (path / COMPLETE).touch()
            forget_damaged(self._directory)
            for old in complete_checkpoints(self._directory)[: -self._config.keep_checkpoints]:
                shutil.rmtree(old)
            log.info("checkpoint %s", path.name)
        torch.distributed.barrier()
        self._clock.end_other("checkpoint")


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where swift's trainer writes the checkpoint of a step."""
    return directory / f"{PREFIX}{step}"


def remove_incomplete_checkpoints(directory: Path) -> None:
    """What interruptions left behind; for rank zero alone."""
    complete = complete_checkpoints(directory)
    for path in begun_checkpoints(directory):
        if path not in complete:
            log.warning("removing %s: it was not written to the end", path)
            shutil.rmtree(path)
