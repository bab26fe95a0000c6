"""Numbers with their uncertainty, and how alike two pictures are. No torch here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Z = 1.959964  # two-sided 95% of the normal distribution
NUM_RESAMPLES = 2000
MAX_PSNR = 100.0  # dB, of equal pictures: JSON has no infinity
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # an 11 x 11 Gaussian window


@dataclass(frozen=True)
class Score:
    """value with its 95% confidence interval [low, high], from `count` samples.

    chance: what the value would be without any skill, as docs/evaluation.md says of each score; None for the others.
    """

    value: float
    low: float
    high: float
    count: int
    chance: float | None = None

    @property
    def as_json(self) -> dict[str, float]:
        """What `scores.json` says of it."""
        return {name: value for name, value in vars(self).items() if value is not None}


def proportion(outcomes: Sequence[bool]) -> Score:
    """The share of true outcomes with Wilson's interval, which holds for few samples and at 0 and 1 too.

    Raises ValueError without outcomes. Source: Wilson 1927.
    """
    count = len(outcomes)
    if not count:
        raise ValueError("a proportion of no outcomes")
    share = sum(outcomes) / count
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    reach = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    # At the ends the limit is the end itself, but for rounding.
    return Score(share, centre - reach if share > 0 else 0.0, centre + reach if share < 1 else 1.0, count)


def mean_of(scores: Sequence[Score]) -> Score:
    """The unweighted mean of independent scores, as GenEval takes it over its categories.

    The distances of the parts from their own limits add up as squares. Source: Zou and Donner 2008.
    """
    if not scores:
        raise ValueError("a mean of no scores")
    value = sum(score.value for score in scores) / len(scores)
    down = math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / len(scores)
    up = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / len(scores)
    return Score(value, value - down, value + up, sum(score.count for score in scores))


def difference(score: Score, other: Score) -> Score:
    """How much larger one score is than another, as if they were independent; count is the smaller one.

    Of scores on the same rows, which rise and fall together, the interval is too wide rather than too narrow.
    Source: Newcombe 1998.
    """
    value = score.value - other.value
    down = math.hypot(score.value - score.low, other.high - other.value)
    up = math.hypot(score.high - score.value, other.value - other.low)
    return Score(value, value - down, value + up, min(score.count, other.count))


def average(values: Sequence[float]) -> Score:
    """The mean with its bootstrap percentile interval; the resamples are the same every time.

    Raises ValueError without values. Source: Efron 1979.
    """
    if not values:
        raise ValueError("an average of no values")
    numbers = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = [numbers[generator.integers(len(numbers), size=len(numbers))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Score(float(numbers.mean()), float(low), float(high), len(numbers))


def psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of (H, W, 3) pictures of 8 bits, at the pixels of a mask (H, W) or at all."""
    difference = one.astype(np.float64) - other
    squared = (difference if where is None else difference[where]) ** 2
    return min(MAX_PSNR, 10 * math.log10(255**2 / max(float(squared.mean()), 1e-12)))


def l1(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """Mean absolute difference as a share of 255."""
    difference = np.abs(one.astype(np.float64) - other)
    return float((difference if where is None else difference[where]).mean()) / 255


def ssim(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """Structural similarity of (H, W, 3) pictures of 8 bits, averaged over channels and over a mask or everything.

    Source: Wang et al. 2004, with their Gaussian window and constants.
    """

    def blurred(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, (SSIM_SIGMA, SSIM_SIGMA, 0), radius=(SSIM_RADIUS, SSIM_RADIUS, 0))

    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return float((values if where is None else values[where]).mean())
