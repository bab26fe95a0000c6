"""Config sections that name what stages read: models and message rows."""

from pathlib import Path
from typing import ClassVar

from data.mixture.rehearsal import SHIPPED_ROWS
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import FluxGeometry, VaeGeometry, tokens_per_side
from nexus_gen.specs.keys import described, key
from train.schemas.common import PathList, PathStr


@described
class QwenConfig:
    """The autoregressive side, whose geometry is in its config.json."""

    qwen: PathStr = key("Directory of a Qwen2.5-VL or Nexus-Gen checkpoint, or a pretrain artifact")


@described
class TargetConfig:
    """The size of pictures that the model makes.

    A plain Qwen2.5-VL gets as many prefill embeddings; checkpoints, shards and decoders made from it keep the number.
    """

    num_target_tokens: int = key(
        "Embeddings of a picture that the model makes, a square: 81 as released, 252 px at patch 14", "tokens"
    )

    def check(self) -> None:
        try:
            tokens_per_side(self.num_target_tokens)
        except ValueError as error:
            raise UserError(f"model.num_target_tokens: {error}") from error


@described
class DiffusionConfig:
    """The painting side."""

    transformer: FluxGeometry = key("Geometry of FLUX's transformer")
    vae: VaeGeometry = key("Geometry of FLUX's autoencoder")
    image_size: int = key("Side of the pictures that decoders paint", "pixels")
    flux: PathStr = key("Directory in the layout of FLUX.1-dev")

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


@described
class ModelConfig(DiffusionConfig, QwenConfig):
    """Both sides."""


@described
class TrainRowsConfig:
    """Message rows to train on. `train.preflight.rows` reads them."""

    train: PathStr = key("Training rows: a message dataset (a file, a pattern, a folder) or a mixture")
    quarantine: PathList = key(
        "Files of rows to leave out, as `nexus-gen data check` and training write them, or their folders"
    )
    picture_root: PathStr = key(
        "Directory that picture paths of rows are relative to; empty for that of the file that names them",
        default="",
        kw_only=True,
    )

    splits: ClassVar[tuple[str, ...]] = ("train",)


@described
class RowsConfig(TrainRowsConfig):
    """Message rows to train on and to measure on."""

    heldout: PathStr = key("Held-out rows: a message dataset or a mixture")
    rehearsal: float = key(
        "Share of the training rows, from 0 to below 1, that are of what the initial checkpoint was trained on",
        default=0.0,
        kw_only=True,
    )
    rehearsal_rows: PathStr = key(
        "Rows to rehearse: a message dataset or a mixture; empty for those of the shipped weights",
        default="",
        kw_only=True,
    )

    splits: ClassVar[tuple[str, ...]] = ("train", "heldout")

    @property
    def rehearsal_file(self) -> Path:
        return Path(self.rehearsal_rows or SHIPPED_ROWS)

    def check(self) -> None:
        if not 0 <= self.rehearsal < 1:
            raise UserError(f"data.rehearsal is {self.rehearsal}; it is a share from 0 to below 1")
        if self.rehearsal_rows and not self.rehearsal:
            raise UserError(
                "data.rehearsal_rows has no effect with data.rehearsal 0; give a share, data.rehearsal=0.15"
            )
