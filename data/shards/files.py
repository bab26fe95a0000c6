"""Embedding shards: webdataset tars whose samples hold safetensors and JSON, and what a manifest says of them.

A sample is `<key>.safetensors` (`target_embeds` (N, D), `latents` (C, h, w), for editing `source_embeds` (324, D)) and
`<key>.json`, the facts that the shard's listing repeats. A shard covers a fixed range of rows, so shards are the same
for any number of processes. Only reading tensors needs torch; specs and listings are read by launchers.
"""

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.records.reading import tar_damage
from nexus_gen.artifacts.artifact import Manifest, hash_file, write_text_atomic
from nexus_gen.specs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Sample = tuple[
    str, "bytes | dict[str, Tensor]", dict[str, Any]
]  # key, tensors or their safetensors, what the JSON says
EXTENSIONS = {"json", "safetensors"}
# Beside the shards, of the empty prompt: CLIP's `pooled` (1, P); when asked for, T5's `null_context` (1, 512, width).
CONSTANTS = "constants.safetensors"
EMBED_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int8")
Member = tuple[int, int]  # offset and size of a member's bytes in its tar


@dataclass(frozen=True)
class ShardSpec:
    """What every sample of an artifact looks like.

    latent_shape: empty where no latents are stored. dtype: how embeddings are stored, one of EMBED_DTYPES.
    encoder: fingerprint of the weights that embedded it. predicted: generation samples hold `predicted_embeds` too.
    """

    num_target_tokens: int
    num_reference_tokens: int
    embed_dim: int
    latent_shape: list[int]
    dtype: str
    encoder: str
    predicted: bool = False

    @staticmethod
    def load(manifest: Manifest) -> "ShardSpec":
        """UserError for what is no spec known here."""
        try:
            return ShardSpec(**manifest.details["spec"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"shards of stage={manifest.stage} have no spec that is known here ({error}); run that stage again"
            ) from error

    def require(self, where: str | os.PathLike[str], **wanted: Any) -> "ShardSpec":
        """This spec; UserError naming the first field that differs from `wanted`, with both values."""
        for name, value in wanted.items():
            found = asdict(self)[name]
            if found != value:
                raise UserError(
                    f"the shards in {where} have {name} {found} where this stage needs {value}; "
                    "give the shards of the embedding stage that belongs to it"
                )
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of a sample as `read_sample` returns it."""
        shapes: dict[str, tuple[int, ...]] = {"target_embeds": (self.num_target_tokens, self.embed_dim)}
        if self.predicted:
            shapes["predicted_embeds"] = shapes["target_embeds"]
        if self.num_reference_tokens:
            shapes["source_embeds"] = (self.num_reference_tokens, self.embed_dim)
        return {**shapes, "latents": tuple(self.latent_shape)} if self.latent_shape else shapes


def require_global_batch(where: str | os.PathLike[str], split: str, num_samples: int, global_batch_size: int) -> None:
    """UserError when a split is too small to fill one step of training."""
    if num_samples < global_batch_size:
        raise UserError(
            f"{where} holds {num_samples} {split} samples, fewer than one global batch of {global_batch_size}; "
            "lower trainer.global_batch_size or embed more rows"
        )


@dataclass
class Listing:
    """What a shard holds, beside it as `<shard>.json`: written after it, so a shard that has one is whole.

    recipe: what all its embeddings were made by. samples: the facts of each, in order, each with the `checksum` of its
    safetensors. quarantined: rows of its range that gave no sample: where, id, reason, and their planned facts.
    """

    bytes: int
    sha256: str
    recipe: dict[str, Any]
    samples: list[dict[str, Any]]
    quarantined: list[dict[str, Any]] = field(default_factory=list)

    def write(self, shard: Path) -> None:
        write_text_atomic(listing_path(shard), json.dumps(asdict(self), ensure_ascii=False, sort_keys=True) + "\n")

    @staticmethod
    def read(shard: Path) -> "Listing | None":
        """The listing of a whole shard; None when the shard is unfinished, cut short, or its listing is damaged."""
        try:
            listing = Listing(**json.loads(listing_path(shard).read_text(encoding="utf-8")))
            return listing if shard.stat().st_size == listing.bytes else None
        except (OSError, ValueError, TypeError):
            return None


def listing_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def checksum(data: bytes) -> str:
    """What a sample's JSON says of its safetensors: 16 hex digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


class _HashingTar:
    """An uncompressed tar that is written front to back and hashed once, byte for byte as webdataset's TarWriter does.

    A sample takes one write and few calls of the hash, which do not hold the interpreter's lock. tarfile cuts it into
    blocks of 10 kB, and beside busy threads it waits for the lock after each.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self.sha256 = hashlib.sha256()
        self.size = 0

    def add(self, members: dict[str, bytes]) -> None:
        """Name -> content."""
        pieces = []
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            # A float: it takes a header of its own, and shards of earlier versions have it.
            member.size, member.mtime, member.mode = len(data), 0.0, 0o444
            member.uname = member.gname = "bigdata"
            pieces += [member.tobuf(tarfile.PAX_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
        self._write(pieces)

    def _write(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.sha256.update(piece)
        self.size += (left := sum(map(len, pieces)))
        written = os.writev(self._file.fileno(), pieces)
        if written < left:  # the system took a part
            rest = memoryview(b"".join(pieces))[written:]
            while len(rest):
                rest = rest[self._file.write(rest) :]

    def finish(self) -> None:
        """Write the end of the tar and flush it to the disk."""
        end = 2 * tarfile.BLOCKSIZE
        self._write([bytes(end + -(self.size + end) % tarfile.RECORDSIZE)])
        os.fsync(self._file.fileno())  # the rename after it must not survive a power cut that the bytes do not

    def close(self) -> None:
        self._file.close()


def save_samples(tensors: "dict[str, Tensor]") -> list[bytes]:
    """The safetensors of each sample of a batch: the bytes that `safetensors.torch.save` makes of it.

    tensors: (B, ...) per name, contiguous, on the CPU. All headers are alike, so one is made, and each sample is
    copied once instead of three times.
    """
    import torch
    from safetensors.torch import save

    first = save({name: values[0].contiguous() for name, values in tensors.items()})
    length = 8 + int.from_bytes(first[:8], "little")
    places = {name: facts["data_offsets"][0] for name, facts in json.loads(first[8:length]).items()}
    names = sorted(tensors, key=lambda name: (places[name], tensors[name][0].numel()))
    rows = [tensors[name].flatten(1).view(torch.uint8).numpy() for name in names]
    return [first, *(b"".join([first[:length], *of_sample]) for of_sample in islice(zip(*rows, strict=True), 1, None))]


def write_shard(
    path: Path,
    samples: Iterable[Sample],
    recipe: dict[str, Any] | None = None,
    quarantined: list[dict[str, Any]] | None = None,
) -> Listing:
    """Write one tar aside, rename it, then write its listing; the bytes depend on the arguments alone.

    A sample whose facts have a `checksum` is not hashed again.
    """
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    listed = []
    with contextlib.closing(_HashingTar(aside)) as tar:
        for key, tensors, facts in samples:
            data = tensors if isinstance(tensors, bytes) else save(tensors)
            facts = {**facts, "checksum": facts.get("checksum") or checksum(data)}
            text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
            tar.add({f"{key}.json": text, f"{key}.safetensors": data})
            listed.append(facts)
        tar.finish()
    listing_path(path).unlink(missing_ok=True)  # of a shard that this one replaces
    os.replace(aside, path)
    listing = Listing(tar.size, tar.sha256.hexdigest(), recipe or {}, listed, quarantined or [])
    listing.write(path)
    return listing


def index_shard(path: Path) -> list[dict[str, Member]]:
    """Per sample, in order: extension -> place of its bytes.

    UserError when the tar is damaged or cut short, holds a member twice or a sample without its two members.
    """
    samples = scan_shard(path)
    for key, members in samples.items():
        if members.keys() != EXTENSIONS:
            raise UserError(
                f"sample {key} of shard {path} has {', '.join(sorted(members))} where it needs "
                f"{', '.join(sorted(EXTENSIONS))}; {repair_hint(path)}"
            )
    return list(samples.values())


def scan_shard(path: Path, salvage: bool = False) -> dict[str, dict[str, Member]]:
    """Key -> extension -> place of its bytes, for all members of a tar, whole samples or not.

    salvage: return what stands before damage instead of raising UserError for it.
    """
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension in samples.setdefault(key, {}):
                    raise UserError(f"shard {path} holds {member.name} twice; {repair_hint(path)}")
                samples[key][extension] = (member.offset_data, member.size)
            if damage := tar_damage(path, tar.offset, end_blocks=2):
                raise tarfile.ReadError(damage)
    except (tarfile.TarError, OSError) as error:
        if not salvage:
            raise UserError(f"shard {path} cannot be read ({error}); {repair_hint(path)}") from error
    return samples


def repair_hint(path: Path) -> str:
    artifact = path.parent.parent
    return f"`nexus-gen shards repair {artifact}` keeps what is whole, and its embedding stage makes the rest again"


def read_member(path: Path, member: Member) -> bytes:
    offset, size = member
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def read_sample(path: Path, members: dict[str, Member]) -> dict[str, "Tensor"]:
    """The tensors of one sample, embeddings of 8 bits as bfloat16. UserError names a shard that is damaged there."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from data.shards.quantize import dequantize

    try:
        return dequantize(load(read_member(path, members["safetensors"])))
    except SafetensorError as error:
        offset = members["safetensors"][0]
        raise UserError(f"shard {path} is damaged at byte {offset} ({error}); {repair_hint(path)}") from error


def same_file(path: Path, size: int, sha256: str) -> bool:
    """Whether a file has this size and checksum."""
    return path.is_file() and path.stat().st_size == size and hash_file(path) == sha256
