"""Which config class each stage has."""

from train.schemas.decoders import EditingDecoderConfig, GenerationDecoderConfig
from train.schemas.embed import EmbedEditingConfig, EmbedGenerationConfig
from train.schemas.pretrain import PretrainConfig
from train.schemas.schedule import ScheduleStageConfig
from train.schemas.stage import StageConfig
from train.schemas.standins import ShapesStageConfig, StandinsStageConfig

# In the order in which pipelines run them, which is how they are listed.
SCHEMAS: dict[str, type[StageConfig]] = {
    "shapes": ShapesStageConfig,
    "standins": StandinsStageConfig,
    "schedule": ScheduleStageConfig,
    "pretrain": PretrainConfig,
    "embed_generation": EmbedGenerationConfig,
    "generation_decoder": GenerationDecoderConfig,
    "embed_editing": EmbedEditingConfig,
    "editing_decoder": EditingDecoderConfig,
}
