"""What a pretraining loader makes of a batch, beside transformers' own: M-RoPE positions and patches, CPU per row.

Editing rows of two pictures each: of 72 px, as the weights that ship see them, and of 248, near what Qwen2.5-VL does.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nexus_gen.language.checkpoint import load_autoregressive, load_processor
from nexus_gen.language.conversation import byte_patches, patches
from nexus_gen.parts.models import SHIPPED_RUN

ROWS, SECONDS = 64, 2.0
QWEN = SHIPPED_RUN / "pretrain" / "artifact"


def cpu_per_row(work: Callable[[], Any]) -> float:
    """Milliseconds of one thread."""
    work()
    began, calls = time.process_time(), 0
    while time.process_time() - began < SECONDS:
        work()
        calls += 1
    return 1e3 * (time.process_time() - began) / calls / ROWS


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(work: str, theirs: Callable[[], Any], ours: Callable[[], Any]) -> None:
    before, after = cpu_per_row(theirs), cpu_per_row(ours)
    print(f"\n{work}: {before:.3f} ms CPU a row as usual, {after:.3f} here, {before / after:.1f} x", end="")


def test_positions() -> None:
    model = load_autoregressive(QWEN)
    image = torch.full((81,), model.config.image_token_id)
    row = torch.cat([torch.arange(20), image, torch.arange(60), image, torch.arange(4)])
    input_ids, grid = row.expand(ROWS, -1).contiguous(), torch.tensor([[1, 18, 18]] * (2 * ROWS))
    present = torch.ones_like(input_ids)

    def theirs() -> Tensor:
        modality = (input_ids == model.config.image_token_id).int()
        return model.model.get_rope_index(input_ids, modality, image_grid_thw=grid, attention_mask=present)[0]

    def ours() -> Tensor:
        return model.rope_position_ids(input_ids, present, grid)

    assert torch.equal(ours(), theirs())
    compare("positions of 2 pictures and 84 tokens of text", theirs, ours)


@pytest.mark.parametrize("px", [72, 248])
def test_patches(px: int) -> None:
    processor = load_processor(QWEN)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 256, (px, px, 3), dtype=np.uint8)) for _ in range(2 * ROWS)]
    theirs, ours = (lambda: patches(processor, pictures)[0]), (lambda: byte_patches(processor, pictures)[0])
    compare(f"patches of 2 pictures of {px} px, bytes for floats", theirs, ours)
    print(f", {theirs().nbytes / ours().nbytes:.0f} x less to hand over")
