"""The stages generation_decoder and editing_decoder: shards in, a decoder in the released layout out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.shards.files import CONSTANTS, ShardSpec
from data.shards.loader import ShardLoader
from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.decoders.checkpoint import load_decoder, load_decoder_transformer, load_flux, save_decoder
from nexus_gen.decoders.conditioning import EditingProjector, GenerationAdapter, init_from_qwen
from nexus_gen.decoders.decoders import (
    EditingDecoder,
    GenerationDecoder,
    build_editing_decoder,
    build_generation_decoder,
)
from nexus_gen.flux.text_encoders import encode_context, encode_pooled
from nexus_gen.language.checkpoint import load_config
from nexus_gen.parts.models import DECODER_FILES, DECODER_KINDS, find_decoder
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import ProjectorGeometry
from nexus_gen.tensors.files import TensorFiles
from train.decoders.engine import fit, gather_weights, latest_checkpoint
from train.decoders.module import DecoderModule
from train.decoders.monitor import DecoderMonitor
from train.preflight.checkpoints import require_checkpoint
from train.runs.checkpoints import checkpoint_step, complete_checkpoints
from train.runs.directory import CHECKPOINTS
from train.runs.lengths import continued
from train.schemas.decoders import DecoderConfig, EditingDecoderConfig
from train.stage import Stage
from train.steps.average import WeightAverage
from train.steps.clock import StepClock
from train.steps.metrics import MetricsLogger, latest
from train.steps.retention import set_damaged_aside

Decoder = GenerationDecoder | EditingDecoder
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def projector_geometry(qwen: str | Path) -> ProjectorGeometry:
    """Sizes of the editing projector's layer: those of the language model in a Qwen2.5-VL checkpoint directory."""
    require_checkpoint("model.qwen", qwen)
    language: Any = load_config(Path(qwen)).text_config
    return ProjectorGeometry(
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_heads=language.num_attention_heads,
        num_key_value_heads=language.num_key_value_heads,
        mrope_section=list(language.rope_parameters["mrope_section"]),
        rope_theta=language.rope_parameters["rope_theta"],
        rms_norm_eps=language.rms_norm_eps,
    )


def meta_decoder(config: DecoderConfig, embed_dim: int) -> Decoder:
    """The decoder without weights, on the meta device in the training dtype.

    Raises UserError when the embeddings are not as wide as the model that an editing decoder's projector comes from.
    """
    with torch.device("meta"):
        if not isinstance(config, EditingDecoderConfig):
            decoder: Decoder = build_generation_decoder(config.model.transformer, embed_dim)
        else:
            projector = projector_geometry(config.model.qwen)
            if projector.hidden_size != embed_dim:
                raise UserError(
                    f"{config.shards} holds embeddings of width {embed_dim} and model.qwen {config.model.qwen} is "
                    f"{projector.hidden_size} wide; give the checkpoint that the embeddings come from"
                )
            decoder = build_editing_decoder(config.model.transformer, projector, config.objective.round_positions)
    return decoder.to(DTYPES[config.trainer.precision])


def build_initial_decoder(config: DecoderConfig, embed_dim: int) -> Decoder:
    """The decoder as training begins, on the CPU in the training dtype.

    With init.decoder, that decoder. Else the transformer of init.transformer, or FLUX's from model.flux, and a fresh
    conditioner seeded by config.seed, of which an editing decoder takes its layer from layer 0 of model.qwen, unless
    init.projector is random.
    embed_dim: width of the image embeddings. Raises UserError when weights do not fit the configured geometry.
    """
    decoder = meta_decoder(config, embed_dim)
    dtype = DTYPES[config.trainer.precision]
    if config.init.decoder:
        load_decoder(decoder, find_decoder(Path(config.init.decoder), [config.kind], "init.decoder").file)
        return decoder
    if config.init.transformer:
        found = find_decoder(Path(config.init.transformer), DECODER_KINDS, "init.transformer")
        load_decoder_transformer(decoder.transformer, found.file, dtype)
    else:
        decoder.transformer = load_flux(config.model.flux, config.model.transformer, dtype)
    context_dim = config.model.transformer.context_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if isinstance(decoder, GenerationDecoder):
            decoder.adapter = GenerationAdapter(embed_dim, context_dim).to(dtype)
        else:
            assert isinstance(config, EditingDecoderConfig)
            projector = EditingProjector(
                projector_geometry(config.model.qwen), context_dim, config.objective.round_positions
            ).to(dtype)
            if config.init.projector == "qwen":
                init_from_qwen(projector, config.model.qwen)
            decoder.embedding_merger = projector
    return decoder


class DecoderStage(Stage[DecoderConfig]):
    """Shared by both decoders: they differ in their config, which names the decoder and its inputs."""

    def run(self) -> bool:
        config = self.config
        spec = ShardSpec.load(Manifest.load(config.shards))
        dtype = DTYPES[config.trainer.precision]
        self.start_process_group()
        if self.rank == 0:
            set_damaged_aside(complete_checkpoints(self.run_dir / CHECKPOINTS), checkpoint_step)
        self.barrier()
        checkpoint = latest_checkpoint(self.run_dir)
        metrics = MetricsLogger(
            self.run_dir, config.logger, self.rank, checkpoint_step(checkpoint) if checkpoint else 0
        )
        needs_null = config.objective.condition_dropout > 0 or config.sampling.cfg_scale != 1
        module = DecoderModule(
            self._starting_decoder(spec.embed_dim),
            self._constant("pooled", encode_pooled),
            config.objective,
            config.optim,
            seed=config.seed,
            max_steps=config.trainer.max_steps,
            gradient_checkpointing=config.trainer.gradient_checkpointing,
            null_context=self._constant("null_context", encode_context) if needs_null else None,
        )
        loader = ShardLoader(
            config.shards,
            "train",
            micro_batch_size=config.trainer.micro_batch_size,
            accumulation=config.trainer.accumulation(self.world_size),
            rank=self.rank,
            world_size=self.world_size,
            seed=config.seed,
            num_workers=config.trainer.num_workers,
            predicted_fraction=getattr(config.objective, "predicted_fraction", 0.0),
            prepare=module.draws,
        )
        average = None
        if config.average.decay:
            kept = config.average
            average = WeightAverage(module.decoder, kept.decay, self.rank, self.world_size, kept.initial)
        exported = average if config.average.export == "average" else None
        clock = StepClock()
        monitor = DecoderMonitor(config, metrics, self.rank, self.world_size, dtype, exported, clock)
        result = fit(
            module,
            loader,
            config.trainer,
            config.optim,
            metrics,
            self.run_dir,
            self.device_type,
            [monitor],
            clock,
            average,
        )
        if not result.finished:
            return False
        weights = exported.gather() if exported else gather_weights(module.decoder, self.rank)

        def export(directory: Path) -> dict[str, Any]:
            decoder = meta_decoder(config, spec.embed_dim)
            decoder.load_state_dict(weights, strict=True, assign=True)
            save_decoder(decoder, directory / DECODER_FILES[config.kind])
            return self._details(spec, result.metrics)

        self.write_artifact(export)
        return True

    def _starting_decoder(self, embed_dim: int) -> Decoder:
        """Rank zero's decoder holds the weights to start from; the engine hands them to the other ranks.

        The others' memory, and everybody's when a checkpoint is about to fill it, stays untouched and so unoccupied.
        """
        if self.rank == 0 and latest_checkpoint(self.run_dir) is None:
            return build_initial_decoder(self.config, embed_dim)
        decoder = meta_decoder(self.config, embed_dim)
        assert not any(True for _ in decoder.buffers()), "buffers are handed to nobody"
        return decoder.to_empty(device="cpu")

    def _constant(self, name: str, encode: Callable[[str, str, torch.dtype], Tensor]) -> Tensor:
        """Of the empty prompt: kept beside the shards, where no text encoder is needed then, or encoded now."""
        file = Path(self.config.shards) / CONSTANTS
        constants = TensorFiles(file) if file.is_file() else {}
        if name in constants:
            return constants[name]
        return encode(self.config.model.flux, "", DTYPES[self.config.trainer.precision])

    def _details(self, spec: ShardSpec, metrics: dict[str, float]) -> dict[str, Any]:
        """What inference needs to build and sample the decoder, and how training ended."""
        config = self.config
        details = {
            "transformer": dataclasses.asdict(config.model.transformer),
            "vae": dataclasses.asdict(config.model.vae),
            "image_size": config.model.image_size,
            "embed_dim": spec.embed_dim,
            "num_target_tokens": spec.num_target_tokens,
            "sampling": dataclasses.asdict(config.sampling),
            "steps": config.trainer.max_steps,
            **continued(self.run_dir / CHECKPOINTS),
            # Throughput stays in metrics.jsonl: details enter the artifact's fingerprint.
            "metrics": {
                **{name: value for name, value in metrics.items() if name.startswith("train/")},
                **latest(self.run_dir, "heldout/"),
            },
        }
        if isinstance(config, EditingDecoderConfig):
            details["projector"] = dataclasses.asdict(projector_geometry(config.model.qwen))
            details["round_positions"] = config.objective.round_positions
            details["reference"] = config.objective.reference
            made = Manifest.load(Path(config.shards)).details.get("recipe", {})
            # How its results became square: what is not square is edited likewise.
            details["aspect"] = "crop" if made.get("pixels") == "crop" else "stretch"
        return details


class GenerationDecoderStage(DecoderStage):
    """FLUX learns to paint from the embeddings of a picture."""


class EditingDecoderStage(DecoderStage):
    """FLUX learns to repaint from the embeddings of the result and 324 of the source."""
