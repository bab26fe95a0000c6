"""Intervals against published values, and similarities against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from train.measures import MAX_PSNR, average, l1, mean_of, proportion, psnr, ssim


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_proportions_have_wilsons_interval(right: int, count: int, low: float, high: float) -> None:
    score = proportion([True] * right + [False] * (count - right))
    assert (score.value, score.count) == (right / count, count)
    assert (score.low, score.high) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    rates = (0.97, 0.8, 0.5)
    covered = 0
    for _ in range(400):
        score = mean_of([proportion((generator.random(60) < rate).tolist()) for rate in rates])
        covered += score.low <= np.mean(rates) <= score.high
    assert 0.92 < covered / 400 < 0.98
    assert mean_of([proportion([True] * 9)]) == proportion([True] * 9)


def test_averages_have_an_interval_that_shrinks_with_samples_and_never_varies() -> None:
    values = np.random.default_rng(1).normal(30, 4, 400).tolist()
    many, few = average(values), average(values[:25])
    assert many == average(values)
    # The normal approximation holds at 400 samples.
    reach = 1.96 * np.std(values) / 20
    assert (many.high - many.low) / 2 == pytest.approx(reach, rel=0.1)
    assert few.high - few.low > 2 * (many.high - many.low)
    assert many.low < many.value < many.high


@pytest.mark.parametrize("measure", [proportion, average, mean_of])
def test_nothing_has_no_score(measure) -> None:
    with pytest.raises(ValueError):
        measure([])


def test_similarities_agree_with_scikit_image() -> None:
    generator = np.random.default_rng(2)
    one = generator.integers(0, 256, (40, 52, 3), dtype=np.uint8)
    other = (one * 0.7 + generator.integers(0, 70, one.shape)).astype(np.uint8)
    where = generator.random((40, 52)) < 0.3
    theirs, map_of_theirs = structural_similarity(
        one, other, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    # They leave the border out of the mean, and out of it alone: inside, the maps agree.
    inside = np.zeros((40, 52), dtype=bool)
    inside[5:-5, 5:-5] = True
    assert ssim(one, other, inside) == pytest.approx(theirs, abs=1e-6)
    assert ssim(one, other, where) == pytest.approx(map_of_theirs[where].mean(), abs=1e-6)
    assert psnr(one, other) == pytest.approx(peak_signal_noise_ratio(one, other), abs=1e-6)
    assert psnr(one, other, where) == pytest.approx(peak_signal_noise_ratio(one[where], other[where]), abs=1e-6)
    assert l1(one, other, where) == pytest.approx(np.abs(one[where] / 255 - other[where] / 255).mean(), abs=1e-6)
    assert (psnr(one, one), l1(one, one), ssim(one, one)) == (MAX_PSNR, 0.0, pytest.approx(1.0))
