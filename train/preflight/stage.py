"""What a launcher asks before any process starts: would this stage begin, by what its config names on disk?

Headers and rows are read, no weights, and no torch is imported: a bad config fails within a second or two.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.mixture.order import check_dataset
from data.shards.files import ShardSpec, require_global_batch
from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.fit import require_vae
from nexus_gen.tensors.headers import read_checkpoint
from nexus_gen.tensors.weight_files import BIN, flux_part
from train.preflight.checkpoints import require_checkpoint, require_target_tokens, require_whole
from train.preflight.initial_decoder import require_initial_decoder
from train.preflight.inputs import content_fingerprints, inputs_of, require_inputs, row_files
from train.preflight.rehearsal import require_rehearsal_rows
from train.preflight.rows import left_out_of, num_train_rows, preflight_rows
from train.schemas.decoders import DecoderConfig, EditingDecoderConfig, GenerationDecoderConfig
from train.schemas.embed import EmbedStageConfig
from train.schemas.inputs import TrainRowsConfig
from train.schemas.pretrain import PretrainConfig
from train.schemas.schedule import ScheduleStageConfig
from train.schemas.stage import StageConfig


def preflight(config: StageConfig) -> None:
    """Read the inputs of a stage far enough to refuse broken ones in seconds. Raises UserError."""
    require_inputs(config, inputs_of(config))
    match config:
        case ScheduleStageConfig():
            require_checkpoint("model.qwen", config.model.qwen)
            preflight_rows(config)
            require_whole(Path(config.model.qwen))
        case PretrainConfig():
            require_checkpoint("model.qwen", config.model.qwen)
            require_target_tokens(config.model.qwen, config.model.num_target_tokens)
            preflight_rows(config)
            require_whole(Path(config.model.qwen))
        case EmbedStageConfig():
            preflight_embedding(config)
        case DecoderConfig():
            preflight_decoder(config)
        case _:
            preflight_rows(config)


def preflight_embedding(config: EmbedStageConfig) -> None:
    """UserError when the language model, the rows or the autoencoder of an embedding stage will not do."""
    autoregressive = Path(config.embed.autoregressive)
    require_checkpoint("embed.autoregressive", autoregressive)
    require_rehearsal_rows(config.data, "embed.autoregressive", autoregressive)
    preflight_rows(config)
    require_whole(autoregressive)
    if config.embed.latents:
        vae = flux_part(Path(config.model.flux), "autoencoder")
        if vae.suffix != BIN:  # which takes torch to read
            require_vae(vae, read_checkpoint(vae).shapes, config.model.vae)


def preflight_decoder(config: DecoderConfig) -> None:
    """UserError when shards or initial weights do not fit a decoder's config."""
    manifest = Manifest.load(config.shards).require("embedding_shards", config.shards)
    spec = ShardSpec.load(manifest)
    side = config.model.image_size // config.model.vae.downscale
    spec.require(
        config.shards,
        num_reference_tokens=config.num_reference_tokens,
        latent_shape=[config.model.vae.latent_channels, side, side],
    )
    require_initial_decoder(config)
    num_samples = sum(shard["samples"] for shard in manifest.details["splits"]["train"])
    require_global_batch(config.shards, "train", num_samples, config.trainer.global_batch_size)
    if isinstance(config, EditingDecoderConfig):
        require_checkpoint("model.qwen", config.model.qwen)
    if isinstance(config, GenerationDecoderConfig) and config.objective.predicted_fraction and not spec.predicted:
        raise UserError(
            f"objective.predicted_fraction is {config.objective.predicted_fraction} and the shards in {config.shards} "
            "hold true embeddings only; give stage=embed_generation embed.predicted=true first"
        )


def preflight_pipeline(configs: Sequence[StageConfig]) -> None:
    """Preflight the first stage, and of the later ones what message rows decide, before any runs.

    Rows that a stage of the pipeline makes itself are not there yet.
    """
    preflight(configs[0])
    embedded: dict[Path, EmbedStageConfig] = {}
    for number, config in enumerate(configs):
        rows, made = row_files(config), [earlier.run_dir for earlier in configs[:number]]
        if not any(where.is_relative_to(directory) for where in rows.values() for directory in made):
            require_inputs(config, rows)
            preflight_rows(config)
            if isinstance(config, EmbedStageConfig):
                embedded[config.artifact_dir] = config
        if isinstance(config, DecoderConfig) and (source := embedded.get(Path(config.shards))):
            rehearsal = " and rehearsal" if source.data.rehearsal else ""
            where = f"{source.data.train} ({source.task} rows{rehearsal})"
            require_global_batch(where, "train", num_train_rows(source), config.trainer.global_batch_size)


def read_ahead(config: StageConfig) -> None:
    """Read what takes long and is remembered: the rows of a stage, while an earlier stage runs.

    What is missing yet, or wrong, is reported when the stage's turn comes.
    """
    data: Any = getattr(config, "data", None)
    with contextlib.suppress(UserError, OSError):
        if isinstance(data, TrainRowsConfig):
            for split in data.splits:
                bad = getattr(data, "max_bad_fraction", 0.0)
                check_dataset(getattr(data, split), bad, left_out_of(data), data.picture_root)
        content_fingerprints(config)
