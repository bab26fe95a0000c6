"""Intervals against published values, and similarities against scikit-image."""

import math

import numpy as np
import pytest
from scipy.stats import binom
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from train.scores.measures import MAX_PSNR, Score, average, difference, l1, mean_of, proportion, psnr, ssim


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


def test_nothing_is_likelier_than_always_and_rarer_than_never() -> None:
    """By the formula alone some of these limits are 1 - 1e-16 or 1e-17."""
    for count in range(1, 300):
        assert proportion([True] * count).high == 1.0 and proportion([False] * count).low == 0.0


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    rates = (0.97, 0.8, 0.5)
    covered = 0
    for _ in range(400):
        score = mean_of([proportion((generator.random(60) < rate).tolist()) for rate in rates])
        covered += score.low <= np.mean(rates) <= score.high
    assert 0.92 < covered / 400 < 0.98
    assert mean_of([proportion([True] * 9)]) == proportion([True] * 9)


def test_a_mean_adds_up_the_squares_of_what_its_parts_miss() -> None:
    parts = [Score(0.5, 0.2, 0.6, 7), Score(0.9, 0.5, 1.0, 3), Score(0.1, 0.1, 0.3, 5)]
    score = mean_of(parts)
    # sqrt(0.3^2 + 0.4^2 + 0) = 0.5 below, sqrt(0.1^2 + 0.1^2 + 0.2^2) above, each over three.
    assert (score.value, score.count) == (pytest.approx(0.5), 15)
    assert score.low == pytest.approx(0.5 - 0.5 / 3)
    assert score.high == pytest.approx(0.5 + math.sqrt(0.06) / 3)


def test_averages_have_the_percentiles_of_two_thousand_resamples() -> None:
    """In plain Python: the means of the resamples in order, and what lies between two of them."""
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    generator = np.random.default_rng(0)
    resampled = sorted(sum(values[i] for i in generator.integers(8, size=8)) / 8 for _ in range(2000))

    def percentile(place: float) -> float:
        below = int(place)
        return resampled[below] + (place - below) * (resampled[below + 1] - resampled[below])

    score = average(values)
    assert (score.value, score.count) == (31 / 8, 8)
    assert (score.low, score.high) == pytest.approx((percentile(0.025 * 1999), percentile(0.975 * 1999)))
    spread = np.random.default_rng(1).normal(30, 4, 50).tolist()
    assert average(spread) == average(spread)
    assert average(spread).low == pytest.approx(28.8700, abs=1e-4)  # published intervals stay valid


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    """Of 12 ones among 40 the resampled sums are binomial: 6.5 and 17.5 are far from a percentile."""
    score = average([1.0] * 12 + [0.0] * 28)
    assert (score.low * 40, score.high * 40) == pytest.approx(binom.ppf((0.025, 0.975), 40, 12 / 40))


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


def test_a_score_says_its_chance_where_it_has_one() -> None:
    assert Score(0.5, 0.25, 0.75, 8).as_json == {"value": 0.5, "low": 0.25, "high": 0.75, "count": 8}
    assert Score(0.5, 0.25, 0.75, 8, chance=0.0).as_json["chance"] == 0.0


def test_a_difference_counts_the_smaller_number_of_rows() -> None:
    few, many = proportion([True] * 3), proportion([True] * 8)
    assert difference(few, many).count == difference(many, few).count == 3


def test_similarities_of_dark_pictures_rest_on_the_constants() -> None:
    """Values of 0 to 3 of 255, where the means are no larger than the constants that keep the ratio defined."""
    generator = np.random.default_rng(5)
    one, other = (generator.integers(0, 4, (24, 24, 3)).astype(np.uint8) for _ in range(2))
    _, theirs = structural_similarity(
        one, other, channel_axis=2, data_range=255, gaussian_weights=True, use_sample_covariance=False, full=True
    )
    assert ssim(one, other) == pytest.approx(theirs.mean(), abs=1e-6)
    assert ssim(one, other) < 0.9999
