"""What holds at every geometry and in every batch, against references of a few lines that share no code with ours."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_decoders import FLUXES, randomised
from tiny_language import left_padded, reply_one_by_one
from torch import Tensor

from nexus_gen.decoders.conditioning import REFERENCE, TARGET, EditingProjector
from nexus_gen.decoders.decoders import build_editing_decoder, build_generation_decoder
from nexus_gen.flux.flow_match import euler_sample, sampling_sigmas
from nexus_gen.language.checkpoint import SpecialTokenIds, build_autoregressive
from nexus_gen.language.generate import generate_reply, generated_embeddings, teacher_forced_pairs
from nexus_gen.language.model import NexusGenForConditionalGeneration
from nexus_gen.specs.geometry import LanguageGeometry, ProjectorGeometry, VisionGeometry

TOKENS = SpecialTokenIds(image=100, video=101, vision_start=102, vision_end=103, end_of_turn=104, padding=105)
# Other widths, head counts and depths than the golden model's; several full-attention blocks, among windows of 4 x 4.
GEOMETRIES = [
    (VisionGeometry(4, 24, 40, 5, 3, 16, [1, 3]), LanguageGeometry(128, 48, 80, 3, 3, 1, [4, 2, 2], 1e6, 1e-6)),
    (VisionGeometry(6, 32, 48, 3, 4, 48, [0, 2]), LanguageGeometry(112, 72, 64, 1, 6, 3, [2, 2, 2], 1e4, 1e-5)),
]
TOLERANCE = 2e-5  # relative, float32; measured worst: 6.0e-7


@pytest.fixture(params=GEOMETRIES, ids=["48 wide", "72 wide"], scope="module")
def model(request: pytest.FixtureRequest) -> NexusGenForConditionalGeneration:
    vision, language = request.param
    made = build_autoregressive(vision, language, TOKENS, seed=3).eval()
    with torch.no_grad():  # of an untrained size they are too small to show a difference
        for parameter in made.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return made


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


class Conversation:
    """Rows of text and images: a positive number is that many text tokens, a grid a context image, "target" one."""

    def __init__(self, model: NexusGenForConditionalGeneration, parts: list[Any], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        config: Any = model.config.vision_config
        ids: list[int] = []
        labels: list[int] = []
        grids, patches = [], []
        for part in parts:
            if isinstance(part, int):
                text = torch.randint(100, (part,), generator=generator).tolist()
                ids += text
                labels += text
                continue
            height, width = (18, 18) if part == "target" else part
            tokens = height * width // 4
            ids += [TOKENS.vision_start, *[TOKENS.image] * tokens, TOKENS.vision_end]
            inner = TOKENS.image if part == "target" else -100
            labels += [TOKENS.vision_start, *[inner] * tokens, TOKENS.vision_end]
            grids.append([1, height, width])
            values = config.in_channels * config.temporal_patch_size * config.patch_size**2
            patches.append(torch.randn(height * width, values, generator=generator))
        self.input_ids, self.labels = torch.tensor([ids]), torch.tensor([labels])
        self.grids = torch.tensor(grids) if grids else None
        self.patches = torch.cat(patches) if patches else None

    @property
    def batch(self) -> dict[str, Tensor]:
        batch = {"input_ids": self.input_ids, "labels": self.labels}
        return batch if self.grids is None else batch | {"pixel_values": self.patches, "image_grid_thw": self.grids}

    def positions(self) -> Tensor:
        """M-RoPE by its definition, (3, 1, S): text counts on, an image is a grid, then the largest + 1 follows."""
        ids, grids = self.input_ids[0].tolist(), [] if self.grids is None else self.grids.tolist()
        rows: list[tuple[int, int, int]] = []
        following, place = 0, 0
        while place < len(ids):
            if ids[place] != TOKENS.image:
                rows.append((following,) * 3)
                following, place = following + 1, place + 1
                continue
            _, height, width = grids.pop(0)
            height, width = height // 2, width // 2
            rows += [(following, following + y, following + x) for y in range(height) for x in range(width)]
            following, place = following + max(height, width), place + height * width
        return torch.tensor(rows).T[:, None]


CONVERSATIONS = [
    [3, (8, 12), 2, "target", 4, "target", 2],
    [5, (4, 4), (12, 6), 1, (6, 10), 3, "target", 1],
    [7],
    ["target", 2],
]


def conversations(model: NexusGenForConditionalGeneration) -> list[Conversation]:
    return [Conversation(model, parts, seed) for seed, parts in enumerate(CONVERSATIONS)]


def stacked(rows: list[Conversation], side: str) -> dict[str, Tensor]:
    """The rows as one padded batch."""
    longest = max(row.input_ids.shape[1] for row in rows)

    def pad(row: Tensor, value: int) -> Tensor:
        missing = longest - row.shape[1]
        return F.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)

    return {
        "input_ids": torch.cat([pad(row.input_ids, TOKENS.padding) for row in rows]),
        "labels": torch.cat([pad(row.labels, -100) for row in rows]),
        "attention_mask": torch.cat([pad(torch.ones_like(row.input_ids), 0) for row in rows]),
        "pixel_values": torch.cat([row.patches for row in rows if row.patches is not None]),
        "image_grid_thw": torch.cat([row.grids for row in rows if row.grids is not None]),
    }


def test_positions_follow_the_definition_with_any_number_of_images(model: NexusGenForConditionalGeneration) -> None:
    rows = conversations(model)
    for row in rows:
        assert torch.equal(model.rope_position_ids(row.input_ids, None, row.grids), row.positions())
    for side in ("left", "right"):
        batch = stacked(rows, side)
        together = model.rope_position_ids(batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"])
        for number, row in enumerate(rows):
            real = batch["attention_mask"][number].bool()
            assert torch.equal(together[:, number, real], row.positions()[:, 0])
            assert (together[:, number, ~real] == 1).all()


@torch.no_grad()
def test_padded_and_packed_rows_are_each_row_alone(model: NexusGenForConditionalGeneration) -> None:
    rows = conversations(model)
    alone = [model(**row.batch) for row in rows]
    expected = torch.cat([output.predicted_embeds for output in alone])
    # Every text token but the first of a sequence is scored, so their mean is weighted by their number.
    scored = [int(((row.labels != -100) & (row.labels != TOKENS.image))[:, 1:].sum()) for row in rows]
    text = sum(number * output.text_loss for number, output in zip(scored, alone, strict=True)) / sum(scored)
    packed = {
        "input_ids": torch.cat([row.input_ids for row in rows], dim=1),
        "labels": torch.cat([row.labels for row in rows], dim=1),
        "position_ids": torch.cat(
            [torch.cat([torch.arange(row.input_ids.shape[1])[None, None], row.positions()]) for row in rows],
            dim=2,
        ),
        **{name: value for name, value in stacked(rows, "right").items() if "image" in name or "pixel" in name},
    }
    masked = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    for batch in (stacked(rows, "left"), stacked(rows, "right"), packed, masked):
        together = model(**batch)
        assert_near(together.predicted_embeds, expected)
        assert_near(together.text_loss.reshape(1), text.reshape(1))


def test_each_packed_sequence_sends_the_gradient_of_its_row(model: NexusGenForConditionalGeneration) -> None:
    """Targets of several rows: the image loss of a batch is the mean over all their tokens, and so its gradient."""
    rows = [row for row in conversations(model) if (row.labels == TOKENS.image).any()]
    weight = model.vision_head.weight

    def gradient(batches: list[dict[str, Tensor]], shares: list[float]) -> Tensor:
        model.zero_grad()
        for batch, share in zip(batches, shares, strict=True):
            (share * model(**batch).image_loss).backward()
        assert weight.grad is not None
        return weight.grad.clone()

    images = [int((row.labels == TOKENS.image).sum()) // 81 for row in rows]
    shares = [number / sum(images) for number in images]
    assert_near(gradient([stacked(rows, "left")], [1.0]), gradient([row.batch for row in rows], shares))


def test_one_pass_equals_one_by_one_at_other_geometries(model: NexusGenForConditionalGeneration) -> None:
    """A context image before it in one row, none in the other; text behind the image until the budget ends."""
    model.generation_config.eos_token_id = []
    row = Conversation(model, [3, (8, 12), 2], seed=9)
    prompts = [row.input_ids[0].tolist(), [9, 8]]
    input_ids, mask = left_padded(prompts, TOKENS.padding)
    reply = generate_reply(model, input_ids, mask, row.patches, row.grids, max_new_tokens=90, force_image_first=True)
    for number, prompt in enumerate(prompts):
        pictures = (row.patches, row.grids) if number == 0 else (None, None)
        tokens, images = reply_one_by_one(model, torch.tensor([prompt]), *pictures, 90, 81, force_image_first=True)
        assert reply.new_tokens[number].tolist() == tokens
        for made, expected in zip(reply.image_embeds[number], images, strict=True):
            assert_near(made, expected)


@pytest.mark.parametrize(("num_tokens", "grid"), [(25, (5, 5)), (49, (5, 9)), (121, (11, 11))])
@torch.no_grad()
def test_images_of_other_numbers_of_tokens_are_what_training_predicts(num_tokens: int, grid: tuple[int, int]) -> None:
    model = build_autoregressive(*GEOMETRIES[0], TOKENS, seed=3, num_target_tokens=num_tokens).eval()
    prompt = torch.arange(6)[None]
    reply = generate_reply(
        model,
        prompt,
        max_new_tokens=num_tokens + 4,
        force_image_first=True,
        positions_after_image="trained",
        target_grid=grid,
    )
    assert reply.image_embeds[0][0].shape == (grid[0] * grid[1], 48)
    values = 3 * 2 * model.config.vision_config.patch_size**2
    batch = {
        "input_ids": reply.sequences,
        "labels": reply.sequences.masked_fill(torch.arange(reply.sequences.shape[1]) < 6, -100),
        "pixel_values": torch.randn(4 * grid[0] * grid[1], values),
        "image_grid_thw": torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]),
    }
    trained = model(**batch)
    assert_near(reply.image_embeds[0][0], trained.predicted_embeds)
    assert_near(teacher_forced_pairs(model, batch)[0][0], trained.predicted_embeds)
    if grid[0] == grid[1]:
        assert_near(generated_embeddings(model, batch)[0], trained.predicted_embeds)
    with pytest.raises(ValueError, match=r"target_grid \(9, 9\) is none of"):
        generate_reply(model, prompt, max_new_tokens=5, target_grid=(9, 9))


# ---- decoders


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, N, head_dim) by angles (N, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@pytest.mark.parametrize(
    "geometry",
    [
        ProjectorGeometry(48, 80, 6, 3, [2, 1, 1], 1e6, 1e-6),
        ProjectorGeometry(96, 64, 2, 1, [8, 8, 8], 1e4, 1e-5),
        ProjectorGeometry(40, 24, 5, 5, [1, 2, 1], 1e5, 1e-6),
    ],
)
@pytest.mark.parametrize("grids", [(TARGET, REFERENCE), ((8, 12), (12, 20)), (TARGET, None)])
@torch.no_grad()
def test_the_projector_is_its_definition(geometry: ProjectorGeometry, grids: tuple[Any, Any]) -> None:
    projector = randomised(EditingProjector(geometry, 20))
    layer, head_dim = projector.layers[0], geometry.hidden_size // geometry.num_heads
    sizes = [grid for grid in grids if grid is not None]
    inputs = [torch.randn(2, height * width // 4, geometry.hidden_size) for height, width in sizes]
    places = [
        (0.0, row * 72 / height, column * 72 / width)
        for height, width in sizes
        for row in range(height // 2)
        for column in range(width // 2)
    ]
    axis = [which for which, section in enumerate(geometry.mrope_section) for _ in range(section)]
    frequencies = geometry.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.tensor(places)[:, axis] * frequencies

    def heads(x: Tensor, number: int) -> Tensor:
        return x.unflatten(-1, (number, head_dim)).transpose(1, 2)

    x = torch.cat(inputs, dim=1)
    y = rms(x, layer.input_layernorm.weight, geometry.rms_norm_eps)
    attention = layer.self_attn
    queries = rotate(heads(attention.q_proj(y), geometry.num_heads), angles)
    keys = rotate(heads(attention.k_proj(y), geometry.num_key_value_heads), angles)
    values = heads(attention.v_proj(y), geometry.num_key_value_heads)
    group = geometry.num_heads // geometry.num_key_value_heads
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    mixed = (queries @ keys.transpose(-1, -2) / head_dim**0.5).softmax(-1) @ values
    x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
    y = rms(x, layer.post_attention_layernorm.weight, geometry.rms_norm_eps)
    x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    norm, up, inner, _, down, last = projector.projector
    x = F.silu(rms(up(rms(x, norm.weight, geometry.rms_norm_eps)), inner.weight, geometry.rms_norm_eps))
    x = rms(down(x), last.weight, geometry.rms_norm_eps)
    given = {"target_grid": grids[0], **({"reference_grid": grids[1]} if grids[1] else {})}
    assert_near(projector(*inputs, **given), x)


@torch.no_grad()
def test_an_editing_decoder_places_any_square_of_target_tokens() -> None:
    """By the grid that their number makes, in the projector and in the transformer."""
    flux = FLUXES[0]
    model = build_editing_decoder(flux, ProjectorGeometry(48, 80, 6, 3, [2, 1, 1], 1e6, 1e-6))
    seen: dict[str, Tensor] = {}
    model.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    latents, inputs = torch.randn(1, flux.latent_channels, 8, 8), (torch.ones(1), torch.zeros(1, flux.pooled_dim))
    target, source = torch.randn(1, 49, 48), torch.randn(1, 324, 48)
    model(latents, torch.tensor([9.0]), *inputs, target, source)
    places = [[0.0, row * 8 / 14, column * 8 / 14] for row in range(7) for column in range(7)]
    assert_near(seen["text_ids"][0, :49], torch.tensor(places))
    assert_near(seen["context"], model.embedding_merger(target, source, target_grid=(14, 14)))
    with pytest.raises(ValueError, match="50 tokens is no square"):
        model(latents, torch.tensor([9.0]), *inputs, torch.randn(1, 50, 48))


@pytest.mark.parametrize("flux", FLUXES)
@torch.no_grad()
def test_editing_ids_place_the_context_over_latents_of_any_shape(flux) -> None:
    """What the transformer is told of positions, for latents that are not square."""
    model = build_editing_decoder(flux, ProjectorGeometry(48, 80, 6, 3, [2, 1, 1], 1e6, 1e-6))
    seen: dict[str, Tensor] = {}
    model.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    latents = torch.randn(2, flux.latent_channels, 6, 20)
    model(latents, torch.tensor([9.0, 800.0]), torch.ones(2), torch.zeros(1, flux.pooled_dim),
          torch.randn(2, 81, 48), torch.randn(2, 324, 48))  # fmt: skip
    expected = [
        [float(which), row * 6 / side, column * 20 / side]
        for which, side in ((0, 18), (1, 36))
        for row in range(side // 2)
        for column in range(side // 2)
    ]
    torch.testing.assert_close(seen["text_ids"], torch.tensor(expected).expand(2, -1, -1))


@torch.no_grad()
def test_guidance_moves_away_from_the_negative_prompt_step_by_step() -> None:
    flux = FLUXES[1]
    model = randomised(build_generation_decoder(flux, 20))
    target, negative, pooled = torch.randn(2, 81, 20), torch.randn(1, 7, flux.context_dim), torch.randn(2, 1, 10)
    noise = torch.randn(2, flux.latent_channels, 4, 6)

    def positive_velocity(latents: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
        return model(latents, timestep, guidance, pooled[0], target)

    def negative_velocity(latents: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
        return model.transformer(latents, timestep, negative.expand(len(latents), -1, -1), pooled[1], guidance)

    sampled = euler_sample(positive_velocity, noise, 3, 2.5, 4.0, negative_velocity)
    latents, sigmas = noise, sampling_sigmas(3).tolist()
    for now, then in pairwise(sigmas):
        inputs = latents, torch.full((2,), 1000 * now), torch.full((2,), 2.5)
        toward, away = positive_velocity(*inputs), negative_velocity(*inputs)
        latents = latents + (then - now) * (4 * toward - 3 * away)
    assert_near(sampled, latents)


@torch.no_grad()
def test_guidance_is_rounded_with_the_latents() -> None:
    """bfloat16 turns 3.5 x 1000 into 3504, as wherever FLUX is sampled in it; float32 does not."""
    flux = FLUXES[0]
    model = build_generation_decoder(flux, 20)
    seen: list[float] = []
    model.transformer.guidance_embedder.register_forward_pre_hook(lambda _, args: seen.append(float(args[0][0])))
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.zeros(shape, dtype=dtype) for shape in ((1, 16, 4, 4), (1, flux.pooled_dim), (1, 81, 20))]
        model.to(dtype)(inputs[0], torch.tensor([500.0]), torch.tensor([3.5]), *inputs[1:])
    assert seen == [3500.0, 3504.0]
