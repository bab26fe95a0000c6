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

INDEX_SUFFIX = ".safetensors.index.json"
USUAL_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
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


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: those that its index names, or the one of a usual name, or its only one.

    Raises UserError when there is no such file, a choice between several, or an index that is unreadable or names a
    file that is not there.
    """
    indices = sorted(directory.glob(f"*{INDEX_SUFFIX}"))
    if not indices:
        singles = sorted(directory.glob("*.safetensors"))
        usual = [file for file in singles if file.name in USUAL_NAMES]
        if len(usual) == 1:
            return usual
        if len(singles) != 1:
            raise UserError(
                f"{directory} holds {len(singles)} .safetensors files and no index where one file or a "
                f"*{INDEX_SUFFIX} is needed"
            )
        return singles
    files = [directory / name for name in sorted(set(read_index(indices[0]).values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is listed in {indices[0].name} but does not exist; download it again")
    return files


def read_index(path: Path) -> dict[str, str]:
    """Name of a tensor -> name of the file that holds it; UserError when it is not readable."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): Path(name).name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable index ({error!r}); download it again") from error


def read_headers(path: Path) -> dict[str, tuple[Path, TensorHeader]]:
    """The tensors of a safetensors file or of a directory of them, each with the file that holds it.

    Raises UserError as `read_header` and `weight_files` do, and when an index names a tensor that its file lacks.
    """
    files = weight_files(path) if path.is_dir() else [path]
    found = {name: (file, tensor) for file in files for name, tensor in read_header(file).items()}
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}")) if path.is_dir() else []
    for name, file_name in read_index(indices[0]).items() if indices else ():
        if name not in found:
            raise UserError(f"{path / file_name} lacks {name}, which its index lists; download the file again")
    return found
