"""Configs of the stages that make a dataset (shapes) and models (standins) where none are given."""

from typing import ClassVar

from data.shapes.contents import ShapesConfig
from nexus_gen.specs.geometry import FluxGeometry, LanguageGeometry, TextEncoderGeometry, VaeGeometry, VisionGeometry
from nexus_gen.specs.keys import described, key, key_of
from train.schemas.common import not_negative, positive
from train.schemas.inputs import DiffusionConfig, TargetConfig, TrainRowsConfig
from train.schemas.stage import StageConfig


@described
class ShapesStageConfig(StageConfig):
    shapes: ShapesConfig = key("How much of the procedural dataset is drawn, and how varied")

    kind: ClassVar[str] = "messages"

    def check(self) -> None:
        super().check()
        self.shapes.check()


@described
class StandinsConfig:
    """Geometry of the tiny models that have no config of their own yet, and how long two of them are fitted."""

    vision: VisionGeometry = key("Geometry of the vision tower")
    language: LanguageGeometry = key("Geometry of the language model")
    clip: TextEncoderGeometry = key("Geometry of CLIP's text encoder")
    t5: TextEncoderGeometry = key("Geometry of T5's encoder")
    vae_steps: int = key("Batches that the autoencoder is fitted to", "steps")
    vae_batch_size: int = key("Pictures in a batch of the autoencoder", "pictures")
    vision_steps: int = key(
        "Batches that the vision tower is fitted to; 0 leaves it random, initialised to keep what it sees", "steps"
    )
    vision_batch_size: int = key("Pictures in a batch of the vision tower", "pictures")
    num_images: int = key("Pictures of the dataset that both are fitted to", "pictures")


@described
class StandinsModelConfig(TargetConfig):
    """The vision tower is fitted to see pictures in num_target_tokens, and in those of a reference."""

    transformer: FluxGeometry = key_of(DiffusionConfig, "transformer")
    vae: VaeGeometry = key_of(DiffusionConfig, "vae")
    image_size: int = key_of(DiffusionConfig, "image_size")


@described
class StandinsStageConfig(StageConfig):
    model: StandinsModelConfig = key("Geometry of the painting side, and the size of pictures that the model makes")
    data: TrainRowsConfig = key("Rows whose words the tokenizers learn, and whose pictures models are fitted to")
    standins: StandinsConfig = key("Geometry of the other models, and how long they are fitted")

    kind: ClassVar[str] = "base_models"

    def check(self) -> None:
        super().check()
        self.model.check()
        positive("standins", self.standins, "vae_steps", "vae_batch_size", "vision_batch_size", "num_images")
        not_negative("standins", self.standins, "vision_steps")
