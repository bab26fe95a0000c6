"""Config of stage=schedule, which sets steps and learning rates of the training stages by rows and pictures."""

from typing import Annotated, ClassVar

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.keys import described, key, key_of
from train.schemas.common import RUNTIME, PathStr, TrainerConfig, one_of, positive
from train.schemas.inputs import ModelConfig, RowsConfig, TargetConfig
from train.schemas.pretrain import MessagesConfig
from train.schemas.stage import StageConfig

SCHEDULE_FILE = "schedule.json"  # of the artifact of stage=schedule


@described
class ScheduleTrainerConfig:
    """What of the training stages' trainer decides how long a step takes."""

    precision: str = key_of(TrainerConfig, "precision")
    micro_batch_size: int = key_of(TrainerConfig, "micro_batch_size")
    global_batch_size: int = key_of(TrainerConfig, "global_batch_size")


@described
class ScheduleConfig:
    """What the decoders begin with, and how much is looked at."""

    generation_decoder: PathStr = key("What the generation decoder begins with; empty where it begins at random")
    editing_decoder: PathStr = key("What the editing decoder begins with; empty where it begins at random")
    num_pictures: int = key("Pictures of training rows that are looked at", "pictures")
    optimizer: str = key("Optimizer for what is new: adamw, or muon, which needs trainer.zero_stage=0 in every stage")


@described
class ScheduleModelConfig(ModelConfig, TargetConfig):
    """What training begins with, and in which geometry."""


@described
class ScheduleDataConfig(RowsConfig):
    max_pixels: int = key_of(MessagesConfig, "max_pixels")
    max_bad_fraction: Annotated[float, RUNTIME] = key_of(MessagesConfig, "max_bad_fraction")


@described
class ScheduleStageConfig(StageConfig):
    budget_minutes: float = key(
        "What the whole pipeline may take on this machine, scores included; it takes less where rows ask for less",
        "minutes",
    )
    model: ScheduleModelConfig = key("What training begins with, and in which geometry")
    data: ScheduleDataConfig = key("Rows that the training stages read")
    trainer: ScheduleTrainerConfig = key("What decides how long a step takes, as the training stages have it")
    schedule: ScheduleConfig = key("What the decoders begin with, and how much is looked at")

    kind: ClassVar[str] = "schedule"

    def check(self) -> None:
        super().check()
        self.model.check()
        if self.budget_minutes <= 0:
            raise UserError(f"budget_minutes is {self.budget_minutes:g}; it must be above 0, as in budget_minutes=10")
        positive("trainer", self.trainer, "micro_batch_size", "global_batch_size")
        positive("schedule", self.schedule, "num_pictures")
        one_of("schedule.optimizer", self.schedule.optimizer, "adamw", "muon")
