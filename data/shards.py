"""Embedding shards: webdataset tars whose samples hold safetensors and JSON, and what a manifest says of them.

A sample is `<key>.safetensors` (`target_embeds` (81, D), `latents` (C, h, w), for editing `source_embeds` (324, D)) and
`<key>.json`. A shard covers a fixed range of rows, so shards are the same for any number of processes. Only writing
and reading samples needs torch; specs are read by launchers.
"""

import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus_gen.specs.artifact import Manifest
from nexus_gen.specs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Sample = tuple[str, dict[str, "Tensor"], dict[str, Any]]  # key, tensors, what the JSON says
EXTENSIONS = {"json", "safetensors"}
Member = tuple[int, int]  # offset and size of a member's bytes in its tar


@dataclass(frozen=True)
class ShardSpec:
    """What every sample of an artifact looks like. encoder: fingerprint of the checkpoint that embedded it."""

    num_target_tokens: int
    num_reference_tokens: int
    embed_dim: int
    latent_shape: list[int]
    dtype: str
    encoder: str

    @staticmethod
    def load(manifest: Manifest) -> "ShardSpec":
        return ShardSpec(**manifest.details["spec"])

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


def require_global_batch(where: str | os.PathLike[str], split: str, num_samples: int, global_batch_size: int) -> None:
    """UserError when a split is too small to fill one step of training."""
    if num_samples < global_batch_size:
        raise UserError(
            f"{where} holds {num_samples} {split} samples, fewer than one global batch of {global_batch_size}; "
            "lower trainer.global_batch_size or embed more rows"
        )


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write one tar aside and rename it; the bytes depend on the samples alone. Returns the number of samples."""
    from safetensors.torch import save
    from webdataset import TarWriter

    aside = path.with_name(f".{path.name}.tmp")
    count = 0
    with TarWriter(str(aside), encoder=False, mtime=0.0) as writer:
        for key, tensors, facts in samples:
            text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
            writer.write({"__key__": key, "safetensors": save(tensors), "json": text})
            count += 1
    os.replace(aside, path)
    return count


def index_shard(path: Path) -> list[dict[str, Member]]:
    """Per sample, in order: extension -> place of its bytes.

    UserError when the tar is damaged or cut short, holds a member twice or a sample without its two members.
    """
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension in samples.setdefault(key, {}):
                    raise UserError(f"shard {path} holds {member.name} twice; run its embedding stage again")
                samples[key][extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"shard {path} cannot be read ({error}); run its embedding stage again") from error
    for key, members in samples.items():
        if members.keys() != EXTENSIONS:
            raise UserError(
                f"sample {key} of shard {path} has {', '.join(sorted(members))} where it needs "
                f"{', '.join(sorted(EXTENSIONS))}; run its embedding stage again"
            )
    return list(samples.values())


def read_sample(path: Path, members: dict[str, Member]) -> dict[str, "Tensor"]:
    """The tensors of one sample. UserError names the shard when its bytes are not what they should be."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    offset, size = members["safetensors"]
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    try:
        return load(data)
    except SafetensorError as error:
        raise UserError(f"shard {path} is damaged at byte {offset} ({error}); run its embedding stage again") from error
