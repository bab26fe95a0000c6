"""What storage keeps and loses of embeddings, and the gap between two, by hand on rows that are not square."""

import math

import pytest
import torch

from data.shards.quantize import FLOAT8_MAX, INT8_MAX, dequantize, embedding_gap, quantize, rounded, storage_error

# Two tokens of three numbers: the largest magnitudes are 2.54 and 1.
TOKENS = torch.tensor([[2.54, -1.27, 0.013], [0.5, -1.0, 0.0]])


def test_eight_bits_are_the_nearest_of_255_steps_of_each_token() -> None:
    stored = quantize("x_embeds", TOKENS, "int8")
    # Steps of 2.54 / 127 = 0.02 and 1 / 127: 0.013 is 0.65 steps, and 0.5 is 63.5, which goes to the even neighbour.
    assert stored["x_embeds"].dtype == torch.int8
    assert stored["x_embeds"].tolist() == [[127, -64, 1], [64, -127, 0]]
    assert stored["x_embeds.scale"].flatten().tolist() == pytest.approx([0.02, 1 / 127])
    assert stored["x_embeds.scale"].shape == (2, 1) and stored["x_embeds.scale"].dtype == torch.float32
    restored = dequantize(stored)
    assert restored.keys() == {"x_embeds"} and restored["x_embeds"].dtype == torch.bfloat16
    expected = torch.tensor([[2.54, -1.28, 0.02], [64 / 127, -1.0, 0.0]])
    assert torch.equal(restored["x_embeds"], expected.bfloat16())


def test_a_batch_has_a_scale_for_each_token() -> None:
    batch = torch.stack([TOKENS, 3 * TOKENS])
    stored = quantize("x_embeds", batch, "int8")
    assert stored["x_embeds.scale"].shape == (2, 2, 1)
    assert stored["x_embeds.scale"][1].tolist() == [[pytest.approx(0.06)], [pytest.approx(3 / 127)]]


def test_float8_spans_its_whole_range() -> None:
    stored = quantize("x_embeds", TOKENS, "float8_e4m3fn")
    assert stored["x_embeds.scale"].flatten().tolist() == pytest.approx([2.54 / 448, 1 / 448])
    # 1.27 / 2.54 x 448 = 224 is a number of the format; 0.013 / 2.54 x 448 = 2.293 lies between 2.25 and 2.5.
    assert stored["x_embeds"].float().tolist() == [[448.0, -224.0, 2.25], [224.0, -448.0, 0.0]]
    assert (torch.finfo(torch.float8_e4m3fn).max, torch.iinfo(torch.int8).max) == (FLOAT8_MAX, INT8_MAX)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_tokens_of_zeros_stay_zeros_and_small_ones_keep_their_digits(dtype: str) -> None:
    stored = quantize("x", torch.tensor([[0.0, 0.0], [1e-6, -1e-6]]), dtype)
    assert stored["x.scale"][0].item() == 1.0
    assert dequantize(stored)["x"].float().tolist() == [
        [0.0, 0.0],
        [pytest.approx(1e-6, rel=0.01), pytest.approx(-1e-6, rel=0.01)],
    ]


def test_floats_are_stored_as_they_are() -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        stored = quantize("x", TOKENS, name)
        assert stored.keys() == {"x"} and stored["x"].dtype == dtype
        assert torch.equal(stored["x"], TOKENS.to(dtype)) and dequantize(stored)["x"] is stored["x"]


def test_an_error_of_storage_is_relative_to_a_whole_sample() -> None:
    exact = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    restored = torch.tensor([[[3.0, 0.3, 0.0], [0.0, 4.0, 0.4]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    error = storage_error(exact, restored)
    # Of the first: 0.5 over 5, and both tokens turn by the same angle. Of the second: one token is right, one is lost.
    assert error["relative_rms"].tolist() == pytest.approx([0.1, math.sqrt(2) / math.sqrt(2)])
    assert error["cosine"].tolist() == pytest.approx([1 / math.sqrt(1.01), 0.5])
    assert error["cosine"].dtype == torch.float64
    small = storage_error(0.001 * exact, 0.001 * restored)
    assert small["relative_rms"].tolist() == pytest.approx([0.1, 1.0])
    assert storage_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))["relative_rms"].tolist() == [0.0]


def test_a_gap_is_a_mean_over_tokens_and_over_numbers() -> None:
    predicted = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]])
    true = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]])
    gap = embedding_gap(predicted, true)
    assert gap["cosine"].tolist() == pytest.approx([(1 + 0) / 2, (1 - 1) / 2])
    assert gap["mse"].tolist() == pytest.approx([(1 + 4 + 1) / 6, 9 / 6])


def test_six_digits_are_kept() -> None:
    assert (rounded(0.123456789), rounded(123456.7), rounded(0.0)) == (0.123457, 123457.0, 0.0)
