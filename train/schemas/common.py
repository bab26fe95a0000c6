"""Config sections that several stages share. Names, types and units live here; values live in configs/."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from data.mixture.quarantine import LeftOut, read_left_out
from data.mixture.rehearsal import SHIPPED_ROWS, with_rehearsal
from data.mixture.spec import MixtureSpec, load_mixture
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import FluxGeometry, VaeGeometry, tokens_per_side

# Marks on a field's type. PATH: made absolute when composed; its content enters fingerprints, its place does not.
# Of a list, each. RUNTIME: changes how a stage runs and not what it makes; left out of fingerprints.
PATH = "path"
RUNTIME = "runtime"
# launch.kind -> keys that do nothing there
WITHOUT_EFFECT = {
    "local": ("rendezvous", "timeout_minutes", "partition"),
    "torchrun": ("timeout_minutes", "partition"),
    "slurm": ("rendezvous",),
}
PathStr = Annotated[str, PATH]
PathList = Annotated[list[str], PATH]


def one_of(key: str, value: Any, *valid: Any) -> None:
    if value not in valid:
        raise UserError(f"{key} is {value!r}; valid: {', '.join(map(repr, valid))}")


def positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise UserError(f"{section}.{name} is {getattr(config, name)}; it must be above 0")


def not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise UserError(f"{section}.{name} is {getattr(config, name)}; it must be 0 or more")


def share(section: str, config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) <= 1:
        raise UserError(f"{section}.{name} is {getattr(config, name)}; it is a share from 0 to 1")


@dataclass
class LaunchConfig:
    """Where the processes of a stage run.

    kind: local (this machine), torchrun (the same command started on every machine) or slurm (submitted).
    device: auto takes CUDA where there is one. threads_per_process: intra-op threads on a CPU; 0 shares the cores out.
    rendezvous: host:port of the first machine (torchrun). timeout_minutes, partition: slurm only.
    """

    kind: str
    num_nodes: int
    processes_per_node: int
    device: str
    threads_per_process: int
    rendezvous: str
    timeout_minutes: int
    partition: str

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.processes_per_node

    def check(self) -> None:
        one_of("launch.kind", self.kind, *WITHOUT_EFFECT)
        one_of("launch.device", self.device, "auto", "cpu", "cuda")
        positive("launch", self, "num_nodes", "processes_per_node")
        not_negative("launch", self, "threads_per_process", "timeout_minutes")
        for name in WITHOUT_EFFECT[self.kind]:
            if getattr(self, name):
                raise UserError(f"launch.{name} has no effect with launch.kind {self.kind}; leave it out")
        if self.kind == "local" and self.num_nodes != 1:
            raise UserError(
                f"launch.num_nodes is {self.num_nodes} with launch.kind local; use launch=torchrun or launch=slurm"
            )
        if self.kind == "torchrun" and self.num_nodes > 1 and ":" not in self.rendezvous:
            raise UserError("launch.rendezvous must be host:port of the first machine when launch.num_nodes is above 1")


@dataclass
class LoggerConfig:
    """Local files (metrics.jsonl) are always written; these come on top.

    wandb_mode: disabled, offline (no account needed; `wandb sync` uploads later) or online.
    """

    tensorboard: bool
    wandb_mode: str
    wandb_project: str

    def check(self) -> None:
        one_of("logger.wandb_mode", self.wandb_mode, "disabled", "offline", "online")


@dataclass
class OptimConfig:
    """name: adamw, or muon for the matrices of repeated blocks (AdamW for the rest), which learns from fewer samples
    and keeps whole matrices on every process: ZeRO stage 0. betas: AdamW's. schedule: constant, cosine or linear after
    the warmup. max_grad_norm: 0 switches clipping off.
    """

    name: str
    learning_rate: float
    weight_decay: float
    betas: list[float]
    warmup_steps: int
    schedule: str
    max_grad_norm: float

    def check(self, trainer: "TrainerConfig") -> None:
        one_of("optim.name", self.name, "adamw", "muon")
        if self.name == "muon" and (trainer.zero_stage or trainer.precision == "bfloat16"):
            raise UserError(
                f"optim.name=muon looks at whole matrices in float32 on every process, and trainer.zero_stage is "
                f"{trainer.zero_stage}, trainer.precision {trainer.precision}; set trainer.zero_stage=0 and float32 or "
                "tf32, or optim.name=adamw"
            )
        one_of("optim.schedule", self.schedule, "constant", "cosine", "linear")
        positive("optim", self, "learning_rate")
        not_negative("optim", self, "weight_decay", "warmup_steps", "max_grad_norm")
        if len(self.betas) != 2:
            raise UserError(f"optim.betas has {len(self.betas)} numbers; AdamW takes 2")


@dataclass
class TrainerConfig:
    """How long and in which pieces a stage trains; accumulation is derived from the two batch sizes.

    precision: float32, tf32 (float32 weights, products of matrices at the speed of TF32 on a GPU) or bfloat16.
    zero_stage: DeepSpeed's ZeRO stage. checkpoint_every_steps: 0 keeps only the last. num_workers: loader processes
    per rank.
    """

    precision: str
    zero_stage: int
    micro_batch_size: int
    global_batch_size: int
    max_steps: int
    gradient_checkpointing: bool
    checkpoint_every_steps: Annotated[int, RUNTIME]
    keep_checkpoints: Annotated[int, RUNTIME]
    log_every_steps: Annotated[int, RUNTIME]
    num_workers: Annotated[int, RUNTIME]

    def accumulation(self, world_size: int) -> int:
        """Micro batches per optimizer step; UserError when the batch sizes do not divide."""
        per_pass = self.micro_batch_size * world_size
        if self.global_batch_size % per_pass:
            below = self.global_batch_size // per_pass * per_pass
            valid = " and ".join(str(size) for size in (below, below + per_pass) if size)
            raise UserError(
                f"trainer.global_batch_size {self.global_batch_size} is not a multiple of micro batch "
                f"{self.micro_batch_size} x {world_size} processes; {valid} would do"
            )
        return self.global_batch_size // per_pass

    def check(self, world_size: int, by_steps: bool = True) -> None:
        one_of("trainer.precision", self.precision, "float32", "tf32", "bfloat16")
        one_of("trainer.zero_stage", self.zero_stage, 0, 1, 2, 3)
        positive("trainer", self, "micro_batch_size", "global_batch_size", "log_every_steps", "keep_checkpoints")
        not_negative("trainer", self, "checkpoint_every_steps", "num_workers")
        if by_steps:
            positive("trainer", self, "max_steps")
        self.accumulation(world_size)


@dataclass
class AverageConfig:
    """An exponential moving average of the weights, in float32. decay: per step, rising to this value; 0 keeps none.

    export: which weights become the artifact and are measured on held-out data, `average` or `raw`. initial: share of
    the weights that training began with in the exported average: a finetuned model keeps more of what it knew.
    """

    decay: float
    export: str
    initial: float

    def check(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"average.decay is {self.decay}; it must be from 0 to below 1")
        one_of("average.export", self.export, "average", "raw")
        if self.export == "average" and self.decay == 0:
            raise UserError("average.export is 'average' and average.decay 0 keeps none; give a decay such as 0.999")
        if not 0 <= self.initial < 1:
            raise UserError(f"average.initial is {self.initial}; it is a share from 0 to below 1")
        if self.initial and self.export == "raw":
            raise UserError(
                f"average.initial {self.initial} has no effect with average.export=raw; give average instead"
            )


@dataclass
class HeldoutConfig:
    """Loss on held-out samples. every_steps: 0 measures after the last step only. num_samples: 0 measures nothing."""

    every_steps: Annotated[int, RUNTIME]
    num_samples: int

    def check(self) -> None:
        not_negative("heldout", self, "every_steps", "num_samples")


@dataclass
class SamplesConfig:
    """Grids of pictures painted during training. every_steps: 0 paints after the last step only."""

    every_steps: int
    num_pictures: int

    def check(self) -> None:
        not_negative("samples", self, "every_steps", "num_pictures")


@dataclass
class QwenConfig:
    """The autoregressive side: a Qwen2.5-VL or Nexus-Gen checkpoint directory; geometry is in its config.json."""

    qwen: PathStr


@dataclass
class TargetConfig:
    """num_target_tokens: of a picture that the model makes, a square: 81 as released, seen in 252 px at patch 14.

    A plain Qwen2.5-VL gets as many prefill embeddings; checkpoints, shards and decoders made from it keep the number.
    """

    num_target_tokens: int

    def check(self) -> None:
        try:
            tokens_per_side(self.num_target_tokens)
        except ValueError as error:
            raise UserError(f"model.num_target_tokens: {error}") from error


@dataclass
class PretrainModelConfig(TargetConfig, QwenConfig):
    """What pretraining begins with."""


@dataclass
class DiffusionConfig:
    """The painting side. flux: a FLUX.1-dev directory. image_size: pixels per side that the decoders paint."""

    transformer: FluxGeometry
    vae: VaeGeometry
    image_size: int
    flux: PathStr

    def check(self) -> None:
        unit = self.vae.downscale * self.transformer.patch_size
        if self.image_size % unit:
            raise UserError(
                f"model.image_size {self.image_size} is not a multiple of {unit} (VAE {self.vae.downscale} x patch)"
            )
        head_width = self.transformer.hidden_size // self.transformer.num_heads
        if sum(self.transformer.rope_axes_dim) != head_width:
            raise UserError(
                f"model.transformer.rope_axes_dim sums to {sum(self.transformer.rope_axes_dim)}; "
                f"the head width is {head_width}"
            )
        if self.vae.latent_channels != self.transformer.latent_channels:
            raise UserError(
                f"model.vae.latent_channels {self.vae.latent_channels} differs from "
                f"model.transformer.latent_channels {self.transformer.latent_channels}"
            )


@dataclass
class ModelConfig(DiffusionConfig, QwenConfig):
    """Both sides."""


@dataclass
class TrainRowsConfig:
    """train: a message dataset (a file, a pattern, a folder) or a mixture. quarantine: files of rows that are left out,
    as `nexus-gen data check` and training write them, or directories of such. picture_root: the directory that picture
    paths of rows are relative to; empty for that of the file that names them. A source of a mixture may give its own.
    """

    train: PathStr
    quarantine: PathList
    picture_root: PathStr = field(default="", kw_only=True)

    splits: ClassVar[tuple[str, ...]] = ("train",)

    def dataset(self, split: str) -> MixtureSpec:
        """Where the rows of a split come from; no rows are read. Raises UserError."""
        return load_mixture(getattr(self, split), self.picture_root)

    def left_out(self, *splits: str) -> LeftOut:
        """The rows of these splits, of all unless given, that are quarantined; reads them. Raises UserError."""
        if not self.quarantine:
            return LeftOut()
        files = [file for split in splits or self.splits for file in self.dataset(split).files]
        return read_left_out(self.quarantine, list(dict.fromkeys(files)))


@dataclass
class RowsConfig(TrainRowsConfig):
    """heldout: a message dataset or a mixture, as train.

    rehearsal: share of the training rows, from 0 to below 1, that are of what the initial checkpoint was trained on.
    rehearsal_rows: where these are, a message dataset or a mixture; empty for those of the shipped weights.
    """

    heldout: PathStr
    rehearsal: float = field(default=0.0, kw_only=True)
    rehearsal_rows: PathStr = field(default="", kw_only=True)

    splits: ClassVar[tuple[str, ...]] = ("train", "heldout")

    @property
    def rehearsal_file(self) -> Path:
        return Path(self.rehearsal_rows or SHIPPED_ROWS)

    def dataset(self, split: str) -> MixtureSpec:
        own = super().dataset(split)
        if split != "train" or not self.rehearsal:
            return own
        return with_rehearsal(own, load_mixture(self.rehearsal_file, self.picture_root), self.rehearsal)

    def check(self) -> None:
        if not 0 <= self.rehearsal < 1:
            raise UserError(f"data.rehearsal is {self.rehearsal}; it is a share from 0 to below 1")
        if self.rehearsal_rows and not self.rehearsal:
            raise UserError(
                "data.rehearsal_rows has no effect with data.rehearsal 0; give a share, data.rehearsal=0.15"
            )


@dataclass
class MessagesConfig(RowsConfig):
    """What pretraining reads. max_pixels bounds user-side images.

    max_length: tokens of a row after image resizing; a longer row is bad, never cut. max_bad_fraction: of the rows read
    so far (a thousand at least); bad rows are quarantined and replaced, and past this rate the run stops.
    num_epochs: passes over the dataset, or epochs of the mixture. token_budget: tokens to train on, of resized pictures
    too and without padding. Each in place of trainer.max_steps; of the three, two are 0. dynamic_targets: target images
    keep their aspect about, in grids of at most model.num_target_tokens. consistent_edit_scale: pictures of user turns
    are seen in the size of the target image that follows.
    """

    max_length: int
    max_pixels: int
    dynamic_targets: bool
    consistent_edit_scale: bool
    max_bad_fraction: Annotated[float, RUNTIME]
    num_epochs: float
    token_budget: int
