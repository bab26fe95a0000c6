"""An exponential moving average of a model's weights, in float32, cut into one share per process.

Each process averages 1/W of every parameter: under ZeRO-3 the share that it holds anyway, taken from the optimizer's
float32 copy. No process ever holds more than one whole parameter besides what it trains with. Shares are laid out as
ZeRO-3 lays out its own (rank r holds elements r x ceil(n / W) and on), so the files of a checkpoint can be read by any
number of processes and under any ZeRO stage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.utils import safe_get_local_fp32_param
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "average-{rank:05d}-of-{world_size:05d}.safetensors"
FILES = "average-*.safetensors"
FIRST = "first."  # before the names of the weights that training began with
WARMUP = 10  # steps: the average of a young model forgets faster


def decay_at(step: int, decay: float) -> float:
    """The decay of the step-th update, counted from 0: it rises to `decay`, so that the first weights are forgotten."""
    return min(decay, (1 + step) / (WARMUP + step))


class WeightAverage:
    """Follows the trainable parameters of `module`; every process has to make every call.

    decay: in (0, 1). The average begins at the weights when `start` is called. initial: share of these weights in what
    `gather` and `applied` give; they are kept for it.
    Source of `initial`: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models".
    """

    def __init__(self, module: nn.Module, decay: float, rank: int, world_size: int, initial: float = 0.0) -> None:
        self.decay = decay
        self.initial = initial
        self.rank, self.world_size = rank, world_size
        self.parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.shares: dict[str, Tensor] = {}
        self.first_shares: dict[str, Tensor] = {}  # with `initial` alone
        self.num_updates = 0

    def start(self) -> None:
        self.shares = {name: self._master_share(own).float().clone() for name, own in self.parameters.items()}
        if self.initial:
            self.first_shares = {name: share.clone() for name, share in self.shares.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        weights = [self._master_share(parameter).float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.shares.values()), weights, 1 - decay_at(self.num_updates, self.decay))
        self.num_updates += 1

    def gather(self) -> dict[str, Tensor]:
        """The whole average in the parameters' dtype on the CPU of rank zero, by name; nothing on the others."""
        gathered = {}
        for name, parameter in self.parameters.items():
            whole = self._whole(self._result(name).to(parameter.dtype), parameter)
            if self.rank == 0:
                gathered[name] = whole.cpu()
        return gathered

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the weights; afterwards they are back, bit for bit."""
        kept = {name: self._share(parameter).clone() for name, parameter in self.parameters.items()}
        self._write({name: self._result(name) for name in self.shares})
        try:
            yield
        finally:
            self._write(kept)

    def save(self, directory: Path) -> None:
        """This process's file of a checkpoint."""
        stored = {**self.shares, **{FIRST + name: share for name, share in self.first_shares.items()}}
        tensors = {name: share.cpu().contiguous() for name, share in stored.items()}
        path = directory / FILE.format(rank=self.rank, world_size=self.world_size)
        save_file(tensors, path, metadata={"num_updates": str(self.num_updates)})

    def load(self, directory: Path) -> None:
        """Go on from a checkpoint, of whatever number of processes."""
        with_files = [safe_open(path, "pt") for path in sorted(directory.glob(FILES))]
        self.num_updates = int(with_files[0].metadata()["num_updates"])
        for name, parameter in self.parameters.items():
            device = self._share(parameter).device
            self.shares[name] = self._stored(with_files, name).to(device)
            if self.initial:
                self.first_shares[name] = self._stored(with_files, FIRST + name).to(device)

    # -- shares

    def _result(self, name: str) -> Tensor:
        """This process's part of the average, with its share of the first weights."""
        own = self.shares[name]
        return own.lerp(self.first_shares[name], self.initial) if self.initial else own

    def _stored(self, files: list[Any], name: str) -> Tensor:
        """This process's part of a tensor in the files of a checkpoint."""
        if len(files) == self.world_size:
            return files[self.rank].get_tensor(name)
        return self._cut(torch.cat([file.get_tensor(name) for file in files]))

    def _cut(self, flat: Tensor) -> Tensor:
        """This process's part of a whole parameter."""
        size = -(-len(flat) // self.world_size)
        return flat[self.rank * size : (self.rank + 1) * size]

    def _share(self, parameter: Any) -> Tensor:
        """This process's part of the weights as the model uses them; a view where they are whole."""
        if not hasattr(parameter, "ds_id"):
            return self._cut(parameter.detach().view(-1))
        return self._unpadded(parameter.ds_tensor.detach(), parameter)

    def _master_share(self, parameter: Any) -> Tensor:
        """The same of the optimizer's float32 copy, where there is one in the same cut."""
        if not hasattr(parameter, "ds_id"):
            return self._share(parameter)
        return self._unpadded(safe_get_local_fp32_param(parameter), parameter)

    def _unpadded(self, share: Tensor, parameter: Any) -> Tensor:
        """ZeRO-3 fills the last shares up."""
        size = -(-parameter.ds_numel // self.world_size)
        return share.view(-1)[: max(0, min(size, parameter.ds_numel - self.rank * size))]

    def _whole(self, share: Tensor, parameter: Any) -> Tensor:
        """Gathered from all processes, in the parameter's shape, on the device."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        numel = shape.numel()
        size = -(-numel // self.world_size)
        padded = share.new_zeros(size)
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat(parts)[:numel].view(shape)

    @torch.no_grad()
    def _write(self, shares: dict[str, Tensor]) -> None:
        """Make the weights that the model uses those of the shares."""
        for name, parameter in self.parameters.items():
            whole = self._whole(shares[name].to(parameter.dtype), parameter)
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
                if not partitioned or self.rank == 0:
                    parameter.data.copy_(whole)
