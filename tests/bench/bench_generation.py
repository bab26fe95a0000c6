"""The 81 embeddings of an image out of one forward pass, beside the published way: one pass per token.

    python -m pytest tests/bench/bench_generation.py -o python_files='bench_*.py' -s      (or make bench)

Both use the key-value cache and give the same embeddings; the reference below is what the published generation loop
does with a model, written for batches. On a GPU the released geometry with random weights, elsewhere a small one.
"""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_gen.language.checkpoint import SpecialTokenIds, build_autoregressive
from nexus_gen.language.generate import generate_reply
from nexus_gen.language.model import NexusGenForConditionalGeneration
from nexus_gen.parts.models import RELEASED_LANGUAGE, RELEASED_VISION
from nexus_gen.specs.geometry import RELEASED_TARGET_TOKENS, LanguageGeometry, VisionGeometry, tokens_per_side

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
SMALL = LanguageGeometry(1000, 512, 1408, 8, 8, 2, [8, 12, 12], 1e6, 1e-6)
SMALL_VISION = VisionGeometry(14, 64, 96, 2, 4, 112, [1])
TOKENS = SpecialTokenIds(image=990, video=991, vision_start=992, vision_end=993, end_of_turn=994, padding=995)
PROMPT_TOKENS = 64
REPEATS = 3


@torch.no_grad()
def token_by_token(model: NexusGenForConditionalGeneration, input_ids: Tensor) -> Tensor:
    """The embeddings of an image behind each prompt (B, S): 81 cached decode steps; (B, 81, D)."""
    batch, length = input_ids.shape
    device = input_ids.device
    start = torch.full((batch, 1), model.config.vision_start_token_id, device=device)
    embed = model.get_input_embeddings()
    positions = torch.arange(length + 1, device=device).expand(3, batch, -1)
    out: Any = model.model(
        inputs_embeds=embed(torch.cat([input_ids, start], dim=1)), position_ids=positions, use_cache=True
    )
    predicted = [model.vision_head(out.last_hidden_state[:, -1])]
    for index in range(RELEASED_TARGET_TOKENS - 1):
        row, column = divmod(index, tokens_per_side(RELEASED_TARGET_TOKENS))
        position = length + 1 + torch.tensor([0, row, column], device=device)
        out = model.model(
            inputs_embeds=model.image_prefill_embeds(torch.tensor([[index]], device=device)).expand(batch, -1, -1),
            position_ids=position[:, None, None].expand(3, batch, 1),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        predicted.append(model.vision_head(out.last_hidden_state[:, -1]))
    return torch.stack(predicted, dim=1)


def one_pass(model: NexusGenForConditionalGeneration, input_ids: Tensor) -> Tensor:
    reply = generate_reply(model, input_ids, max_new_tokens=RELEASED_TARGET_TOKENS + 2, force_image_first=True)
    return torch.stack([images[0] for images in reply.image_embeds])


def seconds(call: Any) -> float:
    """The fastest of a few calls, which machines shared with others disturb least."""
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        began = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


@pytest.fixture(scope="module")
def model() -> NexusGenForConditionalGeneration:
    vision, language = (RELEASED_VISION, RELEASED_LANGUAGE) if CUDA else (SMALL_VISION, SMALL)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return build_autoregressive(vision, language, TOKENS, seed=0).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("batch", [1, 8])
def test_one_pass_beside_token_by_token(model: NexusGenForConditionalGeneration, batch: int) -> None:
    input_ids = torch.randint(900, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours, published = one_pass(model, input_ids), token_by_token(model, input_ids)
    error = ((ours - published).abs().max() / published.abs().max()).item()
    assert error < (5e-2 if CUDA else 1e-4)
    fast, slow = (seconds(lambda run=run: run(model, input_ids)) for run in (one_pass, token_by_token))
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:,.0f} M parameters, {DEVICE}"
    print(
        f"\n81 embeddings, batch {batch}, {size}: token by token {slow * 1e3:.0f} ms, one pass {fast * 1e3:.0f} ms, "
        f"{slow / fast:.1f} times as fast; they differ by {error:.1e}"
    )
