"""Configs of the embedding stages: pictures and conversations become embeddings and latents in shards."""

from typing import Annotated, ClassVar

from data.shards.files import EMBED_DTYPES
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.keys import described, key, key_of
from train.schemas.common import RUNTIME, PathStr, not_negative, one_of, positive
from train.schemas.inputs import DiffusionConfig, RowsConfig
from train.schemas.pretrain import MessagesConfig
from train.schemas.stage import StageConfig


@described
class EmbedConfig:
    """What is embedded by which model, and how it is stored."""

    samples_per_shard: int = key("Samples of a shard; a finished shard survives an interruption", "samples")
    dtype: str = key("How embeddings are stored: float32, bfloat16, float8_e4m3fn or int8")
    latents: bool = key("Whether to store the VAE's latents too; decoders train on them")
    null_context: bool = key(
        "Whether to store T5's output for the empty prompt, for decoders that drop conditions or sample with guidance"
    )
    batch_size: Annotated[int, RUNTIME] = key(
        "Pictures per forward pass; another size changes embeddings by rounding, and recomputes nothing", "pictures"
    )
    num_workers: Annotated[int, RUNTIME] = key(
        "Processes per rank that decode pictures ahead; 0 decodes in the rank itself", "processes"
    )
    compile: Annotated[str, RUNTIME] = key(
        "Whether the models' blocks are compiled, which changes embeddings by rounding: always, never, or auto (on a "
        "GPU with at least 10,000 rows to embed, which pays for the time that compiling takes)"
    )
    autoregressive: PathStr = key("Language model that embeds: a checkpoint directory or a pretrain artifact")


@described
class EmbedEditing(EmbedConfig):
    pixels: str = key(
        "How results become square for the autoencoder: squash, as for the embeddings, or crop, as published"
    )


@described
class EmbedDataConfig(RowsConfig):
    max_pixels: int = key_of(MessagesConfig, "max_pixels")
    max_bad_fraction: Annotated[float, RUNTIME] = key_of(MessagesConfig, "max_bad_fraction")


@described
class EmbedStageConfig(StageConfig):
    model: DiffusionConfig = key("The painting side, whose autoencoder makes the latents")
    data: EmbedDataConfig = key("Rows to embed")
    embed: EmbedConfig = key("What is embedded by which model, and how it is stored")

    kind: ClassVar[str] = "embedding_shards"
    reuses_by_content: ClassVar[bool] = True
    task: ClassVar[str]

    @property
    def reads_conversations(self) -> bool:
        """Whether words and all pictures of a row enter its embeddings, or its last picture alone."""
        raise NotImplementedError

    def check(self) -> None:
        super().check()
        self.model.check()
        positive("embed", self.embed, "samples_per_shard", "batch_size")
        one_of("embed.dtype", self.embed.dtype, *EMBED_DTYPES)
        one_of("embed.compile", self.embed.compile, "auto", "always", "never")
        not_negative("embed", self.embed, "num_workers")
        self.data.check()
        if not 0 <= self.data.max_bad_fraction < 1:
            raise UserError(f"data.max_bad_fraction is {self.data.max_bad_fraction}; it must be in [0, 1)")


@described
class GenerationEmbedConfig(EmbedConfig):
    predicted: bool = key(
        "Whether to store the embeddings that the language model predicts, too, for objective.predicted_fraction"
    )


@described
class EmbedGenerationConfig(EmbedStageConfig):
    embed: GenerationEmbedConfig = key_of(EmbedStageConfig, "embed")

    task: ClassVar[str] = "generation"

    @property
    def reads_conversations(self) -> bool:
        return self.embed.predicted


@described
class EmbedEditingConfig(EmbedStageConfig):
    embed: EmbedEditing = key_of(EmbedStageConfig, "embed")

    task: ClassVar[str] = "editing"

    @property
    def reads_conversations(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        one_of("embed.pixels", self.embed.pixels, "squash", "crop")
