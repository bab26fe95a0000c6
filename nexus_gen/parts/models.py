"""Where the models of an inference command are: a finished run, or paths given one by one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nexus_gen.artifacts.artifact import MANIFEST, Manifest
from nexus_gen.artifacts.content import CONTENTS
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import RELEASED_TARGET_TOKENS, LanguageGeometry, VisionGeometry
from nexus_gen.tensors.headers import read_checkpoint
from nexus_gen.tensors.kinds import kind_of
from nexus_gen.tensors.tensor_shapes import target_tokens
from nexus_gen.tensors.weight_files import BIN, SAFETENSORS, has_weights

SHIPPED_RUN = Path(__file__).parents[2] / "weights" / "shapes"  # of the checkout
RELEASED_MAX_PIXELS = 262640  # of a context picture, as the released model was trained
DECODER_KINDS = ("generation_decoder", "editing_decoder")
DECODER_FILES = {"generation_decoder": "generation_decoder.safetensors", "editing_decoder": "edit_decoder.safetensors"}
# Sampling and geometry of the released decoders, which come as bare files; artifacts carry their own in `details`.
RELEASED: dict[str, dict[str, Any]] = {
    kind: {
        "transformer": {
            "hidden_size": 3072,
            "num_heads": 24,
            "num_joint_blocks": 19,
            "num_single_blocks": 38,
            "context_dim": 4096,
            "pooled_dim": 768,
            "rope_axes_dim": [16, 56, 56],
            "latent_channels": 16,
            "patch_size": 2,
        },
        "projector": {
            "hidden_size": 3584,
            "num_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "mrope_section": [16, 24, 24],
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
        },
        "vae": {"channels": [128, 256, 512, 512], "num_res_blocks": 2, "norm_groups": 32, "latent_channels": 16},
        "image_size": 512,
        "aspect": "native",  # they paint any multiple of 16 pixels
        "embed_dim": 3584,
        "round_positions": True,  # as the editing decoder was trained
        "sampling": {"num_inference_steps": 50, "cfg_scale": cfg_scale, "embedded_guidance": 3.5},
    }
    for kind, cfg_scale in zip(DECODER_KINDS, (3.0, 1.0), strict=True)
}
# Nexus-GenV2 and Qwen2.5-VL-7B-Instruct; files carry their own in config.json.
RELEASED_VISION = VisionGeometry(
    patch_size=14,
    hidden_size=1280,
    intermediate_size=3420,
    depth=32,
    num_heads=16,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
RELEASED_LANGUAGE = LanguageGeometry(vocab_size=152064, num_layers=28, **RELEASED["editing_decoder"]["projector"])


@dataclass(frozen=True)
class ModelPaths:
    """autoregressive: checkpoint directory. max_pixels, consistent_edit_scale: how it was trained to see pictures.

    decoder_kind, decoder, flux: None for a command that paints nothing.
    details: the decoder's `transformer`, `vae`, `image_size`, `embed_dim`, `sampling` defaults and, unless that is 81,
    `num_target_tokens`. `aspect`: how it edits what is not square, one of `framing.ASPECTS`, the first unless given.
    """

    autoregressive: Path
    max_pixels: int
    decoder_kind: str | None = None
    decoder: Path | None = None
    flux: Path | None = None
    details: dict[str, Any] | None = None
    consistent_edit_scale: bool = False

    @staticmethod
    def find(
        run: Path,
        *,
        decoder: str | None,
        autoregressive: Path | None = None,
        decoder_path: Path | None = None,
        flux: Path | None = None,
        decoder_flag: str = "--decoder",
    ) -> "ModelPaths":
        """Explicit paths first, the run's artifacts otherwise; UserError names what is missing and what makes it.

        decoder_flag: by which the command takes decoder_path.
        """
        remedy = (
            "give the directory of a Qwen2.5-VL model"
            if autoregressive
            else (f"finish stage=pretrain of {run}, or give --autoregressive")
        )
        autoregressive = autoregressive or run / "pretrain" / "artifact"
        if not (autoregressive / "config.json").is_file():
            if not run.is_dir() and run in autoregressive.parents:
                raise UserError(
                    f"{run} is not a run directory; finished runs are under runs/, or give --autoregressive"
                )
            if has_weights(autoregressive):
                kind_of(read_checkpoint(autoregressive).tensors, autoregressive)  # says so of a LoRA
            raise UserError(f"{autoregressive} holds no checkpoint with its config.json; {remedy}")
        trained = trained_details(autoregressive)
        max_pixels = trained.get("max_pixels", RELEASED_MAX_PIXELS)
        consistent = trained.get("consistent_edit_scale", False)
        if decoder is None:
            return ModelPaths(autoregressive, max_pixels, consistent_edit_scale=consistent)
        where = decoder_path or run / decoder / "artifact"
        if not where.exists():
            raise UserError(f"{where} does not exist; finish stage={decoder} of {run}, or give {decoder_flag}")
        found = find_decoder(where, [decoder], decoder_flag)
        where, details = found.file, found.details
        made = target_tokens_of(autoregressive) or RELEASED_TARGET_TOKENS
        painted = details.get("num_target_tokens", RELEASED_TARGET_TOKENS)
        if made != painted:
            raise UserError(
                f"{autoregressive} makes pictures of {made} tokens and {where} paints from {painted}; give the "
                "language model and the decoder of one run"
            )
        flux = flux or flux_of(run, decoder)
        if not flux.is_dir():
            raise UserError(
                f"{flux} does not exist; give --flux with a FLUX.1-dev directory (its VAE and text encoders are needed)"
            )
        return ModelPaths(autoregressive, max_pixels, decoder, where, flux, details, consistent)


def decoder_artifact(path: Path) -> tuple[Path, Manifest] | None:
    """(the weights, the manifest) of a decoder's artifact, given as its directory or as a file in it; else None.

    A link counts as what it leads to.
    """
    for place in (path, path.resolve()):
        directory = place if place.is_dir() else place.parent
        if (directory / MANIFEST).is_file():
            manifest = Manifest.load(directory)
            if manifest.kind in DECODER_FILES:
                return (place / DECODER_FILES[manifest.kind] if place.is_dir() else place), manifest
    return None


@dataclass(frozen=True)
class FoundDecoder:
    """file: its weights, or a directory of shards. manifest: None for weights that came without one.

    details: what the manifest says, or that of the released decoder.
    """

    file: Path
    manifest: Manifest | None
    details: dict[str, Any]


def find_decoder(where: Path, kinds: Sequence[str], role: str) -> FoundDecoder:
    """A decoder of one of `kinds`, by its artifact, a file in it, a bare file or a directory that holds one.

    role: the option or config key that gave `where`. Raises UserError when there is none, more than one, or an
    artifact of another kind.
    """
    artifact = decoder_artifact(where)
    if artifact is None and (where / MANIFEST).is_file():
        Manifest.load(where).require(kinds[0], where)
    if artifact is not None:
        file, manifest = artifact
        if manifest.kind not in kinds:
            manifest.require(" or ".join(kinds), where)
        return FoundDecoder(file, manifest, manifest.details)
    file = where
    if where.is_dir():
        names = [name for kind in kinds for name in of_either_format(DECODER_FILES[kind])]
        found = [where / name for name in names if (where / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{role}: {where} holds {' and '.join(file.name for file in found)}; give the path of one")
        if not found and not has_weights(where):
            raise UserError(f"{role}: {where} holds no {' and no '.join(names)}; give the path of a file")
        file = found[0] if found else where
    return FoundDecoder(file, None, RELEASED[kinds[0]])


def of_either_format(name: str) -> tuple[str, str]:
    stem = name.removesuffix(SAFETENSORS)
    return name, stem + BIN


def flag_of(decoder: str) -> str:
    """The option by which commands that take both decoders take this kind."""
    return f"--{decoder.replace('_', '-')}"


def flux_of(run: Path, decoder: str) -> Path:
    """The run's own stand-in of FLUX.1-dev, or what its decoder was trained with."""
    own, config = run / "standins" / "artifact" / "FLUX.1-dev", run / decoder / "config.yaml"
    if own.is_dir() or not config.is_file():
        return own
    try:
        return Path(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["flux"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{config} does not say what model.flux was; give --flux") from error


def default_run() -> Path:
    """The run that inference commands use unless given another: the weights that ship, or `tiny` where none do."""
    return SHIPPED_RUN if SHIPPED_RUN.is_dir() else runs_dir() / "tiny"


def results_of(run: Path) -> Path:
    """Where a page or scores of a run go unless said otherwise: into it, but what ships stays as it is."""
    return runs_dir() / run.name if run.resolve() == SHIPPED_RUN.resolve() else run


def memory_of(run: Path) -> Path | None:
    """The memory of what files hold for commands on a run; None for a run that ships, to which nothing is added."""
    where = results_of(run)
    return None if (where / MANIFEST).is_file() else where / CONTENTS


def runs_dir() -> Path:
    return Path(os.path.expanduser(os.environ.get("NEXUS_GEN_RUNS", "runs")))


def target_tokens_of(autoregressive: Path) -> int | None:
    """How many tokens a target image has in a checkpoint directory, by the headers of its files; no torch.

    None where there is nothing that says so: a plain Qwen2.5-VL, or no weights. Raises UserError for damaged files.
    """
    if not has_weights(autoregressive):
        return None
    return target_tokens(read_checkpoint(autoregressive).shapes)


def trained_details(autoregressive: Path) -> dict[str, Any]:
    """What the manifest of an autoregressive checkpoint says of its training; nothing for one that came without."""
    if not (autoregressive / MANIFEST).is_file():
        return {}
    return Manifest.load(autoregressive).require("ar_checkpoint", autoregressive).details
