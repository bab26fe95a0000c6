"""From one layout on disk to another, tensor by tensor, at any width; refuses what does not fit, and whatever exists.

    nexus-gen models convert SRC DST --to released|diffusers|nexus-gen

`nexus_gen.tensors.layouts` knows the layouts; memory holds about one tensor at a time, and for a `.bin` file those that
are joined or swapped.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nexus_gen.artifacts.artifact import MANIFEST, Manifest, building, seal, write_text_atomic
from nexus_gen.artifacts.results import aside, check_result
from nexus_gen.parts.inspection import headers_of, weights_of
from nexus_gen.parts.models import DECODER_FILES, RELEASED, decoder_artifact
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import LATENT_SCALE, LATENT_SHIFT, VaeGeometry
from nexus_gen.tensors.files import TensorFiles, save_tensors, write_safetensors
from nexus_gen.tensors.headers import TensorHeader
from nexus_gen.tensors.kinds import NAMED_KEYS
from nexus_gen.tensors.layouts import (
    TARGETS,
    Layout,
    Sources,
    autoregressive_sources,
    decoder_sources,
    flux_sources,
    vae_sources,
)
from nexus_gen.tensors.tensor_shapes import Weights, read_config
from nexus_gen.tensors.translation import join, split
from nexus_gen.tensors.weight_files import (
    BIN,
    FLUX_WEIGHTS,
    INDEX_SUFFIX,
    SAFETENSORS,
    WEIGHT_SUFFIXES,
    WeightFiles,
    flux_part,
    flux_places,
    is_flux_directory,
)

SHARD_BYTES = 5_000_000_000
DIFFUSERS_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Plan:
    """One source of weights and the tensors that become of it, in order: (our key, how the target holds it)."""

    path: Path
    files: WeightFiles
    weights: Weights
    sources: Sources
    headers: dict[str, TensorHeader]  # of the target's tensors, in the order in which they are written


def convert(
    source: Path, target: Path, to: str, limit: int | None = NAMED_KEYS, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write `source` in layout `to` at `target`, which must not exist; what was done, in sentences.

    A file becomes a file (`.safetensors` or `.bin`), a directory a directory, with what lies beside its weights; a
    decoder's artifact becomes either.
    Raises UserError when the source is unreadable or does not fit its own geometry, naming the first `limit` keys of a
    kind (None: all), when it has no such layout, and when the target exists.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: there are {', '.join(TARGETS)}")
    if target.exists():
        raise UserError(f"{target} exists and is left alone; remove it or give another path")
    if not source.exists():
        raise UserError(f"{source} does not exist; give a checkpoint's file or directory")
    check_result(target, "DST", directory=target.suffix not in WEIGHT_SUFFIXES)
    artifact = decoder_artifact(source)
    if artifact is not None:
        return convert_artifact(*artifact, target, to, limit)
    if source.is_dir() and (source / MANIFEST).is_file():
        kind = Manifest.load(source).kind
        if kind != "ar_checkpoint":
            raise UserError(f"{source} is an artifact of kind {kind}; give the model's own path inside it")
    if source.is_dir() and is_flux_directory(source):
        return convert_flux_directory(source, target, to, limit, shard_bytes)
    plan = make_plan(source, to, limit)
    if plan.weights.kind == "autoregressive":
        return convert_autoregressive(plan, target, shard_bytes)
    if target.suffix in (SAFETENSORS, BIN):
        write_file(plan, target)
    elif to == "diffusers":
        with building(target) as partial:
            write_folder(plan, partial, shard_bytes)
    else:
        raise UserError(f"{target} is no name for a {plan.weights.kind}; end it in .safetensors or .bin")
    return [done(plan, target, to)]


def done(plan: Plan, target: Path, to: str) -> str:
    return f"{target}: {plan.weights.kind}, layout {plan.weights.layout} -> {to}, {len(plan.headers)} tensors"


def convert_artifact(file: Path, manifest: Manifest, target: Path, to: str, limit: int | None) -> list[str]:
    """A decoder's file as a file, or as an artifact of its own."""
    plan = make_plan(file, to, limit)
    if plan.weights.kind != manifest.kind:
        raise UserError(
            f"{file} holds a {plan.weights.kind} in the artifact of a {manifest.kind}; copy it out of there"
        )
    if target.suffix in (SAFETENSORS, BIN):
        write_file(plan, target)
        return [
            done(plan, target, to),
            f"its manifest, which says how it is sampled, stays behind; give a directory instead of {target.name} to "
            "convert both",
        ]
    with building(target) as partial:
        write_file(plan, partial / DECODER_FILES[manifest.kind])
        details = {**manifest.details, "converted": {"of": manifest.fingerprint, "to": to}}
        seal(partial, replace(manifest, details=details))
    return [done(plan, target, to)]


def target_sources(weights: Weights, to: str) -> Sources:
    """Where the target holds each of our keys. Raises UserError when the kind has no such layout."""
    keys, kind = weights.shapes, weights.kind
    if kind in ("flux", "vae"):
        layout: Layout = {"released": "bfl", "diffusers": "diffusers"}.get(to, "nexus-gen")  # type: ignore[assignment]
        if kind == "flux":
            return flux_sources(keys, layout)
        return vae_sources(keys, VaeGeometry(**weights.geometry["vae"], norm_groups=1), layout)
    if to == "diffusers":
        raise UserError(f"diffusers has no layout for a {kind}; --to released or --to nexus-gen")
    own: Layout = "released" if to == "released" else "nexus-gen"
    return autoregressive_sources(keys, own) if kind == "autoregressive" else decoder_sources(keys, own)


def make_plan(path: Path, to: str, limit: int | None) -> Plan:
    """Read headers and refuse what does not fit. Raises UserError."""
    found = headers_of(path)
    weights, headers = weights_of(path, found), found.tensors
    problems = weights.differences.sentences(limit)
    if problems:
        raise UserError(f"{path} does not fit together as a {weights.kind}: {'; '.join(problems)}; fetch it again")
    sources = target_sources(weights, to)
    written: dict[str, TensorHeader] = {}
    for key, source in weights.sources.items():
        dtypes = {headers[name].dtype for name in source.keys}
        if len(dtypes) > 1:
            raise UserError(f"{path} holds {', '.join(source.keys)} in different dtypes ({', '.join(sorted(dtypes))})")
        target = sources[key]
        for name, shape in zip(target.keys, target.shapes(weights.shapes[key]), strict=True):
            written[name] = TensorHeader(next(iter(dtypes)), shape)
    return Plan(path, found.files, weights, sources, written)


def converted(plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The target's tensors in the order of `plan.headers`; the source's memory is given back behind each."""
    files = TensorFiles(plan.path)
    for key, source in plan.weights.sources.items():
        tensor = join(source, [files[name] for name in source.keys], plan.weights.shapes[key])
        yield from split(plan.sources[key], tensor).items()
        for name in source.keys:
            files.release(name)


def write_file(plan: Plan, target: Path) -> None:
    if target.suffix == BIN:
        save_tensors(dict(converted(plan)), target)
        return
    with aside(target) as partial:
        write_safetensors(partial, plan.headers, converted(plan))


def write_shards(plan: Plan, directory: Path, stem: str, shard_bytes: int) -> None:
    """`<stem>.safetensors`, or shards of at most `shard_bytes` (a larger tensor alone) and their index."""
    shards: list[dict[str, TensorHeader]] = [{}]
    for name, header in plan.headers.items():
        if shards[-1] and sum(other.num_bytes for other in shards[-1].values()) + header.num_bytes > shard_bytes:
            shards.append({})
        shards[-1][name] = header
    tensors = converted(plan)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        write_safetensors(directory / name, shard, (next(tensors) for _ in shard))
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(header.num_bytes for header in plan.headers.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text_atomic(directory / f"{stem}{INDEX_SUFFIX}", json.dumps(index, indent=2) + "\n")


def write_folder(plan: Plan, directory: Path, shard_bytes: int) -> None:
    """One of diffusers' folders: weights and the config that its loader builds the model from."""
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(plan, directory, DIFFUSERS_STEM, shard_bytes)
    config = diffusers_config(plan)
    if config is not None:
        write_text_atomic(directory / "config.json", json.dumps(config, indent=2) + "\n")


def diffusers_config(plan: Plan) -> dict[str, Any] | None:
    """The source's own config.json, or one for the released geometry; None where shapes alone do not tell it."""
    folder = plan.path if plan.path.is_dir() else plan.path.parent
    config = read_config(folder)
    if config is not None and config.get("_class_name") in ("FluxTransformer2DModel", "AutoencoderKL"):
        return config
    released = RELEASED["generation_decoder"]
    if plan.weights.kind == "flux":
        flux = plan.weights.geometry["transformer"]
        head_dim = flux["hidden_size"] // flux["num_heads"]
        if head_dim != sum(released["transformer"]["rope_axes_dim"]):
            return None
        return {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": head_dim,
            "axes_dims_rope": released["transformer"]["rope_axes_dim"],
            "guidance_embeds": True,
            "in_channels": 4 * flux["latent_channels"],
            "joint_attention_dim": flux["context_dim"],
            "num_attention_heads": flux["num_heads"],
            "num_layers": flux["num_joint_blocks"],
            "num_single_layers": flux["num_single_blocks"],
            "patch_size": 1,
            "pooled_projection_dim": flux["pooled_dim"],
        }
    vae = plan.weights.geometry["vae"]
    if vae["channels"] != released["vae"]["channels"]:
        return None
    levels = len(vae["channels"])
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": vae["channels"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": vae["latent_channels"],
        "layers_per_block": vae["num_res_blocks"],
        "mid_block_add_attention": True,
        "norm_num_groups": released["vae"]["norm_groups"],
        "sample_size": 1024,
        "scaling_factor": LATENT_SCALE,
        "shift_factor": LATENT_SHIFT,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def convert_autoregressive(plan: Plan, target: Path, shard_bytes: int) -> list[str]:
    """The weights, a flat config.json, which old and new readers take, and what lies beside them."""
    if plan.path.is_file():
        raise UserError(f"{plan.path} is one file of a checkpoint; give its directory, {plan.path.parent}")
    from nexus_gen.language.checkpoint import load_config, released_config  # transformers: seconds to import

    dtype = next(iter(converted(plan)))[1].dtype
    config = released_config(load_config(plan.path), dtype)
    with building(target) as partial:
        write_shards(plan, partial, "model", shard_bytes)
        write_text_atomic(partial / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        left_out = copy_beside(plan.path, partial, [plan.files])
    layout = "nexus-gen" if any(key.startswith("model.language_model.") for key in plan.headers) else "released"
    return [done(plan, target, layout), *left_out]


def convert_flux_directory(source: Path, target: Path, to: str, limit: int | None, shard_bytes: int) -> list[str]:
    """The transformer and the autoencoder in the layout, and everything else as it is."""
    plans = {title: make_plan(flux_part(source, title), to, limit) for title in FLUX_WEIGHTS}
    with building(target) as partial:
        for title, plan in plans.items():
            file, folder = FLUX_WEIGHTS[title]
            if to == "diffusers":
                write_folder(plan, partial / folder, shard_bytes)
            else:
                write_file(plan, partial / file)
        for child in sorted(source.iterdir()):
            if child.is_dir() and child.name not in ("transformer", "vae") and not child.name.startswith("."):
                shutil.copytree(child, partial / child.name)
        left_out = copy_beside(source, partial, [plan.files for plan in plans.values()])
    left_out += [
        f"left out: {place.name}, because the {title} is read from {plan.path.name}"
        for title, plan in plans.items()
        for place in flux_places(source, title)[1:]
    ]
    return [*(done(plan, target, to) for plan in plans.values()), *left_out]


def copy_beside(source: Path, target: Path, read: list[WeightFiles]) -> list[str]:
    """Copy a directory's files that are no weights and that `target` lacks; a sentence on each of the other weights."""
    left_out = []
    for file in sorted(source.iterdir()):
        if file.is_dir() and file.name == "processor":
            shutil.copytree(file, target / file.name)
        if not file.is_file() or file.name == MANIFEST or file.name.endswith(INDEX_SUFFIX):
            continue
        if file.suffix in WEIGHT_SUFFIXES:
            if not any(file in files.files for files in read):
                left_out.append(f"left out: {file.name}, weights of something else; convert it by itself")
        elif not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    return left_out
