"""Tiny stand-ins of the downloads, Qwen2.5-VL-Instruct and FLUX.1-dev, in their layout: `stage=standins`.

The same loaders read them as read the full-size models. The language model, the text encoders and FLUX are random; the
tokenizers and the autoencoder are trained here, and the vision tower is too, or initialised to keep what it sees.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GenerationConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils.logging import disable_progress_bar

from data.mixture.order import read_dataset
from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.decoders.checkpoint import save_flux, save_vae
from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.language.checkpoint import SpecialTokenIds, build_autoregressive, save_autoregressive
from nexus_gen.pictures.images import StoredImage, cover_crop, open_image
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import MERGE_SIZE, FluxGeometry, TextEncoderGeometry
from train.preflight.rows import left_out_of
from train.schemas.standins import StandinsConfig, StandinsModelConfig, StandinsStageConfig
from train.stage import Stage
from train.standins.tokenizers import template_texts, train_clip_tokenizer, train_qwen_tokenizer, train_t5_tokenizer
from train.standins.vae import build_vae, fit_vae, reconstruction_psnr, stacked
from train.standins.vision import Objects, calibrate_vision, fit_vision, initialise_vision

QWEN_DIR = "Qwen2.5-VL-Instruct"
FLUX_DIR = "FLUX.1-dev"
MIN_TOKENS, MAX_TOKENS = 4, 16384  # bounds of a picture in merged tokens, as Qwen2.5-VL's preprocessor has them
CALIBRATION_PICTURES = 512  # that the scale of the vision tower's outputs is measured on
HELD_OUT = 32  # pictures that the autoencoder is scored on and not fitted to, at most an eighth


class StandinsStage(Stage[StandinsStageConfig]):
    """The tokenizers learn from the dataset's words, the autoencoder and the vision tower from its pictures."""

    def run(self) -> bool:
        self.write_artifact(self.fill)
        return True

    def fill(self, directory: Path) -> dict[str, Any]:
        disable_progress_bar()  # transformers' own, of writing files that take no time
        words: list[str] = []
        scenes: dict[StoredImage, dict[str, Any]] = {}
        data = self.config.data
        for row in read_dataset(data.train, left_out_of(data), data.picture_root):
            words += [text for choice in row.choices for texts in choice.values() for text in texts]
            known = (row.truth or {}).get("scenes", [{}] * len(row.images))
            scenes.update(zip(row.images, known, strict=False))
        pictures = sorted(scenes, key=str)[: self.config.standins.num_images]
        size = self.config.model.image_size
        with ThreadPoolExecutor() as pool:  # decoding does without the interpreter
            images = list(pool.map(lambda picture: cover_crop(open_image(picture), size), pictures))
        # Before the first kernel: matrices of float32 at the speed of TF32.
        torch.set_float32_matmul_precision("high")
        return build_standins(
            directory,
            self.config.model,
            self.config.standins,
            corpus=words,
            images=images,
            seed=self.config.seed,
            objects=[scenes[picture].get("objects") for picture in pictures],
            device=self.device,
        )


def build_standins(
    directory: Path,
    model: StandinsModelConfig,
    standins: StandinsConfig,
    corpus: Iterable[str],
    images: list[Image.Image],
    seed: int,
    objects: list[Objects] | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Write `Qwen2.5-VL-Instruct/` and `FLUX.1-dev/` under `directory`; returns what was measured.

    corpus: texts that the tokenizers learn from. images: `model.image_size` square, for the autoencoder and the vision
    tower; objects: what is in each, as far as it is known. device: where to train, the CPU unless given. The files
    depend on the arguments, on nothing else but the number of threads.
    Raises UserError when a vocabulary is too small, there is no picture, or the widths do not fit together.
    """
    check(model, standins, images)
    pictures = stacked(images).to(device)
    num_held_out = min(HELD_OUT, len(images) // 8)
    vae = build_vae(model.vae, seed)
    how = standins.vae_steps, standins.vae_batch_size, seed
    # Side by side: tokenizers learn in code that does without the interpreter, and a GPU waits for a thread of its host
    # more than for itself. On a CPU the two fittings would only share its cores.
    with ThreadPoolExecutor(2) as pool:
        learning = pool.submit(train_tokenizers, standins, list(corpus))
        fitting = pool.submit(fit_vae, vae, pictures[num_held_out:], *how)
        if pictures.device.type == "cpu":
            fitting.result()
        qwen_tokenizer, clip_tokenizer, t5_tokenizer = learning.result()
        num_qwen, vision = build_qwen(
            directory / QWEN_DIR,
            standins,
            model.num_target_tokens,
            qwen_tokenizer,
            images,
            pictures,
            objects or [None] * len(images),
            seed,
        )
        fitting.result()
    num_parameters = {"qwen": num_qwen}
    flux = build_flux_transformer(model.transformer, seed)
    save_vae(vae, directory / FLUX_DIR / "ae.safetensors", "bfl")
    save_flux(flux, directory / FLUX_DIR / "flux1-dev.safetensors", "bfl")
    num_parameters |= {"vae": count(vae), "transformer": count(flux)}
    clip_tokenizer.save_pretrained(directory / FLUX_DIR / "tokenizer")
    t5_tokenizer.save_pretrained(directory / FLUX_DIR / "tokenizer_2")
    num_parameters |= build_text_encoders(directory / FLUX_DIR, standins.clip, standins.t5, seed)
    write_json(directory / FLUX_DIR / "model_index.json", {"_class_name": "FluxPipeline", **PIPELINE_PARTS})
    psnr = reconstruction_psnr(vae, stacked(images[:num_held_out] or images))
    return {"num_parameters": num_parameters, "vae_psnr_db": round(psnr, 2), "vision": vision}


def train_tokenizers(standins: StandinsConfig, corpus: list[str]) -> tuple[Qwen2Tokenizer, CLIPTokenizer, T5Tokenizer]:
    """Those of the language model and of both text encoders."""
    texts = [*template_texts(), *corpus]
    return (
        train_qwen_tokenizer(corpus, standins.language.vocab_size),
        train_clip_tokenizer(texts, standins.clip.vocab_size),
        train_t5_tokenizer(texts, standins.t5.vocab_size),
    )


# What diffusers reads first of a FLUX.1-dev directory: a part's library and class.
PIPELINE_PARTS = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
}


def check(model: StandinsModelConfig, standins: StandinsConfig, images: list[Image.Image]) -> None:
    """UserError for what would fail later, or only in another stage."""
    if not images:
        raise UserError("data.train holds no pictures; the autoencoder cannot be fitted without some")
    for section, width, wanted, ours in (
        ("clip", standins.clip.hidden_size, model.transformer.pooled_dim, "pooled_dim"),
        ("t5", standins.t5.hidden_size, model.transformer.context_dim, "context_dim"),
    ):
        if width != wanted:
            raise UserError(
                f"standins.{section}.hidden_size is {width} where model.transformer.{ours} is {wanted}; make them equal"
            )


def build_qwen(
    directory: Path,
    standins: StandinsConfig,
    num_target_tokens: int,
    tokenizer: Qwen2Tokenizer,
    images: list[Image.Image],
    pictures: Tensor,
    objects: list[Objects],
    seed: int,
) -> tuple[int, dict[str, float]]:
    """Write a Qwen2.5-VL checkpoint with tokenizer and processor; its number of parameters, and the tower's scores.

    pictures: `images`, stacked, on the device to train on.
    """
    ids: Any = tokenizer.convert_tokens_to_ids
    tokens = SpecialTokenIds(
        image=ids("<|image_pad|>"),
        video=ids("<|video_pad|>"),
        vision_start=ids("<|vision_start|>"),
        vision_end=ids("<|vision_end|>"),
        end_of_turn=ids("<|im_end|>"),
        padding=ids("<|endoftext|>"),
    )
    model = build_autoregressive(standins.vision, standins.language, tokens, seed=seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokens.padding, eos_token_id=[tokens.end_of_turn, tokens.padding], pad_token_id=tokens.padding
    )
    token_pixels = (MERGE_SIZE * standins.vision.patch_size) ** 2
    sizes = {
        "patch_size": standins.vision.patch_size,
        "merge_size": MERGE_SIZE,
        "min_pixels": MIN_TOKENS * token_pixels,
        "max_pixels": MAX_TOKENS * token_pixels,
    }
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    tower, scores = model.model.visual, {}
    if standins.vision_steps:
        scores = fit_vision(
            tower,
            processor,
            pictures,
            objects,
            standins.vision_steps,
            standins.vision_batch_size,
            seed,
            num_target_tokens,
        )
    else:
        initialise_vision(tower, seed)
    calibrate_vision(tower, processor, images[:CALIBRATION_PICTURES], num_target_tokens)
    tower.cpu()
    save_autoregressive(model, directory, as_qwen=True)
    tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)
    return count(model), scores


def build_flux_transformer(geometry: FluxGeometry, seed: int) -> FluxTransformer:
    """A random FLUX transformer with the initialisation of DiT: every block begins as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flux = FluxTransformer(geometry)
        initialise_flux(flux)
    return flux


def initialise_flux(flux: FluxTransformer) -> None:
    """Xavier for every matrix, N(0, 0.02) for timestep and guidance; modulations and output 0 (adaLN-Zero).

    Source: DiT, Peebles and Xie 2022.
    """
    for name, module in flux.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name == "final_proj_out" or name.endswith(
            ("norm1_a.linear", "norm1_b.linear", "norm.linear", "norm_out.linear")
        ):
            nn.init.zeros_(module.weight)
        elif "timestep_embedder" in name:
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def build_text_encoders(
    directory: Path, clip: TextEncoderGeometry, t5: TextEncoderGeometry, seed: int
) -> dict[str, int]:
    """Write CLIP and T5; returns their numbers of parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip_model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip.vocab_size,
                hidden_size=clip.hidden_size,
                intermediate_size=clip.intermediate_size,
                num_hidden_layers=clip.num_layers,
                num_attention_heads=clip.num_heads,
                projection_dim=clip.hidden_size,
                bos_token_id=0,
                eos_token_id=2,  # as in FLUX.1-dev's config: the end of the text is then the largest id
            )
        )
        t5_model = T5EncoderModel(
            T5Config(
                vocab_size=t5.vocab_size,
                d_model=t5.hidden_size,
                d_kv=t5.hidden_size // t5.num_heads,
                d_ff=t5.intermediate_size,
                num_layers=t5.num_layers,
                num_heads=t5.num_heads,
                feed_forward_proj="gated-gelu",
            )
        )
    clip_model.save_pretrained(directory / "text_encoder")
    t5_model.save_pretrained(directory / "text_encoder_2")
    return {"clip": count(clip_model), "t5": count(t5_model)}


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text_atomic(path, json.dumps(values, indent=2) + "\n")
