"""Files of named tensors: read lazily and without running anything they contain, written whole or not at all."""

import ctypes
import hashlib
import mmap
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from nexus_gen.artifacts.results import aside
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.headers import TensorHeader, header_bytes, read_checkpoint, require_plain
from nexus_gen.tensors.names import UNQUANTISED
from nexus_gen.tensors.weight_files import BIN, SAFETENSORS, TORCH_REMEDY, weight_files

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFiles(Mapping[str, Tensor]):
    """The tensors at a path, of the files that `weight_files` names, by their plain names.

    files: which these are. wrappers: what was taken off the names, as `plain_names` says.
    Headers apart, nothing is read before it is asked for: files are memory-mapped, privately, so that writing to a
    tensor leaves its file alone; `.bin` files may hold tensors only.
    Raises UserError for a path that is missing, truncated, quantised or holds anything else.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        self._maps: dict[Path, mmap.mmap] = {}
        self._mapped: dict[str, Tensor] = {}
        self._headers: dict[str, tuple[Path, TensorHeader]] = {}
        self.files = weight_files(self.path)
        if self.files.files[0].suffix == BIN:
            tensors = load_bin(self.path)
            dtypes = {key: NAMES[tensor.dtype] for key, tensor in tensors.items()}
            plain, self.wrappers = require_plain(self.path, dtypes)
            self._mapped = {plain[key]: tensor for key, tensor in tensors.items()}
        else:
            checkpoint = read_checkpoint(self.path)
            self._headers, self.wrappers = checkpoint.tensors, checkpoint.wrappers

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers or self._mapped)

    def __len__(self) -> int:
        return len(self._headers or self._mapped)

    def __getitem__(self, key: str) -> Tensor:
        """One tensor on `device`, in the file's dtype; on the CPU it is the file's own memory."""
        return self._map(key).to(self.device)

    def header(self, key: str) -> TensorHeader:
        """Shape and dtype of one tensor, without reading it."""
        if key in self._headers:
            return self._headers[key][1]
        return header_of(self._mapped[key])

    def release(self, key: str, made: Tensor | None = None) -> None:
        """Give back the memory that reading a tensor took, unless `made`, what was made of it, is that memory."""
        mapped = (self._mapped[key] if key in self._mapped else self._bytes(key)).untyped_storage()
        if made is None or made.device.type != "cpu" or made.untyped_storage().data_ptr() != mapped.data_ptr():
            drop_pages(mapped)

    def _map(self, key: str) -> Tensor:
        if key in self._mapped:
            return self._mapped[key]
        header = self._headers[key][1]
        dtype, raw = DTYPES[header.dtype], self._bytes(key)
        # Files by other writers may begin a tensor anywhere; ours begin it at a multiple of 8.
        aligned = raw if header.start % dtype.itemsize == 0 else raw.clone()
        return aligned.view(dtype).reshape(header.shape)

    def _bytes(self, key: str) -> Tensor:
        """A tensor's bytes in the mapped file, as a storage of its own."""
        path, header = self._headers[key]
        if not header.numel:
            return torch.empty(0, dtype=torch.uint8)
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return torch.frombuffer(self._maps[path], dtype=torch.uint8, count=header.num_bytes, offset=header.start)


def header_of(tensor: Tensor) -> TensorHeader:
    return TensorHeader(NAMES[tensor.dtype], tuple(tensor.shape))


def drop_pages(mapped: torch.UntypedStorage) -> None:
    """Take the whole pages of a mapped file out of this process's memory; the file keeps them.

    Without it a copy to a device or into another dtype leaves the source resident: twice the memory.
    """
    begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def load_bin(path: Path) -> dict[str, Tensor]:
    """A torch file of named tensors, memory-mapped on the CPU; UserError when it holds anything else."""
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to switch the check off
        raise UserError(
            f"{path} holds more than tensors, which could run code; use a file from its publisher"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole torch file, as torch.save writes since 1.6; fetch it again") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for key, tensor in tensors.items()
    ):
        inner = [key for key, value in tensors.items() if isinstance(value, dict)] if isinstance(tensors, dict) else []
        held = f" but holds {' and '.join(map(repr, inner))}, as checkpoints of trainers do" if inner else ""
        raise UserError(f"{path} does not map names to tensors{held}; {TORCH_REMEDY}")
    for key, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise UserError(f"{path} holds {key} as {tensor.dtype}, which is not read here; {UNQUANTISED}")
    return tensors


def fingerprint_tensors(tensors: Mapping[str, Tensor], part: str = "") -> str:
    """16 hex digits of SHA-256 over the names, dtypes, shapes and bytes of the tensors with `part` in their names."""
    sha256 = hashlib.sha256()
    for key in sorted(key for key in tensors if part in key):
        tensor = tensors[key]
        sha256.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return sha256.hexdigest()[:16]


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.safetensors` or `.bin` file; readers see the old file or the whole new one."""
    path = Path(path)
    if path.suffix not in (SAFETENSORS, BIN):
        raise UserError(f"cannot write tensors to {path}; name it .safetensors or .bin")
    with aside(path) as partial:
        if path.suffix == BIN:
            torch.save({key: owned(tensor) for key, tensor in tensors.items()}, partial)
        else:
            write_safetensors(partial, {key: header_of(tensor) for key, tensor in tensors.items()}, tensors.items())


def write_safetensors(path: Path, headers: Mapping[str, TensorHeader], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file tensor by tensor, so that no more than one is in host memory. `tensors` come in `headers`' order."""
    with path.open("wb") as file:
        file.write(header_bytes(headers))
        for (name, header), (given, tensor) in zip(headers.items(), tensors, strict=True):
            assert given == name and header_of(tensor) == header, f"{given} comes where {name} {header} was announced"
            if header.numel:
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def owned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and in storage of its own: torch.save would otherwise write all that a view looks into."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
