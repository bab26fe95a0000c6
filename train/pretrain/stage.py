"""The pretrain stage: Qwen2.5-VL learns to understand, generate and edit pictures, on ms-swift's trainer.

Run by `python -m train.worker runs/<name>/pretrain/config.yaml`, under torchrun for one process too. DeepSpeed carries
every ZeRO stage, 0 included: its checkpoints name weights as they are in memory, where the trainer's own would hold
them under the names of the layout on disk and load nothing.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before transformers and swift are imported, which read them then: a checkpoint is a local directory.
os.environ.update({"HF_HUB_OFFLINE": "1", "USE_HF": "1", "LOG_LEVEL": "WARNING"})

import deepspeed
import torch
from swift.dataloader.shard import DataLoaderShard
from swift.pipelines.train.sft import SwiftSft
from swift.utils import to_device
from torch import Tensor
from transformers import ProgressCallback
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils.logging import disable_progress_bar

import train.steps.deepspeed_mends  # noqa: F401
from data.mixture.order import Mixture
from data.mixture.wording import trained_wording
from data.shards.loader_processes import batches
from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.language.checkpoint import load_config, load_generation_config, save_autoregressive
from nexus_gen.language.model import TARGET_INPUTS, LossWeights
from nexus_gen.language.tower_cache import TOWER_CACHE_BYTES, TowerCache
from nexus_gen.parts.wording import Wording
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import patches_per_side
from train.preflight.rows import dataset_of, left_out_of
from train.pretrain.callbacks import (
    Averaging,
    HeldoutLoss,
    NewPlan,
    StepCheckpoints,
    StepGuard,
    StepMetrics,
    remove_incomplete_checkpoints,
)
from train.pretrain.plugin import MATRICES_BY_MUON, NAME
from train.pretrain.stream import MessageStream, Quarantine
from train.runs.checkpoints import checkpoint_step, complete_checkpoints, tokens_seen
from train.runs.directory import CHECKPOINTS, QUARANTINE
from train.runs.failures import after_death
from train.runs.lengths import continued, shorter
from train.schemas.common import OptimConfig
from train.schemas.pretrain import PretrainConfig
from train.stage import Stage
from train.steps.average import WeightAverage
from train.steps.clock import StepClock
from train.steps.metrics import MetricsLogger, latest
from train.steps.retention import set_damaged_aside

log = logging.getLogger(__name__)

HELDOUT_SEED = 0  # of the order of held-out rows, in every run
DECAYS: dict[str, Callable[[float], float]] = {  # over a budget of tokens, by the share of it that is spent
    "constant": lambda spent: 1.0,
    "cosine": lambda spent: 0.5 * (1.0 + math.cos(math.pi * spent)),
    "linear": lambda spent: 1.0 - spent,
}
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


class PretrainStage(Stage[PretrainConfig]):
    def run(self) -> bool:
        """Train on from the latest checkpoint, or from model.qwen, and export; False when a SIGTERM ended training."""
        config = self.config
        keep_swift_logs(self.run_dir / "log" / f"swift-rank{self.rank}.log")
        self.start_process_group()
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)
        if config.trainer.precision == "tf32":
            torch.set_float32_matmul_precision("high")

        checkpoints = self.run_dir / CHECKPOINTS
        if self.rank == 0:
            remove_incomplete_checkpoints(checkpoints)
            set_damaged_aside(complete_checkpoints(checkpoints), checkpoint_step)
        self.barrier()
        mixture, heldout = self.from_rank_zero(self._mixtures)
        rows = {"train": row_counts(mixture), "heldout": row_counts(heldout)}
        if config.data.quarantine and self.rank == 0:
            for split, counts in rows.items():
                of_split = (counts[name] for name in ("rows", "used", "quarantined"))
                log.info("%s: %d rows = %d used + %d quarantined", split, *of_split)
        config = config.with_steps(mixture.epoch_rows)
        budget, before = config.data.token_budget, complete_checkpoints(checkpoints)
        done = checkpoint_step(before[-1]) if before else 0
        if budget and before and tokens_seen(before[-1]) >= budget:  # only the artifact is missing
            config = replace(config, trainer=replace(config.trainer, max_steps=done))
        if done > config.trainer.max_steps:  # of epochs; the launcher compared what needs no rows to be counted
            epochs = done * config.trainer.global_batch_size / mixture.epoch_rows
            raise UserError(shorter(config.stage, "data.num_epochs", config.data.num_epochs, epochs))
        wording = trained_wording(mixture, Path(config.model.qwen)) if self.rank == 0 else Wording()
        for name, kind in wording.recorded().items():
            log.info("prompts (%s) are to be worded as rows are: %s", name, kind)
        pipeline = PretrainPipeline(config, mixture, heldout, self.rank, self.world_size, self.device_type)
        pipeline.main()
        if not pipeline.finished:
            return False
        weights = pipeline.gather_weights()

        def export(directory: Path) -> dict[str, Any]:
            pipeline.restore_config()
            save_autoregressive(pipeline.model, directory, processor_from=config.model.qwen, state_dict=weights)
            wording.save(directory)
            return {
                "max_pixels": config.data.max_pixels,
                "consistent_edit_scale": config.data.consistent_edit_scale,
                "dynamic_targets": config.data.dynamic_targets,
                "max_length": config.data.max_length,
                "hidden_size": pipeline.model.config.get_text_config().hidden_size,
                "target_grid": patches_per_side(config.model.num_target_tokens),
                "steps": pipeline.trainer.state.global_step,
                "tokens": pipeline.guard.tokens_seen,
                "rows": rows,
                **continued(checkpoints),
                # Throughput stays in metrics.jsonl: details enter the artifact's fingerprint.
                "metrics": latest(self.run_dir, "train/") | latest(self.run_dir, "heldout/"),
            }

        self.write_artifact(export)
        return True

    def _mixtures(self) -> tuple[Mixture, Mixture]:
        """Training and held-out rows. Reading files through for them takes minutes for a million rows of tars."""
        data = self.config.data
        left_out = left_out_of(data)
        train = Mixture(dataset_of(data, "train"), self.config.seed, left_out)
        return train, Mixture(dataset_of(data, "heldout"), HELDOUT_SEED, left_out)


def row_counts(mixture: Mixture) -> dict[str, int]:
    """Rows of a dataset as the mixture takes them: rows = used + quarantined before training.

    rehearsal: rows that are not the dataset's own and that training draws from besides.
    """
    used, quarantined = mixture.own_rows, mixture.num_left_out
    rehearsal = {"rehearsal": mixture.rehearsal_rows} if mixture.rehearsal_rows else {}
    return {"rows": used + quarantined, "used": used, "quarantined": quarantined, **rehearsal}


class PretrainPipeline(SwiftSft):
    """Swift's own pipeline, with our dataset order and our callbacks; the loss is the model's.

    finished: after `main()`, whether all steps are done; a SIGTERM ends training before.
    """

    def __init__(
        self, config: PretrainConfig, mixture: Mixture, heldout: Mixture, rank: int, world_size: int, device_type: str
    ) -> None:
        self.config = config
        self.mixture, self.heldout = mixture, heldout
        self.rank = rank
        self.world_size = world_size
        self.accumulation = config.trainer.accumulation(world_size)
        self.finished = False
        self.average: WeightAverage | None = None
        self.checkpoints = complete_checkpoints(config.run_dir / CHECKPOINTS)
        self.start_step = checkpoint_step(self.checkpoints[-1]) if self.checkpoints else 0
        self.metrics = MetricsLogger(config.run_dir, config.logger, rank, self.start_step)
        deepspeed_path = config.run_dir / "log" / "deepspeed.json"
        if rank == 0:
            settings = deepspeed_config(config.trainer.zero_stage, device_type)
            write_text_atomic(deepspeed_path, json.dumps(settings, indent=1) + "\n")
        torch.distributed.barrier()
        super().__init__(swift_arguments(config, self.accumulation, deepspeed_path, device_type))

    def _prepare_model_tokenizer(self, **kwargs: Any) -> None:
        """Load whole weights on the CPU under ZeRO-3 too: strict loading compares shapes, which partitions lack."""
        hf_config = self.args.training_args.hf_deepspeed_config
        unset_hf_deepspeed_config()
        num_target_tokens = self.config.model.num_target_tokens
        super()._prepare_model_tokenizer(init_seed=self.config.seed, num_target_tokens=num_target_tokens, **kwargs)
        assert self.model.num_target_tokens == num_target_tokens  # the launcher compared them
        set_hf_deepspeed_config(hf_config)
        objective = self.config.objective
        self._describe_inputs()
        freeze, zero_stage = self.config.freeze, self.config.trainer.zero_stage
        # Under ZeRO-3 every process has to run the tower when another does; a GPU is faster than the hashing.
        if self.args.training_args.use_cpu and freeze.vision and freeze.merger and zero_stage < 3:
            self.model.tower_cache = TowerCache(TOWER_CACHE_BYTES)
            log.info("up to %.0f MB of the frozen vision tower's embeddings are remembered", TOWER_CACHE_BYTES / 1e6)
        self.model.loss_weights = LossWeights(
            objective.text_loss_weight, objective.image_loss_weight, 1 - objective.cosine_fraction
        )

    def _prepare_dataset(self) -> list[Any]:
        """Rows straight from their files: swift would copy them into a cache outside the run."""
        data, trainer = self.config.data, self.config.trainer
        self.template.dynamic_targets = data.dynamic_targets
        self.template.consistent_edit_scale = data.consistent_edit_scale
        self.template.num_target_tokens = self.config.model.num_target_tokens
        mixture = self.mixture
        num_samples = trainer.max_steps * trainer.global_batch_size
        for source, count in zip(mixture.spec.sources, mixture.counts, strict=True):
            log.info("%d rows of an epoch from %s", count, source.path)
        if data.rehearsal:
            log.info(
                "rehearsal: %d of %d rows of an epoch are of what the initial checkpoint was trained on",
                mixture.epoch_rehearsal,
                mixture.epoch_rows,
            )
        epochs = num_samples / mixture.epoch_rows
        if data.token_budget:
            log.info(
                "%d tokens, in as many steps as that takes; an epoch has %d rows", data.token_budget, mixture.epoch_rows
            )
        else:
            log.info("%d steps are %.2f epochs of %d rows", trainer.max_steps, epochs, mixture.epoch_rows)
        self.quarantine = self._quarantine(mixture)
        stream = MessageStream(
            mixture,
            self.template.encode,
            self.quarantine,
            num_samples=num_samples,
            micro_batch_size=trainer.micro_batch_size,
            world_size=self.world_size,
        )
        return [stream, None]

    def _quarantine(self, mixture: Mixture, *inside: str) -> Quarantine:
        return Quarantine(
            self.config.run_dir.joinpath(QUARANTINE, *inside),
            self.rank,
            max_bad_fraction=self.config.data.max_bad_fraction,
            num_rows=len(mixture),
        )

    def _heldout_batches(self) -> list[dict[str, Tensor]]:
        """The first held-out rows of an order that never changes, collated."""
        mixture = self.heldout
        count, size = min(self.config.heldout.num_samples, len(mixture)), self.config.trainer.micro_batch_size
        quarantine = self._quarantine(mixture, "heldout")
        stream = MessageStream(
            mixture, self.template.encode, quarantine, num_samples=count, micro_batch_size=1, world_size=1
        )
        return [
            self.template.data_collator([stream[index] for index in range(first, min(first + size, count))])
            for first in range(0, count, size)
        ]

    def train(self, trainer: Any) -> dict[str, Any]:
        """Train on from the latest complete checkpoint."""
        config = self.config
        directory = config.run_dir / CHECKPOINTS
        checkpoints, start_step, metrics = self.checkpoints, self.start_step, self.metrics
        budget = config.data.token_budget
        self.guard = guard = StepGuard(self.accumulation, start_step, self.model.config.image_token_id, budget)
        if budget:
            schedule_by_tokens(trainer, guard, config.optim)
        clock = StepClock()
        step_metrics = StepMetrics(
            guard, metrics, config.trainer, lambda: trainer.optimizer.param_groups[0]["lr"], clock
        )
        # DeepSpeed's own files hold the weights; swift's copy would gather them all and take their space once more.
        trainer.save_model = lambda *args, **kwargs: None
        trainer.remove_callback(ProgressCallback)  # swift's; it prints every log as a dict
        trainer.add_callback(step_metrics)
        trainer.add_callback(NewPlan())
        if config.average.decay:
            kept = config.average
            self.average = WeightAverage(self.model, kept.decay, self.rank, self.world_size, kept.initial)
            trainer.add_callback(Averaging(self.average, directory))
        generates = not config.data.dynamic_targets  # pictures of one grid are generated together
        trainer.add_callback(
            HeldoutLoss(
                guard,
                self.model,
                self._heldout_batches(),
                metrics,
                config.heldout,
                self.exported_average,
                self.template.prepared,
                generates,
                clock,
            )
        )
        trainer.add_callback(StepCheckpoints(guard, directory, config.trainer, clock))
        self.template.on_loss = guard.on_loss
        self.trainer = trainer
        parameters = list(self.model.parameters())
        log.info(
            "%d parameters in %s, %d of them trained, %d processes, %d samples per pass and process, ZeRO stage %d, "
            "step %d of %s",
            sum(parameter.numel() for parameter in parameters),
            config.trainer.precision,
            sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            self.world_size,
            config.trainer.micro_batch_size,
            config.trainer.zero_stage,
            start_step,
            config.trainer.max_steps if not budget else f"{budget} tokens",
        )
        guard.listen()
        deaths: list[str] = []

        def on_death(death: str) -> None:
            deaths.append(death)
            guard.interrupted = True

        make_loader = trainer.get_train_dataloader
        trainer.get_train_dataloader = lambda *args, **kwargs: surviving(make_loader(*args, **kwargs), on_death)
        try:
            trainer.train(str(checkpoints[-1]) if checkpoints else None)
        finally:
            metrics.close()
        self.finished = guard.is_last(trainer.state)
        if deaths and not self.finished:
            raise UserError(after_death(deaths[0], trainer.state.global_step))
        step, rows = trainer.state.global_step, trainer.state.global_step * config.trainer.global_batch_size
        epochs = rows / self.mixture.epoch_rows
        log.info("trained on %d tokens of %d rows in %d steps, %.2f epochs", guard.tokens_seen, rows, step, epochs)
        if num_bad := len(self.quarantine):
            log.warning("%d rows were bad and others took their places; %s names them", num_bad, QUARANTINE)
        return {}

    def restore_config(self) -> None:
        """Give the model back the settings of the checkpoint: swift switches caching off and caps generated tokens."""
        qwen = Path(self.config.model.qwen)
        self.model.config = load_config(qwen)
        self._describe_inputs()
        self.model.generation_config = load_generation_config(qwen, self.model.config)

    def _describe_inputs(self) -> None:
        """Generation has to feed what training fed, so the checkpoint's config says it; the published has no key."""
        config: Any = self.model.config
        if self.config.objective.target_inputs != TARGET_INPUTS[0] or hasattr(config, "target_inputs"):
            config.target_inputs = self.config.objective.target_inputs

    @property
    def exported_average(self) -> WeightAverage | None:
        """The average, where it and not the trained weights is measured and exported."""
        return self.average if self.config.average.export == "average" else None

    def gather_weights(self) -> dict[str, Tensor]:
        """The whole weights to export on rank zero, by their names in memory; every rank has to call it."""
        weights = self.trainer.accelerator.get_state_dict(self.trainer.deepspeed)
        if self.exported_average is not None:
            averaged = self.exported_average.gather()  # of what is trained
            weights = {**weights, **averaged} if self.rank == 0 else weights
        return weights


class SurvivingLoader(DataLoaderShard):
    """Swift's loader, whose batches come to the end whatever happens to its processes."""

    on_death: Callable[[str], None]

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(self, self.on_death):
            yield to_device(batch, self.device) if self.device else batch


def surviving(loader: Any, on_death: Callable[[str], None]) -> Any:
    """The loader as a SurvivingLoader; swift names its class in the middle of its own code."""
    assert type(loader) is DataLoaderShard
    loader.__class__, loader.on_death = SurvivingLoader, on_death
    return loader


def schedule_by_tokens(trainer: Any, guard: StepGuard, optim: OptimConfig) -> None:
    """Let the learning rate follow the budget of tokens: warmed up by steps, and decayed by the share that is spent.

    Swift makes its own schedule, by steps, when training starts; here they are only a bound.
    """
    create = trainer.create_scheduler

    def factor(step: int) -> float:
        warmup = min(1.0, step / optim.warmup_steps) if optim.warmup_steps else 1.0
        return warmup * DECAYS[optim.schedule](guard.spent)

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = create(num_training_steps, optimizer)
        scheduler.lr_lambdas = [factor for _ in scheduler.base_lrs]
        return scheduler

    trainer.create_scheduler = create_scheduler


def swift_arguments(config: PretrainConfig, accumulation: int, deepspeed_path: Path, device_type: str) -> list[str]:
    """The command line of `swift sft` that this config stands for."""
    trainer, optim = config.trainer, config.optim
    in_bfloat16 = trainer.precision == "bfloat16"
    values: dict[str, Any] = {
        "model": config.model.qwen,
        "model_type": NAME,
        "template": NAME,
        "tuner_type": "full",
        "torch_dtype": "bfloat16" if in_bfloat16 else "float32",
        "bf16": in_bfloat16,
        "fp16": False,  # float32 weights would mean float16 autocast
        "use_cpu": device_type == "cpu",
        "freeze_llm": False,
        "freeze_vit": config.freeze.vision,
        "freeze_aligner": config.freeze.merger,
        "dataset": config.data.train,
        "max_length": config.data.max_length,
        "max_pixels": config.data.max_pixels,
        "train_dataloader_shuffle": False,  # the stream is in training order
        "dataloader_num_workers": trainer.num_workers,
        # They ignore SIGTERM (see MessageStream): at the end of the stage the interpreter would wait for them for ever.
        "dataloader_persistent_workers": False,
        "seed": config.seed,
        "per_device_train_batch_size": trainer.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": trainer.max_steps,
        "gradient_checkpointing": trainer.gradient_checkpointing,
        "vit_gradient_checkpointing": trainer.gradient_checkpointing and not config.freeze.vision,
        "learning_rate": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "lr_scheduler_type": SCHEDULES[optim.schedule],
        "warmup_steps": optim.warmup_steps,
        "max_grad_norm": optim.max_grad_norm,
        "deepspeed": deepspeed_path,
        "output_dir": config.run_dir / CHECKPOINTS,
        "add_version": False,
        "save_strategy": "no",  # StepCheckpoints decides when
        "logging_strategy": "no",  # and StepMetrics
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "check_model": False,  # would ask a hub whether a newer one exists
    }
    if optim.name == "muon":
        values["optimizer"] = MATRICES_BY_MUON
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def deepspeed_config(zero_stage: int, device_type: str) -> dict[str, Any]:
    """DeepSpeed's settings; `auto` is filled in by transformers from the arguments and the model's width."""
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": device_type == "cuda",  # there are no streams to overlap on a CPU
        "reduce_bucket_size": "auto",
    }
    if zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    return {
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 1 << 62,  # metrics are ours
    }


def keep_swift_logs(path: Path) -> None:
    """Send the hundreds of lines that swift and its libraries log into a file; warnings still reach the console."""
    disable_progress_bar()
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.NOTSET)  # importing swift raised it to ERROR
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("swift", "modelscope", "transformers", "deepspeed", "DeepSpeed", "accelerate", "py.warnings"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(to_file)
        logger.propagate = False
    logging.getLogger("swift").setLevel(logging.INFO)
    logging.captureWarnings(True)
