"""What a safetensors file says of its tensors, read from its header alone; no torch, so that it takes milliseconds.

The format: 8 bytes with the header's length, little-endian; a JSON object from name to dtype, shape and byte range,
with free text under `__metadata__`; the tensors' bytes, without gaps.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.names import UNQUANTISED, plain_names, quantisation
from nexus_gen.tensors.weight_files import WeightFiles, weight_files

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # what the format allows
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file. dtype: safetensors' name of it. start: its first byte, from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a `.safetensors` file in the file's order.

    Raises UserError unless the header is whole and the file as long as it says.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError(f"it has {file_bytes} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes and the file has {file_bytes}")
            fields = json.loads(file.read(length))
        fields.pop(METADATA, None)
        tensors, end = {}, 0
        for name, entry in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            if entry["dtype"] not in ITEM_BYTES:
                raise UserError(f"{path} holds {name} as {entry['dtype']}, which is not read here; {UNQUANTISED}")
            tensor = TensorHeader(entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
            if begin != end or stop - begin != tensor.num_bytes:
                raise ValueError(f"{name} occupies bytes {begin} to {stop}")
            tensors[name], end = tensor, stop
        if 8 + length + end != file_bytes:
            raise ValueError(f"its header describes {8 + length + end} bytes and the file has {file_bytes}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    return tensors


def header_bytes(tensors: Mapping[str, TensorHeader]) -> bytes:
    """The beginning of a file that holds `tensors` one after the other in this order."""
    fields: dict[str, object] = {METADATA: {"format": "pt"}}  # transformers and diffusers ask for the format
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.num_bytes
        fields[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of weight files by their plain names, each with the file that holds it.

    wrappers: what was taken off the names, as `plain_names` says.
    """

    files: WeightFiles
    tensors: dict[str, tuple[Path, TensorHeader]]
    wrappers: list[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, (_, tensor) in self.tensors.items()}


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a safetensors file or of a directory of them.

    Raises UserError as `read_header` and `weight_files` do, when files and index contradict each other, and for
    quantised weights.
    """
    files = weight_files(path)
    found: dict[str, tuple[Path, TensorHeader]] = {}
    for file in files.files:
        for name, tensor in read_header(file).items():
            if name in found:
                raise UserError(
                    f"{found[name][0]} and {file.name} both hold {name}, so one of them is stale; download both again"
                )
            found[name] = file, tensor
    for name, file_name in files.shard_of.items():
        if name not in found or found[name][0].name != file_name:
            raise UserError(f"{path / file_name} lacks {name}, which its index lists; download the file again")
    plain, wrappers = require_plain(path, {name: tensor.dtype for name, (_, tensor) in found.items()})
    return Checkpoint(files, {plain[name]: held for name, held in found.items()}, wrappers)


def require_plain(path: Path, dtypes: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """`plain_names` of a file's tensors. Raises UserError when two become the same, and for quantised weights.

    dtypes: of each tensor, by safetensors' names.
    """
    plain, wrappers = plain_names(dtypes)
    if len(set(plain.values())) < len(plain):
        twice = next(name for name, inner in plain.items() if inner != name and inner in plain)
        raise UserError(f"{path} holds both {twice} and {plain[twice]}; save one state dict to a new file")
    how = quantisation(dtypes)
    if how is not None:
        raise UserError(f"{path} is quantised ({how}), which is not read here; {UNQUANTISED}")
    return plain, wrappers
