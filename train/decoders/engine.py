"""Lightning's Trainer with DeepSpeed on any device: strategy, callbacks, checkpoints.

Every process of a stage is started by torchrun, one alone too. Steps are optimizer steps.
"""

import logging
import math
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import deepspeed
import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import train.steps.deepspeed_mends  # noqa: F401
from nexus_gen.specs.errors import UserError
from train.runs.checkpoints import checkpoint_step, complete_checkpoints
from train.runs.directory import CHECKPOINTS
from train.runs.failures import after_death
from train.schemas.common import OptimConfig, TrainerConfig
from train.steps.average import WeightAverage
from train.steps.clock import StepClock
from train.steps.learning_rate import follow_plan
from train.steps.metrics import MetricsLogger
from train.steps.retention import forget_damaged, write_listing

log = logging.getLogger(__name__)

PARTIAL = ".partial"  # the ending of a checkpoint that is being written
BUCKET_ELEMENTS = 200_000_000  # of a reduction or gather: 400 MB in bfloat16, enough to saturate the link
PRECISIONS: dict[str, Literal["32-true", "bf16-true"]] = {
    "float32": "32-true",
    "tf32": "32-true",
    "bfloat16": "bf16-true",
}


# ---- DeepSpeed ----------------------------------------------------------------------------------------------------


class AnyDeviceDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeedStrategy on CPU processes (gloo) as well as on CUDA, with accumulated gradients scaled once.

    Lightning refuses CPUs in one check, and wants device indices: torch accepts `cpu:<i>`.
    """

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        super(DeepSpeedStrategy, self).setup_environment()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the accumulation already; by default DeepSpeed does it a second time.

        AdamW hardly shows it, being scale-free, but clipping and the reported norm are then wrong.
        """
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_state(self, optimizer: Any) -> dict[str, Tensor]:
        """Nothing: DeepSpeed writes the optimizer's state itself, and a copy made here would be thrown away."""
        return {}


def deepspeed_config(trainer: TrainerConfig, num_parameters: int, device_type: str) -> dict[str, Any]:
    """DeepSpeed's config; Lightning adds accumulation, clipping and precision."""
    bucket = min(BUCKET_ELEMENTS, num_parameters)
    zero = {
        "stage": trainer.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": device_type == "cuda",  # there are no streams to overlap on a CPU
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if trainer.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket // 4}
    return {
        "train_micro_batch_size_per_gpu": trainer.micro_batch_size,
        "zero_optimization": zero,
        "steps_per_print": 1 << 62,  # metrics are ours
    }


def gather_weights(module: nn.Module, rank: int) -> dict[str, Tensor]:
    """The whole weights on the CPU of rank zero, by name, and nothing on the others; every rank has to call it.

    Gathers one parameter at a time, so no device holds more than one whole parameter of a ZeRO-3 model.
    """
    weights = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


# ---- checkpoints on disk ------------------------------------------------------------------------------------------


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The one that training goes on from."""
    return next(iter(reversed(complete_checkpoints(run_dir / CHECKPOINTS))), None)


# ---- callbacks ----------------------------------------------------------------------------------------------------


class StopRequest:
    """Remembers a SIGTERM, so that training can finish its step and save."""

    def __init__(self) -> None:
        self.received = False
        self.death = ""  # of a loader process, which stops training as well
        self.listen()

    def listen(self) -> None:
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def on_death(self, death: str) -> None:
        """Stop after the step under way, for a loader process was killed."""
        self.received, self.death = True, death


class StepGuard(pl.Callback):
    """Lets the ranks agree, once per optimizer step and before it, on the mean loss and on whether to stop.

    One reduction of two numbers serves both. A loss that is not finite on any rank stops all of them with a UserError
    while the optimizer's state is still sound.
    """

    def __init__(self, stop_request: StopRequest) -> None:
        self.loss = math.nan  # of the last step, mean over its samples on all ranks
        self.stopping = False
        self._stop_request = stop_request
        self._micro_batches = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Lightning has just put its own handler there: it broadcasts inside the handler, between whatever collectives
        # the ranks are in, and hangs.
        self._stop_request.listen()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._micro_batches += 1  # DeepSpeed accumulates itself, so Lightning calls this for every micro batch
        if self._micro_batches % trainer.accumulate_grad_batches:
            return
        facts = torch.stack([pl_module.loss_sum.float(), pl_module.loss_sum.new_tensor(self._stop_request.received)])
        pl_module.loss_sum = 0.0
        torch.distributed.all_reduce(facts)
        loss_sum, stop = facts.tolist()
        self.loss = loss_sum / (trainer.accumulate_grad_batches * trainer.world_size)
        self.stopping = stop > 0
        if not math.isfinite(self.loss):
            raise UserError(
                f"the loss of step {trainer.global_step + 1} is {self.loss}; training stopped before the optimizer "
                "used it: lower optim.learning_rate, set optim.max_grad_norm, or look for broken samples in shards"
            )


class NewPlan(pl.Callback):
    """Lets a checkpoint be gone on from under another max_steps than it was written under."""

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        # That its last batch was the last one of all: `max_steps` says so, and Lightning would end at once.
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            assert isinstance(scheduler, LambdaLR)
            follow_plan(scheduler)


class StepMetrics(pl.Callback):
    """Figures of every interval of log_every_steps into the MetricsLogger; a progress bar on rank zero.

    `train/loss`: mean over the interval's steps. `train/lr`, `train/grad_norm`: what its last step used, and the norm
    before clipping. `perf/samples_per_s`: of training alone, without what `StepClock` calls other work.
    `perf/eta_s`: what is left until the last checkpoint, other work included (`StepClock.remaining_s`).
    last: the latest values logged. What belongs to the interval under way is kept in checkpoints, so that a resumed
    run logs the losses of an uninterrupted one.
    """

    def __init__(
        self, guard: StepGuard, metrics: MetricsLogger, config: TrainerConfig, start_step: int, clock: StepClock
    ) -> None:
        self.last: dict[str, float] = {}
        self._clock = clock
        self._guard = guard
        self._metrics = metrics
        self._config = config
        self._start_step = start_step
        self._losses: list[float] = []
        self._learning_rate = 0.0
        self._bar: tqdm | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"last": self.last, "losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last, self._losses = state_dict["last"], state_dict["losses"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._clock.start()
        if trainer.is_global_zero:
            # disable=None: no bar where nobody watches; the log lines below are then all there is.
            self._bar = tqdm(total=self._config.max_steps, initial=self._start_step, unit="step", disable=None)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]  # afterwards the schedule has moved on

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        self._losses.append(self._guard.loss)
        if self._bar is not None:
            self._bar.update()
        self._clock.step_done()
        if step % self._config.log_every_steps and step != self._config.max_steps:
            return
        step_s = self._clock.lap().step_s
        self.last = {
            "train/loss": sum(self._losses) / len(self._losses),
            "train/lr": self._learning_rate,
            **self._gradient_norm(trainer),
            "perf/samples_per_s": self._config.global_batch_size / step_s,
            "perf/eta_s": self._clock.remaining_s(step, self._config.max_steps, step_s),
        }
        self._metrics.log(step, self.last)
        self._show(step)
        self._losses = []

    def _gradient_norm(self, trainer: pl.Trainer) -> dict[str, float]:
        strategy: Any = trainer.strategy
        norm = strategy.deepspeed_engine.get_global_grad_norm()  # before clipping; None at stage 0 without it
        return {} if norm is None else {"train/grad_norm": float(norm)}

    def _show(self, step: int) -> None:
        loss, rate = self.last["train/loss"], self.last["perf/samples_per_s"]
        if self._bar is None:
            return
        if self._bar.disable:
            left = timedelta(seconds=round(self.last["perf/eta_s"]))
            log.info("step %d/%d: loss %.4f, %.1f samples/s, %s left", step, self._config.max_steps, loss, rate, left)
        else:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} samples/s", refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class Averaging(pl.Callback):
    """Keeps a WeightAverage up to date, from the checkpoint's or else from the weights that training starts with."""

    def __init__(self, average: WeightAverage, checkpoint: Path | None) -> None:
        self._average = average
        self._checkpoint = checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.start()

    def start(self) -> None:
        """Also where no step is left to train."""
        if self._checkpoint is None:
            self._average.start()
        else:
            self._average.load(self._checkpoint)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._average.update()


class StepCheckpoints(pl.Callback):
    """Checkpoints every N steps, after the last step, and when the ranks agreed to stop; that also ends the fit."""

    def __init__(
        self,
        guard: StepGuard,
        directory: Path,
        config: TrainerConfig,
        clock: StepClock,
        average: WeightAverage | None = None,
    ) -> None:
        self._average = average
        self._clock = clock
        self._guard = guard
        self._directory = directory
        self._config = config

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, every = trainer.global_step, self._config.checkpoint_every_steps
        due = every > 0 and step % every == 0
        if due or self._guard.stopping or step == self._config.max_steps:
            with self._clock.other("checkpoint", step, every):
                self._save(trainer, step)
        if self._guard.stopping:
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        path = checkpoint_path(self._directory, step)
        partial = path.with_name(path.name + PARTIAL)
        if trainer.is_global_zero:
            for leftover in self._directory.glob(f"step_*{PARTIAL}"):
                shutil.rmtree(leftover)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial)
        if self._average is not None:
            self._average.save(partial)
        trainer.strategy.barrier()
        write_listing(partial)
        if trainer.is_global_zero:
            os.replace(partial, path)
            forget_damaged(self._directory)
            for old in complete_checkpoints(self._directory)[: -self._config.keep_checkpoints]:
                shutil.rmtree(old)
            log.info("checkpoint %s", path.name)
        trainer.strategy.barrier()


# ---- training -----------------------------------------------------------------------------------------------------


class OneEpoch:
    """A loader that never ends, seen by Lightning as one epoch of known length.

    The length keeps Lightning from fetching a batch ahead, so the loader's state in a checkpoint is exact, and
    accumulation never meets the end of an epoch.
    """

    def __init__(self, loader: Any, num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)


def silence() -> None:
    """Keep what concerns only the libraries' own authors out of the log; some of it came with every step."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="When saving the DeepSpeed Stage 3 checkpoint")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")


@dataclass
class FitResult:
    """finished: False when it stopped after a SIGTERM. metrics: those of the last log interval."""

    finished: bool
    metrics: dict[str, float]


def fit(
    module: pl.LightningModule,
    loader: Any,
    trainer_config: TrainerConfig,
    optim: OptimConfig,
    metrics: MetricsLogger,
    run_dir: Path,
    device_type: str,
    monitors: list[pl.Callback],
    clock: StepClock,
    average: WeightAverage | None = None,
) -> FitResult:
    """Train up to max_steps, from the latest checkpoint under run_dir/checkpoints where there is one.

    module: keeps `loss_sum` as DecoderModule does. loader: yields this rank's micro batches without end and has
    `state_dict` and `load_state_dict`; its state has to be the same on all ranks. metrics: closed at the end.
    monitors: callbacks that come after the metrics of a step and before its checkpoint. clock: the one that they time
    their work with. average: kept up to date.
    Raises UserError when the loss is not finite, and when a loader process was killed, after a checkpoint.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    accumulation = trainer_config.accumulation(world_size)
    checkpoint = latest_checkpoint(run_dir)
    start_step = checkpoint_step(checkpoint) if checkpoint else 0
    stop_request = StopRequest()
    loader.on_death = stop_request.on_death
    guard = StepGuard(stop_request)
    step_metrics = StepMetrics(guard, metrics, trainer_config, start_step, clock)
    averaging = [Averaging(average, checkpoint)] if average is not None else []
    checkpoints = StepCheckpoints(guard, run_dir / CHECKPOINTS, trainer_config, clock, average)
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    if trainer_config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    silence()
    trainer = pl.Trainer(
        accelerator=device_type,
        devices=1,
        num_nodes=world_size,  # each process is a machine of its own to Lightning: it sees one device
        strategy=AnyDeviceDeepSpeedStrategy(config=deepspeed_config(trainer_config, num_parameters, device_type)),
        # Named, because inside a Slurm job Lightning would take the job's task count for the world size.
        plugins=[TorchElasticEnvironment()],
        precision=PRECISIONS[trainer_config.precision],
        max_steps=trainer_config.max_steps,
        accumulate_grad_batches=accumulation,
        gradient_clip_val=optim.max_grad_norm or None,
        callbacks=[guard, NewPlan(), step_metrics, *averaging, *monitors, checkpoints],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )
    log.info(
        "%d parameters in %s, %d processes, %d x %d samples per pass, ZeRO stage %d, step %d of %d",
        num_parameters,
        trainer_config.precision,
        world_size,
        world_size,
        trainer_config.micro_batch_size,
        trainer_config.zero_stage,
        start_step,
        trainer_config.max_steps,
    )
    try:
        trainer.fit(
            module, OneEpoch(loader, trainer_config.max_steps * accumulation), ckpt_path=str(checkpoint or "") or None
        )
    finally:
        metrics.close()
    if stop_request.death and trainer.global_step < trainer_config.max_steps:
        raise UserError(after_death(stop_request.death, trainer.global_step))
    if start_step >= trainer_config.max_steps and averaging:
        averaging[0].start()  # no step was left to train, so nothing has loaded it
    return FitResult(trainer.global_step >= trainer_config.max_steps, step_metrics.last)
