"""Whether training ended too early or went on too long, by the held-out losses that a stage has logged.

The rate of a cosine or linear schedule ends at nothing, and the loss flat, however much is left to learn: so the last
measurement is held against the one about half way, and the difference against the noise of neighbouring measurements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from train.steps.metrics import read_metrics

LOSSES = {
    "pretrain": {"heldout/text_loss": "text loss", "heldout/image_loss": "image loss"},
    "generation_decoder": {"heldout/loss": "loss"},
    "editing_decoder": {"heldout/loss": "loss"},
}
LEAST_MEASUREMENTS = 5  # fewer cannot tell a trend from noise
LEAST_CHANGE = 0.05  # of a loss, over half of training: less is not worth as much time again
NOISES = 3.0  # that a change has to be above, more where few measurements say what noise is


@dataclass(frozen=True)
class Trend:
    """Of one held-out loss. kind: `falling`, `rising` (after its best) or `flat`; None where nobody can tell.

    before, last: the values that differ: about half way and at the end, or at the best step and at the end.
    """

    kind: str | None
    before: float = math.nan
    last: float = math.nan
    best_step: int = 0

    def in_words(self, label: str) -> str:
        """What to know and to do about the loss called so; empty where there is nothing to do."""
        values = f"({self.before:.3g} -> {self.last:.3g})"
        if self.kind == "falling":
            share = 1 - self.last / self.before
            return (
                f"held-out {label} still fell by {share:.0%} over the second half {values}: more=2x trains on from here"
            )
        if self.kind == "rising":
            share = self.last / self.before - 1
            return (
                f"held-out {label} was best at step {self.best_step} and rose by {share:.0%} since {values}: train "
                "shorter, or on more rows"
            )
        return ""


def trend(points: Sequence[tuple[int, float]]) -> Trend:
    """Of a positive loss measured at (step, value), steps rising.

    Of flat curves with independent noise of 2%, about 1 in 100 is taken for another.
    """
    if len(points) < LEAST_MEASUREMENTS:
        return Trend(None)
    steps, values = zip(*points, strict=True)
    half = min(range(len(points) - 1), key=lambda place: abs(2 * steps[place] - steps[-1]))
    best = min(range(len(points)), key=lambda place: values[place])
    residuals = noise_of(values[half:])
    if len(residuals) < 2:  # all but the last in the first half
        return Trend(None)
    noise = NOISES * math.sqrt((1 + 3 / len(residuals)) * fmean(residual**2 for residual in residuals))

    def is_clear(change: float, of: float) -> bool:
        return change > max(LEAST_CHANGE * of, noise)

    around_best = fmean(values[max(0, best - 1) : best + 2])  # the lowest of many is low by chance, too
    if best < len(points) - 2 and is_clear(fmean(values[-2:]) - around_best, around_best):
        return Trend("rising", values[best], values[-1], steps[best])
    if is_clear(values[half] - values[-1], values[half]):
        return Trend("falling", values[half], values[-1], steps[best])
    return Trend("flat", values[half], values[-1], steps[best])


def noise_of(values: Sequence[float]) -> list[float]:
    """What measurements differ from the middle of their two neighbours by, scaled to the deviation of one of them."""
    middles = [(before + after) / 2 for before, after in zip(values, values[2:], strict=False)]
    # The difference of independent values has 1 + 1/4 + 1/4 times their variance.
    return [(value - middle) / math.sqrt(1.5) for value, middle in zip(values[1:], middles, strict=False)]


def findings(stage_dir: Path) -> str:
    """What the held-out losses of a training stage say of its length; empty where they say nothing."""
    rows = read_metrics(stage_dir)
    found = []
    for name, label in LOSSES[stage_dir.name].items():
        points = [(int(row["step"]), row[name]) for row in rows if name in row]
        found.append(trend(points).in_words(label))
    return "; ".join(filter(None, found))
