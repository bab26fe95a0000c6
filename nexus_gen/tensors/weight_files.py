"""Which files are a checkpoint: the one answer that inspection, conversion and every loader share. No torch."""

import json
import logging
import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from nexus_gen.specs.errors import UserError

log = logging.getLogger(__name__)

SAFETENSORS, BIN = ".safetensors", ".bin"
INDEX_SUFFIX = ".safetensors.index.json"
USUAL_STEMS = ("model", "diffusion_pytorch_model")
SHARD = re.compile(r"(?P<stem>.+)-\d+-of-(?P<total>\d+)\.safetensors")
TORCH_REMEDY = "save its tensors by name with safetensors.torch.save_file"
OTHER_FORMATS = {
    ".gguf": ("GGUF, quantised weights of llama.cpp", "give the publisher's .safetensors files"),
    **dict.fromkeys((".pt", ".pth", ".ckpt"), ("a torch pickle, which may hold anything", TORCH_REMEDY)),
    **dict.fromkeys((".onnx", ".h5", ".msgpack", ".engine"), ("for another framework", "give its .safetensors files")),
}
WEIGHT_SUFFIXES = (SAFETENSORS, BIN, *OTHER_FORMATS)
# The parts of a FLUX.1-dev directory: title -> BFL's file, diffusers' folder; the file is read where both are.
FLUX_WEIGHTS = {
    "transformer": ("flux1-dev.safetensors", "transformer"),
    "autoencoder": ("ae.safetensors", "vae"),
}


@dataclass(frozen=True)
class WeightFiles:
    """files: what is read. shard_of: tensor -> the file's name, as an index has it; empty without one.

    unread: names of other weights in the directory, which are left alone.
    """

    files: list[Path]
    shard_of: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def weight_files(path: Path) -> WeightFiles:
    """The weights at `path`: a .safetensors or .bin file, or a directory of safetensors files.

    Of a directory: the files that its index names, or the one of a usual name (model, diffusion_pytorch_model), or its
    only one. Two sets of weights are never chosen from.
    Raises UserError when there is no such file, more than one set, or an index that is unreadable or names a file that
    is not there.
    """
    if path.is_dir():
        return files_of_directory(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give the path of a .safetensors or .bin file")
    if path.suffix not in (SAFETENSORS, BIN):
        what, remedy = OTHER_FORMATS.get(path.suffix.lower(), ("", "give one of these, or a directory"))
        raise UserError(f"{path} is neither a .safetensors nor a .bin file{what and f' but {what}'}; {remedy}")
    return WeightFiles([path])


def has_weights(directory: Path) -> bool:
    """Whether there is anything for `weight_files` to find."""
    return any(name.endswith((SAFETENSORS, INDEX_SUFFIX)) for name in visible(directory))


def files_of_directory(directory: Path) -> WeightFiles:
    names = visible(directory)
    weights = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    singles = [name for name in weights if name.endswith(SAFETENSORS)]
    usual = [name for name in singles if name.removesuffix(SAFETENSORS) in USUAL_STEMS]
    index = chosen_index(directory, [name for name in names if name.endswith(INDEX_SUFFIX)])
    if index is not None:
        shard_of = read_index(directory / index)
        read = sorted(set(shard_of.values()))
        for name in read:
            if not (directory / name).is_file():
                raise UserError(f"{directory / name} is listed in {index} but does not exist; download it again")
        own = index.removesuffix(INDEX_SUFFIX)
        rivals = [name for name in singles if name not in read and (name in usual or name == own + SAFETENSORS)]
        if rivals:
            raise UserError(
                f"{directory} holds two sets of weights, {rivals[0]} and the files that {index} lists; "
                "move the set that is not meant out of it"
            )
        leftover = tuple(name for name in singles if name not in read and stem_of(name) == own)
        if leftover:
            warn_of_leftovers(directory, index, leftover)
    else:
        shard_of, read = {}, usual
        shards = [name for name in singles if stem_of(name) is not None]
        rivals = [name for name in shards if f"{stem_of(name)}{SAFETENSORS}" in usual]
        if rivals:
            raise UserError(
                f"{directory} holds two sets of weights, {usual[0]} and {rivals[0]} without an index; "
                "move the set that is not meant out of it"
            )
        if not usual and shards:
            raise UserError(
                f"{directory} holds {len(shards)} of the files that a checkpoint was split into ({shards[0]}, ...) and "
                f"no {stem_of(shards[0])}{INDEX_SUFFIX}, which lists them; download it too"
            )
        if len(usual) != 1:
            read = singles
        if len(read) != 1:
            raise UserError(
                f"{directory} holds {len(singles)} .safetensors files and no index where one file or a "
                f"*{INDEX_SUFFIX} is needed{'' if singles else others(weights)}"
            )
    return WeightFiles([directory / name for name in read], shard_of, [name for name in weights if name not in read])


def visible(directory: Path) -> list[str]:
    """File names; hidden ones are what editors, macOS and unfinished downloads leave."""
    entries = os.scandir(directory) if directory.is_dir() else ()
    return sorted(entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir())


def stem_of(name: str) -> str | None:
    """What files of a split checkpoint have in common; None for a file that is whole."""
    match = SHARD.fullmatch(name)
    return match["stem"] if match and int(match["total"]) > 1 else None


def chosen_index(directory: Path, indices: list[str]) -> str | None:
    """The index, the only one of a usual name among several, or None. UserError where neither decides."""
    usual = [name for name in indices if name.removesuffix(INDEX_SUFFIX) in USUAL_STEMS]
    candidates = usual if len(indices) > 1 and usual else indices
    if len(candidates) > 1:
        raise UserError(
            f"{directory} holds {len(candidates)} indices ({', '.join(candidates)}); "
            "move the set that is not meant out of it"
        )
    return candidates[0] if candidates else None


@cache
def warn_of_leftovers(directory: Path, index: str, names: tuple[str, ...]) -> None:
    """Once a process."""
    log.warning("%s: %s is not read: %s does not list it", directory, ", ".join(names), index)


def others(names: list[str]) -> str:
    """What lies in a directory instead of safetensors files."""
    if not names:
        return ""
    suffix = Path(names[0]).suffix
    what, remedy = OTHER_FORMATS.get(suffix, ("a torch pickle", TORCH_REMEDY))
    return f"; {names[0]} is {what}: {remedy}"


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of the file beside the index that holds it; UserError when it is not readable."""
    try:
        weight_map = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        for name in weight_map.values():
            if Path(name).name != name or not name.endswith(SAFETENSORS):
                raise ValueError(f"{name!r} is not a safetensors file beside it")
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable index ({error!r}); download it again") from error


def is_flux_directory(path: Path) -> bool:
    marks = ("model_index.json", *(file for file, _ in FLUX_WEIGHTS.values()))
    return any(os.path.lexists(path / name) for name in marks)


def flux_part(path: Path, title: str) -> Path:
    """Where a part of FLUX_WEIGHTS is: in a FLUX.1-dev directory, or `path` itself when it is that part already.

    Raises UserError for a FLUX.1-dev directory that lacks it.
    """
    found = flux_places(path, title)
    if found:
        return found[0]
    if path.is_dir() and is_flux_directory(path):
        file, folder = FLUX_WEIGHTS[title]
        raise UserError(f"{path} has no {title}: neither {file} nor {folder}/; give the path of one part instead")
    return path


def flux_places(path: Path, title: str) -> list[Path]:
    """All places of a directory that hold the part; the first one is read."""
    return [path / name for name in FLUX_WEIGHTS[title] if os.path.lexists(path / name)]
