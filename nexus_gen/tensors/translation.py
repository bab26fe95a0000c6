"""Tensors between a file's layout and ours, and strict loading: nothing missing, left over or of another shape.

`nexus_gen.tensors.layouts` says which of a file's tensors are which of ours; this module joins, splits and swaps them.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.files import TensorFiles
from nexus_gen.tensors.layouts import Source, Sources
from nexus_gen.tensors.tensor_shapes import Differences, differences


def join(source: Source, parts: list[Tensor], shape: Iterable[int]) -> Tensor:
    """Our tensor of `shape` out of a file's."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (swap_halves(tensor) if source.swap_halves else tensor).reshape(tuple(shape))


def split(source: Source, tensor: Tensor) -> dict[str, Tensor]:
    """A file's tensors out of ours."""
    shapes = source.shapes(tensor.shape)
    tensor = swap_halves(tensor) if source.swap_halves else tensor
    parts = tensor.split([shape[0] for shape in shapes])
    return {key: part.reshape(shape) for key, part, shape in zip(source.keys, parts, shapes, strict=True)}


def swap_halves(tensor: Tensor) -> Tensor:
    """(scale, shift) along dim 0 -> (shift, scale), and back."""
    return torch.cat(tensor.chunk(2)[::-1])


def translate(state: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """Our state dict -> the tensors of a file."""
    tensors: dict[str, Tensor] = {}
    for key, source in sources.items():
        tensors.update(split(source, state[key]))
    return tensors


def require_fit(path: Path, name: str, found: Differences) -> None:
    """UserError naming the keys by which a file differs from the model of that name."""
    problems = found.sentences()
    if problems:
        raise UserError(
            f"{path} does not fit the configured {name}: {', '.join(problems)}; "
            "give the file that belongs to this geometry"
        )


def load_strictly(
    module: nn.Module,
    files: TensorFiles,
    sources: Sources,
    dtype: torch.dtype | None = None,
    concerns: Callable[[str], bool] = lambda key: True,
) -> None:
    """Fill every tensor of `module` from `files`, each once and nothing left over, on the files' device.

    sources: for each key of the module. dtype: None keeps the module's. concerns: which keys of the files are meant.
    Raises UserError naming the keys that are missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.items()}
    file = {key: files.header(key).shape for key in files if concerns(key)}
    require_fit(files.path, type(module).__name__, differences(file, shapes, sources))
    state = {}
    for key, source in sources.items():
        parts = []
        for name in source.keys:
            parts.append(files[name].to(wanted[key].dtype if dtype is None else dtype))
            files.release(name, parts[-1])
        state[key] = join(source, parts, shapes[key])
        for name in source.keys:
            files.release(name, state[key])
    module.load_state_dict(state, strict=True, assign=True)
