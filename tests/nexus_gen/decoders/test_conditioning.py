"""Positions to the number, the projector's attention, and its start from a Qwen2.5-VL checkpoint."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_decoders import PROJECTOR

from nexus_gen.decoders.conditioning import (
    REFERENCE,
    TARGET,
    EditingProjector,
    GenerationAdapter,
    editing_text_ids,
    init_from_qwen,
    projector_position_ids,
)
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import LanguageGeometry, ProjectorGeometry

CONTEXT_DIM = 24


def test_projector_positions_count_patches_of_the_base_grid():
    target, reference = projector_position_ids(TARGET), projector_position_ids(REFERENCE)
    assert target.shape == (3, 1, 81)
    assert reference.shape == (3, 1, 324)
    assert not target[0].any()
    assert target[2, 0, :10].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 0]
    assert target[1, 0, ::9].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert reference[2, 0, :18].tolist() == list(range(0, 36, 2))
    wide = projector_position_ids((12, 24))
    assert wide.shape == (3, 1, 6 * 12)
    assert wide[1:, 0, -1].tolist() == [5 * 6, 11 * 3]


def test_text_ids_spread_the_grids_over_the_latents():
    ids = editing_text_ids((64, 96), with_reference=True)
    assert ids.shape == (1, 81 + 324, 3)
    assert ids[0, :, 0].tolist() == [0] * 81 + [1] * 324
    torch.testing.assert_close(ids[0, 80], torch.tensor([0, 8 * 64 / 18, 8 * 96 / 18]))
    torch.testing.assert_close(ids[0, 81 + 1], torch.tensor([1, 0, 96 / 36]))
    assert torch.equal(editing_text_ids((64, 96), with_reference=False), ids[:, :81])


def test_text_ids_in_bfloat16_carry_its_rounding():
    exact = editing_text_ids((64, 64), with_reference=True)
    rounded = editing_text_ids((64, 64), with_reference=True, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.bfloat16().float())
    assert (rounded - exact).abs().max() > 0.04  # more than a hundredth of a token's distance


def test_adapter_has_the_released_keys():
    state = GenerationAdapter(64, CONTEXT_DIM).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["0.weight"] == (24, 64)
    assert shapes["3.weight"] == (24, 24)
    assert set(shapes) == {f"{index}.{leaf}" for index in (0, 1, 3, 4) for leaf in ("weight", "bias")}


@torch.no_grad()
def test_projector_looks_both_ways_and_does_without_a_reference():
    projector = EditingProjector(PROJECTOR, CONTEXT_DIM)
    target, source = torch.randn(2, 81, 64), torch.randn(2, 324, 64)
    context = projector(target, source)
    assert context.shape == (2, 405, CONTEXT_DIM)
    moved = source.clone()
    moved[:, -1] += 1
    assert ((projector(target, moved) - context)[:, 0].abs() > 0).all(), (
        "a causal layer hides the last token from the first"
    )
    alone = projector(target)
    assert alone.shape == (2, 81, CONTEXT_DIM)
    assert not torch.allclose(alone, context[:, :81])
    with pytest.raises(ValueError, match="80 embeddings do not fill the grids"):
        projector(target[:, :80], target_grid=TARGET)
    with pytest.raises(ValueError, match="80 tokens is no square"):
        projector(target[:, :80])


@pytest.mark.parametrize("round_positions", [True, False])
@torch.no_grad()
def test_rotary_frequencies_follow_the_switch_and_not_the_casts(round_positions):
    projector = EditingProjector(PROJECTOR, CONTEXT_DIM, round_positions).bfloat16()
    positions = projector_position_ids(REFERENCE)
    cosines, _ = projector._rotation(torch.zeros(1, 324, 64, dtype=torch.bfloat16), positions)
    head_dim = PROJECTOR.hidden_size // PROJECTOR.num_heads
    frequencies = PROJECTOR.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    if round_positions:
        frequencies = frequencies.bfloat16().float()
    axis = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])  # sections of 2, 3, 3
    expected = (positions[axis, 0].T * frequencies).cos()
    torch.testing.assert_close(cosines[0], torch.cat([expected, expected], dim=-1).bfloat16(), rtol=0, atol=4e-3)


def test_projector_geometry_follows_the_language_model():
    language = LanguageGeometry(1000, 64, 128, 3, 4, 2, [2, 3, 3], 1e6, 1e-6)
    assert ProjectorGeometry.of(language) == PROJECTOR


@pytest.fixture
def qwen(tmp_path):
    """A checkpoint whose layer 0 lies in the second of two shards; returns (directory, the shard's tensors)."""
    layer = EditingProjector(PROJECTOR, CONTEXT_DIM).layers[0].state_dict()
    first = {"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2), "visual.proj.weight": torch.zeros(2)}
    second = {f"model.layers.0.{key}": torch.randn_like(value) for key, value in layer.items()}
    second["model.layers.10.mlp.up_proj.weight"] = torch.zeros(3)
    write_shards(tmp_path, first, second)
    return tmp_path, first, second


def write_shards(directory, *shards):
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / name)
        weight_map.update(dict.fromkeys(shard, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_projector_starts_from_layer_0_wherever_it_lies(qwen):
    directory, _, second = qwen
    projector = EditingProjector(PROJECTOR, CONTEXT_DIM).bfloat16()
    head = {key: value.clone() for key, value in projector.projector.state_dict().items()}
    init_from_qwen(projector, directory)
    for key, value in projector.layers[0].state_dict().items():
        assert torch.equal(value, second[f"model.layers.0.{key}"].bfloat16()), key
    for key, value in projector.projector.state_dict().items():
        assert torch.equal(value, head[key]), key
    assert all(parameter.requires_grad for parameter in projector.parameters())


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_projector_starts_from_a_checkpoint_of_one_file(qwen, tmp_path, prefix):
    _, _, second = qwen
    (tmp_path / "single").mkdir()
    renamed = {prefix + key.removeprefix("model."): tensor for key, tensor in second.items()}
    save_file(renamed, tmp_path / "single" / "model.safetensors")
    projector = EditingProjector(PROJECTOR, CONTEXT_DIM)
    init_from_qwen(projector, tmp_path / "single")
    weight = projector.layers[0].mlp.down_proj.weight
    assert torch.equal(weight, second["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("key", "replacement", "says"),
    [
        ("mlp.up_proj.weight", None, r"1 missing key \(model.layers.0.mlp.up_proj.weight\)"),
        ("mlp.extra.weight", torch.zeros(1), r"1 unexpected key \(model.layers.0.mlp.extra.weight\)"),
        ("mlp.up_proj.weight", torch.zeros(7, 64), r"mlp.up_proj.weight is \(7, 64\) instead of \(128, 64\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_key(qwen, key, replacement, says):
    directory, first, second = qwen
    second.pop(f"model.layers.0.{key}", None)
    if replacement is not None:
        second[f"model.layers.0.{key}"] = replacement
    write_shards(directory, first, second)
    projector = EditingProjector(PROJECTOR, CONTEXT_DIM)
    before = projector.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(UserError, match=says):
        init_from_qwen(projector, directory)
    assert torch.equal(projector.layers[0].mlp.up_proj.weight, before)


def test_a_missing_shard_is_named(qwen):
    directory, _, _ = qwen
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors is listed in model.safetensors.index.json"):
        init_from_qwen(EditingProjector(PROJECTOR, CONTEXT_DIM), directory)
