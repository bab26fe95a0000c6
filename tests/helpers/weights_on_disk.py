"""Weights as files hold them, compared, and a pickle that would run code."""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    ours_state, theirs_state = ours.state_dict(), theirs.state_dict()
    assert list(ours_state) == list(theirs_state)
    for key, value in ours_state.items():
        assert torch.equal(value, theirs_state[key]), key


def read_raw(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        return torch.load(path, map_location="cpu", weights_only=True)
    return load_file(path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
