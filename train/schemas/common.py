"""Marks on keys, checks of values, and the config sections of how stages run and train. Values live in configs/."""

from typing import Annotated, Any

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.keys import described, key

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


@described
class LaunchConfig:
    """Where the processes of a stage run."""

    kind: str = key(
        "How processes start: local (on this machine), torchrun (the same command on each machine) or slurm (submitted)"
    )
    num_nodes: int = key("Machines that processes run on", "machines")
    processes_per_node: int = key("Processes on each machine, one per GPU where there are GPUs", "processes")
    device: str = key("Device of each process: auto (CUDA where there is one), cuda or cpu")
    threads_per_process: int = key(
        "Threads of a process within one operation on a CPU; 0 shares the cores out", "threads"
    )
    rendezvous: str = key("Address of the first machine, host:port; torchrun only")
    timeout_minutes: int = key("Time limit of the job; slurm only", "minutes")
    partition: str = key("Partition that the job is submitted to, empty for the default one; slurm only")

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


@described
class LoggerConfig:
    """Where metrics go besides the local metrics.jsonl, which is always written."""

    tensorboard: bool = key("Whether to write event files for TensorBoard")
    wandb_mode: str = key(
        "Weights & Biases: disabled, offline (no account needed; `wandb sync` uploads later) or online"
    )
    wandb_project: str = key("Project at Weights & Biases that runs are listed under")

    def check(self) -> None:
        one_of("logger.wandb_mode", self.wandb_mode, "disabled", "offline", "online")


@described
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = key(
        "Optimizer: adamw, or muon for the matrices of repeated blocks and AdamW for the rest, which learns from fewer "
        "samples and keeps whole matrices on every process (ZeRO stage 0)"
    )
    learning_rate: float = key("Highest learning rate, reached at the end of the warmup")
    weight_decay: float = key("Weight decay; a step takes learning_rate times this from each decayed weight")
    betas: list[float] = key("AdamW's decay rates of the first and the second moment")
    warmup_steps: int = key("Steps over which the learning rate rises from 0", "steps")
    schedule: str = key("Learning rate after the warmup: constant, cosine or linear (both fall to 0)")
    max_grad_norm: float = key("Norm that gradients are clipped to; 0 switches clipping off")

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


@described
class TrainerConfig:
    """How long and in which pieces a stage trains; accumulation is derived from the two batch sizes."""

    precision: str = key(
        "Precision of training: float32, tf32 (float32 weights, matrix products in TF32 on a GPU) or bfloat16"
    )
    zero_stage: int = key(
        "DeepSpeed's ZeRO stage, 0 to 3: what of optimizer, gradients and weights is split over processes"
    )
    micro_batch_size: int = key("Samples in one forward and backward pass of a process", "samples")
    global_batch_size: int = key("Samples in an optimizer step of all processes together", "samples")
    max_steps: int = key(
        "Optimizer steps that the stage trains; 0 in pretrain where epochs or tokens set the length", "steps"
    )
    gradient_checkpointing: bool = key("Whether to recompute activations in the backward pass: less memory, more time")
    checkpoint_every_steps: Annotated[int, RUNTIME] = key(
        "Steps between checkpoints; 0 writes one at the end only", "steps"
    )
    keep_checkpoints: Annotated[int, RUNTIME] = key("Checkpoints that are kept, the newest ones", "checkpoints")
    log_every_steps: Annotated[int, RUNTIME] = key("Steps that are averaged into one line of metrics.jsonl", "steps")
    num_workers: Annotated[int, RUNTIME] = key(
        "Processes per rank that load samples ahead; 0 loads in the rank itself", "processes"
    )

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


@described
class AverageConfig:
    """An exponential moving average of the weights, in float32."""

    decay: float = key("What the average keeps of itself per step; it rises to this value, and 0 keeps no average")
    export: str = key("Weights that become the artifact and are measured on held-out data: average or raw")
    initial: float = key(
        "Share of the initial weights in the exported average; a finetuned model keeps more of what it knew"
    )

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


@described
class HeldoutConfig:
    """Loss on held-out samples."""

    every_steps: Annotated[int, RUNTIME] = key(
        "Steps between measurements; 0 measures after the last step only", "steps"
    )
    num_samples: int = key("Held-out samples that are measured; 0 measures nothing", "samples")

    def check(self) -> None:
        not_negative("heldout", self, "every_steps", "num_samples")


@described
class SamplesConfig:
    """Grids of pictures painted during training."""

    every_steps: int = key("Steps between grids; 0 paints after the last step only", "steps")
    num_pictures: int = key("Pictures in a grid; 0 paints none", "pictures")

    def check(self) -> None:
        not_negative("samples", self, "every_steps", "num_pictures")
