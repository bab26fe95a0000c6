"""The files of a checkpoint, listed with sizes and checksums, so that a damaged one is found before it is loaded.

The list is written last. Checkpoints of earlier versions have none; torch's own files hold checksums, and of those
checkpoints these are read through.
"""

import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed

from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.headers import read_header
from train.runs.checkpoints import COMPLETE, LISTING

log = logging.getLogger(__name__)

DAMAGED = "damaged-"  # before the name of a checkpoint that is set aside
THREADS = 8  # that read files; checksums are taken outside the interpreter's lock
CHUNK_BYTES = 1 << 22


def write_listing(directory: Path) -> None:
    """List what all ranks have written; every rank calls it, and takes the checksums of its share of the files."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = files_of(directory)[rank::world_size]
    parts: list[dict[str, dict[str, int]]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(parts, {name: facts_of(directory / name) for name in own})
    if rank == 0:
        whole = {name: facts for part in parts for name, facts in part.items()}
        write_text_atomic(directory / LISTING, json.dumps(dict(sorted(whole.items())), indent=1) + "\n")


def files_of(directory: Path) -> list[str]:
    """The files of a checkpoint, largest first, so that ranks share them evenly."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name not in (LISTING, COMPLETE)]
    return [str(path.relative_to(directory)) for path in sorted(paths, key=lambda path: (-path.stat().st_size, path))]


def facts_of(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


def checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def damage_of(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None for a whole one. Reads all of it."""
    try:
        text = (directory / LISTING).read_text(encoding="utf-8")
    except FileNotFoundError:
        return damage_without_listing(directory)
    except (OSError, UnicodeDecodeError) as error:
        return f"{LISTING} cannot be read: {error}"
    try:
        listing = {name: (int(facts["bytes"]), int(facts["crc32"])) for name, facts in json.loads(text).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{LISTING} is not a list of files"

    def damage_of_file(name: str) -> str | None:
        path, (size, expected) = directory / name, listing[name]
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} of {size} bytes"
            return None if checksum(path) == expected else f"{name} does not hold what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    return first_damage(damage_of_file, sorted(listing)) if listing else f"{LISTING} is empty"


def damage_without_listing(directory: Path) -> str | None:
    """The same of a checkpoint of an earlier version, by what can be told of its files alone."""
    names = [path.name for path in directory.rglob("*") if path.is_file()]
    if "latest" not in names:
        return "the file latest is missing"
    for path in directory.rglob("latest"):
        named = path.read_text(encoding="utf-8", errors="replace").strip()
        if not named or not any((path.parent / named).glob("*.pt")):
            return f"{path.relative_to(directory)} names {named!r}, which is not there"
        if missing := missing_state(path.parent / named):
            return f"{missing.relative_to(directory)} is missing"

    def damage_of_file(name: str) -> str | None:
        path = directory / name
        try:
            if path.stat().st_size == 0:
                return f"{name} is empty"
            if path.suffix in (".pt", ".pth", ".ckpt"):
                with zipfile.ZipFile(path) as archive:
                    return None if archive.testzip() is None else f"{name} does not hold what was written"
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            if path.suffix == ".safetensors":
                read_header(path)
        except (OSError, UserError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            return f"{name} cannot be read: {error}"
        return None

    return first_damage(damage_of_file, sorted(files_of(directory)))


def missing_state(directory: Path) -> Path | None:
    """A file of DeepSpeed's that has to be there and is not: the model's, or that of a rank before the last."""
    found = [path.name for path in directory.glob("*_states.pt")]
    if not any(name.endswith("model_states.pt") for name in found):
        return directory / "mp_rank_00_model_states.pt"
    matches = [match for name in found if (match := re.fullmatch(r"(.*zero_pp_rank_)(\d+)(_.*)", name))]
    for before, last, after in (match.groups() for match in matches):
        for rank in range(int(last)):
            if not (directory / f"{before}{rank}{after}").is_file():
                return directory / f"{before}{rank}{after}"
    return None


def first_damage(damage: Callable[[str], str | None], names: Sequence[str]) -> str | None:
    with ThreadPoolExecutor(THREADS) as threads:
        return next((found for found in threads.map(damage, names) if found is not None), None)


def set_damaged_aside(checkpoints: Sequence[Path], step_of: Callable[[Path], int]) -> None:
    """Leave the newest whole checkpoint the newest one; rank zero calls it before anything is loaded.

    checkpoints: oldest first. Damaged ones behind the newest whole one are renamed, until `forget_damaged`.
    Raises UserError where none is whole: nothing is renamed then.
    """
    damaged: list[tuple[Path, str]] = []
    for number, path in reversed(list(enumerate(checkpoints))):
        # An earlier version, which wrote none, cannot have followed one that did.
        lost = not (path / LISTING).exists() and any((earlier / LISTING).exists() for earlier in checkpoints[:number])
        damage = f"{LISTING} is missing" if lost else damage_of(path)
        if damage is None:
            break
        damaged.append((path, damage))
    if not damaged:
        return
    newest, damage = damaged[0]
    if len(damaged) == len(checkpoints):
        them = ", ".join(path.name for path, _ in damaged)
        raise UserError(
            f"checkpoint {newest} is damaged ({damage}), and there is no whole one before it to resume from; remove "
            f"{them}, or give resume=false, to start the stage over"
        )
    for path, reason in damaged:
        aside = path.with_name(DAMAGED + path.name)
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(path, aside)
        log.warning("checkpoint %s is damaged (%s); it is now %s", path, reason, aside.name)
    whole = checkpoints[len(checkpoints) - len(damaged) - 1]
    repeated = step_of(newest) - step_of(whole)
    log.warning("training resumes from %s and repeats %d step%s", whole, repeated, "" if repeated == 1 else "s")


def forget_damaged(directory: Path) -> None:
    """Remove what was set aside, once a newer whole checkpoint is there."""
    for path in directory.glob(f"{DAMAGED}*"):
        shutil.rmtree(path)
