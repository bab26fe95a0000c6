"""Configs of the decoder stages: FLUX learns to paint from embeddings, and to repaint."""

from typing import Annotated, ClassVar

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import NUM_REFERENCE_TOKENS
from nexus_gen.specs.keys import described, key, key_of
from train.schemas.common import (
    RUNTIME,
    AverageConfig,
    HeldoutConfig,
    LoggerConfig,
    OptimConfig,
    PathStr,
    SamplesConfig,
    TrainerConfig,
    one_of,
    positive,
    share,
)
from train.schemas.inputs import DiffusionConfig, ModelConfig
from train.schemas.pretrain import PretrainConfig
from train.schemas.stage import StageConfig


@described
class DecoderObjective:
    """Which noise levels the decoder learns, and what they weigh."""

    timesteps: str = key("Noise levels drawn per_sample, or per_batch as in the published trainer")
    density: str = key("Density of noise levels: uniform or logit_normal")
    shift: float = key("Shift of noise levels towards more noise: 3 as published; more pixels want more")
    weighting: str = key(
        "Weights of the levels in the loss, of mean 1 whatever the density: published (largest in the middle) or none"
    )
    condition_dropout: float = key(
        "Share of samples whose condition is the empty prompt, which classifier-free guidance asks about; from 0 to 1"
    )
    guidance: float = key("FLUX's embedded guidance in training")

    def check(self) -> None:
        one_of("objective.timesteps", self.timesteps, "per_sample", "per_batch")
        one_of("objective.density", self.density, "uniform", "logit_normal")
        one_of("objective.weighting", self.weighting, "published", "none")
        positive("objective", self, "shift")
        share("objective", self, "condition_dropout")


@described
class EditingObjective(DecoderObjective):
    reference: bool = key("Whether the decoder sees the source's 324 tokens, or those of the target alone")
    round_positions: bool = key(
        "Whether token positions are held in the training dtype, as in the published code; false keeps float32"
    )


@described
class GenerationObjective(DecoderObjective):
    predicted_fraction: float = key(
        "Share of samples, from 0 to 1, conditioned on what the language model predicts, as at inference"
    )


@described
class SamplingConfig:
    """What `generate` and `edit` do by default with the decoder."""

    num_inference_steps: int = key("Denoising steps", "steps")
    cfg_scale: float = key("Scale of classifier-free guidance; 1 switches it off")
    embedded_guidance: float = key("Guidance that the transformer takes as an input")


@described
class DecoderInit:
    """Weights that training begins with, each a file or an artifact."""

    decoder: PathStr = key(
        "A released or earlier decoder to train on from; empty starts from FLUX and a fresh conditioner"
    )
    transformer: PathStr = key(
        "A decoder, of either kind, whose transformer takes the place of FLUX's; empty keeps FLUX's"
    )


@described
class EditingInit(DecoderInit):
    projector: str = key("Where the projector's layer comes from: qwen (layer 0 of model.qwen) or random")


@described
class DecoderConfig(StageConfig):
    model: DiffusionConfig = key("Models that training begins with, and their geometry")
    init: DecoderInit = key("Weights that training begins with in place of FLUX's")
    objective: DecoderObjective = key("Which noise levels the decoder learns, and what they weigh")
    sampling: SamplingConfig = key("What `generate` and `edit` do by default with the decoder")
    optim: OptimConfig = key_of(PretrainConfig, "optim")
    average: AverageConfig = key_of(PretrainConfig, "average")
    trainer: TrainerConfig = key_of(PretrainConfig, "trainer")
    shards: PathStr = key("Artifact of an embedding stage to train on")
    heldout: HeldoutConfig = key_of(PretrainConfig, "heldout")
    samples: Annotated[SamplesConfig, RUNTIME] = key("Grids of pictures painted during training")
    logger: Annotated[LoggerConfig, RUNTIME] = key_of(PretrainConfig, "logger")

    trains: ClassVar[bool] = True
    num_reference_tokens: ClassVar[int]

    def check(self) -> None:
        super().check()
        self.model.check()
        self.optim.check(self.trainer)
        self.trainer.check(self.launch.world_size)
        self.logger.check()
        if self.init.decoder and self.init.transformer:
            raise UserError(
                "init.transformer has no effect beside init.decoder, which brings its own; give one of them"
            )
        self.objective.check()
        self.average.check()
        self.heldout.check()
        self.samples.check()
        positive("sampling", self.sampling, "num_inference_steps")


@described
class GenerationDecoderConfig(DecoderConfig):
    objective: GenerationObjective = key_of(DecoderConfig, "objective")

    kind: ClassVar[str] = "generation_decoder"
    num_reference_tokens: ClassVar[int] = 0

    def check(self) -> None:
        super().check()
        share("objective", self.objective, "predicted_fraction")


@described
class EditingDecoderConfig(DecoderConfig):
    model: ModelConfig = key_of(DecoderConfig, "model")
    init: EditingInit = key_of(DecoderConfig, "init")
    objective: EditingObjective = key_of(DecoderConfig, "objective")

    kind: ClassVar[str] = "editing_decoder"
    num_reference_tokens: ClassVar[int] = NUM_REFERENCE_TOKENS

    def check(self) -> None:
        super().check()
        one_of("init.projector", self.init.projector, "qwen", "random")
