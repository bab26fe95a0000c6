"""Config of stage=pretrain: the language model learns understanding, generation and editing together."""

import math
from dataclasses import replace
from typing import Annotated, ClassVar

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.keys import described, key
from train.schemas.common import (
    RUNTIME,
    AverageConfig,
    HeldoutConfig,
    LoggerConfig,
    OptimConfig,
    TrainerConfig,
    not_negative,
    one_of,
    positive,
    share,
)
from train.schemas.inputs import QwenConfig, RowsConfig, TargetConfig
from train.schemas.stage import StageConfig


@described
class PretrainModelConfig(TargetConfig, QwenConfig):
    """What pretraining begins with."""


@described
class MessagesConfig(RowsConfig):
    """What pretraining reads, and for how long: one of num_epochs, token_budget and trainer.max_steps is above 0."""

    max_length: int = key("Tokens of a row with its resized pictures at most; a longer row is bad, never cut", "tokens")
    max_pixels: int = key("Size that pictures of user turns are shrunk to where they are larger", "pixels")
    dynamic_targets: bool = key(
        "Whether target images keep their aspect about, in grids of at most model.num_target_tokens"
    )
    consistent_edit_scale: bool = key(
        "Whether pictures of user turns are seen in the size of the target image that follows"
    )
    max_bad_fraction: Annotated[float, RUNTIME] = key(
        "Share of bad rows, from 0 to below 1, past which the stage stops; up to it they are quarantined"
    )
    num_epochs: float = key(
        "Passes over the dataset, or epochs of the mixture, that set the length; 0 otherwise", "epochs"
    )
    token_budget: int = key(
        "Tokens to train on, of resized pictures too and without padding, that set the length; 0 otherwise", "tokens"
    )


@described
class PretrainObjective:
    """loss = text_loss_weight x cross-entropy + image_loss_weight x image loss, where
    image loss = (1 - cosine_fraction) x MSE + cosine_fraction x mean(1 - cosine).
    """

    text_loss_weight: float = key("Weight of the cross-entropy of text tokens")
    image_loss_weight: float = key("Weight of the error of predicted embeddings")
    cosine_fraction: float = key("Share of 1 - cosine in the image loss, from 0 to 1; the rest is mean squared error")
    target_inputs: str = key(
        "What stands at the tokens of a picture to predict: prefill embeddings, or its own embeddings, which "
        "generation then feeds back one by one"
    )


@described
class FreezeConfig:
    """Parts of the checkpoint that stay as they are."""

    vision: bool = key("Whether the blocks of the vision tower stay as they are")
    merger: bool = key("Whether the merger, which turns 2 x 2 patches into a token, stays as it is")


@described
class PretrainConfig(StageConfig):
    model: PretrainModelConfig = key("What pretraining begins with")
    data: MessagesConfig = key("Rows, and how long to train on them")
    objective: PretrainObjective = key("What the losses of text and pictures weigh")
    freeze: FreezeConfig = key("Parts of the checkpoint that stay as they are")
    optim: OptimConfig = key("The optimizer and its learning rate")
    average: AverageConfig = key("A moving average of the weights")
    trainer: TrainerConfig = key("Steps, batches, precision and checkpoints")
    heldout: HeldoutConfig = key("Loss on held-out samples")
    logger: Annotated[LoggerConfig, RUNTIME] = key("Where metrics go besides metrics.jsonl")

    kind: ClassVar[str] = "ar_checkpoint"
    trains: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        self.model.check()
        self.optim.check(self.trainer)
        lengths = (self.data.num_epochs, self.data.token_budget, self.trainer.max_steps)
        if min(lengths) < 0 or sum(length > 0 for length in lengths) != 1:
            epochs, tokens, steps = lengths
            raise UserError(
                f"data.num_epochs is {epochs:g}, data.token_budget {tokens} and trainer.max_steps {steps}; one of them "
                "says how long to train and must be above 0: set the other two to 0"
            )
        self.trainer.check(self.launch.world_size, by_steps=self.trainer.max_steps > 0)
        self.logger.check()
        self.average.check()
        self.heldout.check()
        not_negative("objective", self.objective, "text_loss_weight", "image_loss_weight")
        share("objective", self.objective, "cosine_fraction")
        one_of("objective.target_inputs", self.objective.target_inputs, "prefill", "embeddings")
        self.data.check()
        positive("data", self.data, "max_length", "max_pixels")
        if not 0 <= self.data.max_bad_fraction < 1:
            raise UserError(f"data.max_bad_fraction is {self.data.max_bad_fraction}; it must be in [0, 1)")

    def with_steps(self, epoch_rows: int) -> "PretrainConfig":
        """This config with trainer.max_steps said by data.num_epochs where that is in force; the last step is whole.

        By data.token_budget it is a bound, which rows of one token would reach.
        """
        if self.trainer.max_steps:
            return self
        rows = self.data.num_epochs * epoch_rows or self.data.token_budget
        steps = math.ceil(rows / self.trainer.global_batch_size)
        return replace(self, trainer=replace(self.trainer, max_steps=steps))
