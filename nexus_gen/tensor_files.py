"""Files of named tensors: read lazily and without running anything they contain, written whole or not at all."""

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nexus_gen.specs.errors import UserError

INDEX_SUFFIX = ".safetensors.index.json"


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a `.safetensors` or `.bin` file, or of a directory with one safetensors file or with an index.

    Headers apart, nothing is read before it is asked for; `.bin` files are memory-mapped and may hold tensors only.
    Raises UserError for a path that is missing, truncated or holds anything else.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        self.path = Path(path)
        self.device = torch.device(device)
        self._handles: dict[Path, Any] = {}
        self._loaded: dict[str, Tensor] = {}
        self._file_of: dict[str, Path] = {}
        if self.path.is_dir():
            self._list_directory()
        elif not self.path.is_file():
            raise UserError(f"{self.path} does not exist; give the path of a .safetensors or .bin file")
        elif self.path.suffix == ".safetensors":
            self._file_of = dict.fromkeys(self._open(self.path).keys(), self.path)
        elif self.path.suffix == ".bin":
            self._loaded = load_bin(self.path)
        else:
            raise UserError(f"{self.path} is neither a .safetensors nor a .bin file")

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded or self._file_of)

    def __len__(self) -> int:
        return len(self._loaded or self._file_of)

    def __getitem__(self, key: str) -> Tensor:
        """One tensor on `device`, in the file's dtype."""
        if key in self._loaded:
            return self._loaded[key].to(self.device)
        return self._open(self._file_of[key]).get_tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one tensor, read from the header."""
        if key in self._loaded:
            return tuple(self._loaded[key].shape)
        path = self._file_of[key]
        try:
            return tuple(self._open(path).get_slice(key).get_shape())
        except SafetensorError as error:
            raise UserError(f"{path} lacks {key}, which its index lists; download the file again") from error

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt", device=str(self.device))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
        return self._handles[path]

    def _list_directory(self) -> None:
        indices = sorted(self.path.glob(f"*{INDEX_SUFFIX}"))
        singles = sorted(self.path.glob("*.safetensors"))
        if not indices:
            if len(singles) != 1:
                raise UserError(
                    f"{self.path} holds {len(singles)} .safetensors files and no index where one file or a "
                    f"*{INDEX_SUFFIX} is needed"
                )
            self._file_of = dict.fromkeys(self._open(singles[0]).keys(), singles[0])
            return
        try:
            weight_map = json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"]
            self._file_of = {key: self.path / name for key, name in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{indices[0]} is not a readable index ({error!r}); download it again") from error
        for path in sorted(set(self._file_of.values())):
            if not path.is_file():
                raise UserError(f"{path} is listed in {indices[0].name} but does not exist; download it again")


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
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} does not map names to tensors; export the decoder again")
    return tensors


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.safetensors` or `.bin` file; readers see the old file or the whole new one."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".bin"):
        raise UserError(f"cannot write tensors to {path}; name it .safetensors or .bin")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".bin":
            torch.save(dict(tensors), aside)
        else:
            save_file(dict(tensors), aside, metadata={"format": "pt"})  # transformers and diffusers ask for the format
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
