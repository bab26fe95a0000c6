"""Load, save and build the autoregressive model in the released layout.

On disk the keys are `visual.*`, `model.embed_tokens`, `model.layers.*`, `model.norm`, `lm_head`, `vision_head` and
`image_prefill_embeds`, and config.json is flat (the text fields at its top), as transformers 4.49 wrote them: the
published code reads what is saved here. A plain Qwen2.5-VL checkpoint lacks the last two tensors.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_gen.artifacts.artifact import building, write_text_atomic
from nexus_gen.language.model import TARGET_INPUTS, NexusGenForConditionalGeneration
from nexus_gen.language.processor_files import processor_directory
from nexus_gen.specs.errors import UserError, first_line
from nexus_gen.specs.geometry import MERGE_SIZE, RELEASED_TARGET_TOKENS, LanguageGeometry, VisionGeometry
from nexus_gen.tensors.compat import ensure_torchvision
from nexus_gen.tensors.files import TensorFiles
from nexus_gen.tensors.fit import require_autoregressive
from nexus_gen.tensors.layouts import ADDED_KEYS, PREFILL_KEY, Source, autoregressive_sources
from nexus_gen.tensors.pretrained import load_pretrained
from nexus_gen.tensors.tensor_shapes import read_config
from nexus_gen.tensors.translation import load_strictly

ensure_torchvision()

from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLProcessor  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel  # noqa: E402
from transformers.utils import GENERATION_CONFIG_NAME  # noqa: E402

ADDED_STD = 0.02  # the tensors that a plain Qwen2.5-VL lacks start from N(0, 0.02)
# Everything of a released directory that is not weights or model config; which of them exist depends on its age.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "use_sliding_window",
    "max_window_layers",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
VISION_FIELDS = (
    "depth",
    "hidden_size",
    "hidden_act",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "tokens_per_second",
    "window_size",
    "fullatt_block_indexes",
    "out_hidden_size",
)


@dataclass(frozen=True)
class SpecialTokenIds:
    """Ids that the model itself needs; `end_of_turn` ends a reply, `padding` fills batches."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    end_of_turn: int
    padding: int


def build_autoregressive(
    vision: VisionGeometry,
    language: LanguageGeometry,
    tokens: SpecialTokenIds,
    *,
    seed: int,
    num_target_tokens: int = RELEASED_TARGET_TOKENS,
) -> NexusGenForConditionalGeneration:
    """A randomly initialised model in float32 on the CPU; the caller's random state is left alone."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": language.vocab_size,
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_key_value_heads,
            "rms_norm_eps": language.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": language.rope_theta,
                "mrope_section": list(language.mrope_section),
            },
            "bos_token_id": tokens.padding,  # as Qwen has it: <|endoftext|> is both
            "eos_token_id": tokens.end_of_turn,
            "pad_token_id": tokens.padding,
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
            "spatial_merge_size": MERGE_SIZE,
            "tokens_per_second": 2,
            "out_hidden_size": language.hidden_size,
        },
        image_token_id=tokens.image,
        video_token_id=tokens.video,
        vision_start_token_id=tokens.vision_start,
        vision_end_token_id=tokens.vision_end,
        tie_word_embeddings=False,
    )
    config.num_target_tokens = num_target_tokens
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NexusGenForConditionalGeneration(config)


def load_autoregressive(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    init_seed: int = 0,
    num_target_tokens: int = RELEASED_TARGET_TOKENS,
) -> NexusGenForConditionalGeneration:
    """Load a released, exported or plain Qwen2.5-VL checkpoint, in eval mode.

    init_seed: seeds the two tensors that a plain Qwen2.5-VL lacks, N(0, 0.02). num_target_tokens: how many prefill
    embeddings such a one gets; another keeps its own.
    Raises UserError on a missing directory or file, a damaged shard, and on keys that are missing, left over or of
    another shape than the model's.
    """
    directory = Path(path)
    config = load_config(directory)
    files = TensorFiles(directory, device)
    weights = require_autoregressive(directory, {key: files.header(key).shape for key in files})
    config.num_target_tokens = weights.shapes.get(PREFILL_KEY, (num_target_tokens,))[0]
    # By the names on disk, so that what is saved has them again, whatever the layout that was read.
    on_disk = autoregressive_sources(weights.shapes, "released")
    sources = {on_disk[key].keys[0]: source for key, source in weights.sources.items()}
    lacking = set() if ADDED_KEYS[0] in weights.shapes else set(ADDED_KEYS)
    model: NexusGenForConditionalGeneration = load_pretrained(
        NexusGenForConditionalGeneration, config, files, sources, dtype, lacking
    )
    model.generation_config = load_generation_config(directory, model.config)
    if lacking:
        _initialise_added(model, init_seed)
    return model


def load_vision_tower(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> Qwen2_5_VisionTransformerPretrainedModel:
    """Load only the vision tower of a checkpoint, in eval mode, without reading the language model.

    Raises UserError as `load_autoregressive` does.
    """
    directory = Path(path)
    vision_config: Any = load_config(directory).vision_config
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(vision_config, dtype=dtype)
    files = TensorFiles(directory)
    prefix = next(
        (name for name in ("model.visual.", "visual.") if any(key.startswith(name) for key in files)), "visual."
    )
    sources = {key: Source((prefix + key,)) for key in tower.state_dict()}
    load_strictly(tower, files, sources, concerns=lambda key: key.startswith(prefix))
    return tower.to(device).eval()


def save_autoregressive(
    model: NexusGenForConditionalGeneration,
    path: str | os.PathLike[str],
    *,
    processor_from: str | os.PathLike[str] | None = None,
    state_dict: dict[str, Tensor] | None = None,
    as_qwen: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write the released layout; it replaces the directory `path` when it is complete.

    processor_from: a checkpoint whose tokenizer and processor files are copied. state_dict: weights gathered by a
    trainer, under the model's in-memory names, where the model's own are partitioned. as_qwen: leave out the two
    added tensors, which makes a plain Qwen2.5-VL checkpoint.
    """
    weights: dict[str, Tensor] = model.state_dict() if state_dict is None else state_dict
    if as_qwen:
        weights = {key: tensor for key, tensor in weights.items() if key not in ADDED_KEYS}
    dtype = next(iter(weights.values())).dtype
    with building(path) as partial:
        model.save_pretrained(partial, state_dict=weights, max_shard_size=max_shard_size)
        text = json.dumps(released_config(model.config, dtype), indent=2, ensure_ascii=False) + "\n"
        write_text_atomic(partial / "config.json", text)
        for name in PROCESSOR_FILES if processor_from is not None else ():
            source = processor_directory(processor_from or "") / name
            if source.is_file():
                shutil.copyfile(source, partial / name)


def load_processor(path: str | os.PathLike[str]) -> Qwen2_5_VLProcessor:
    """The tokenizer and image processor of a checkpoint; UserError when they are missing or unreadable."""
    try:
        return Qwen2_5_VLProcessor.from_pretrained(processor_directory(path), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception, transformers KeyError and others
        raise UserError(
            f"{path} holds no readable tokenizer and processor ({first_line(error)}); copy them from the checkpoint "
            "that it was trained from"
        ) from error


def load_config(directory: Path) -> Qwen2_5_VLConfig:
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} is not a checkpoint (no config.json); give the directory of a Qwen2.5-VL model")
    fields = read_config(directory) or {}
    try:
        if fields.get("model_type") != Qwen2_5_VLConfig.model_type:
            raise UserError(
                f"{file} describes a {fields.get('model_type')} model where {Qwen2_5_VLConfig.model_type} is needed; "
                "give the directory of a Qwen2.5-VL model"
            )
        return Qwen2_5_VLConfig.from_dict(fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a readable model config ({error}); copy it again") from error


def load_generation_config(directory: Path, config: Qwen2_5_VLConfig) -> GenerationConfig:
    """generation_config.json, or what follows from the model's config where there is none."""
    if not (directory / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory / GENERATION_CONFIG_NAME} is not readable ({error}); copy it again") from error


@torch.no_grad()
def _initialise_added(model: NexusGenForConditionalGeneration, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)  # on the CPU in float32: the same numbers on every device
    for weight in (model.vision_head.weight, model.image_prefill_embeds.weight):
        weight.copy_(torch.randn(weight.shape, generator=generator) * ADDED_STD)


def released_config(config: Qwen2_5_VLConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The flat config.json of transformers 4.49, which later releases read too; `target_inputs` unless as published."""
    target_inputs = getattr(config, "target_inputs", TARGET_INPUTS[0])
    text: Any = config.text_config
    vision: Any = config.vision_config
    rope = text.rope_parameters
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": config.model_type,
        **{name: getattr(text, name) for name in TEXT_FIELDS},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_config": {
            "model_type": config.model_type,
            **{name: getattr(vision, name) for name in VISION_FIELDS},
        },
        **({} if target_inputs == TARGET_INPUTS[0] else {"target_inputs": target_inputs}),
    }
