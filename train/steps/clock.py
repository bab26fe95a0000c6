"""How fast a stage trains and how much longer it will take: steps are timed apart from what is done between them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Interval(NamedTuple):
    """Training steps between two lines of the log, and the seconds that they alone took."""

    num_steps: int
    seconds: float

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps


@dataclass
class OtherWork:
    """One kind of work between steps, so far. every_steps: 0 is after the last step only. step: of the last time."""

    every_steps: int
    seconds: float = 0.0
    times: int = 0
    step: int = 0


class StepClock:
    """Times training steps apart from held-out measuring, painting and checkpoints.

    A step lasts from the end of the one before it, so it includes waiting for data and for other processes. Every
    process has a clock of its own; that of rank zero is logged. now: seconds of a clock that never goes back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._num_steps = 0  # of the interval under way
        self._since = 0.0  # when it began
        self._other_s = 0.0  # what of it was other work
        self._other_since: float | None = None  # when the other work under way began
        self._kinds: dict[str, OtherWork] = {}

    def start(self) -> None:
        """The first step begins."""
        self._since = self._time()

    def step_done(self) -> None:
        self._num_steps += 1

    def begin_other(self, kind: str, step: int, every_steps: int) -> None:
        """Work that is due after every `every_steps` steps begins, after this step."""
        work = self._kinds.setdefault(kind, OtherWork(every_steps))
        work.times += 1
        work.step = step
        self._other_since = self._time()

    def end_other(self, kind: str) -> None:
        assert self._other_since is not None
        seconds = self._time() - self._other_since
        self._kinds[kind].seconds += seconds
        self._other_s += seconds
        self._other_since = None

    @contextmanager
    def other(self, kind: str, step: int, every_steps: int) -> Iterator[None]:
        """Around work that is due after every `every_steps` steps, after this step."""
        self.begin_other(kind, step, every_steps)
        yield
        self.end_other(kind)

    def lap(self) -> Interval:
        """What was trained since the last call or the start; the next interval begins."""
        now = self._time() if self._other_since is None else self._other_since
        interval = Interval(self._num_steps, now - self._since - self._other_s)
        self._num_steps, self._since, self._other_s = 0, now, 0.0
        return interval

    def remaining_s(self, step: int, last_step: int, step_s: float) -> float:
        """Seconds from this step to the end of training, its last measuring and checkpoint included.

        The steps left at step_s each, and for each kind of other work the times that it is still due, at the mean of
        those that were timed. A kind that was not done yet counts as nothing.
        """
        others = (
            times_due(work.step, last_step, work.every_steps) * work.seconds / work.times
            for work in self._kinds.values()
        )
        return (last_step - step) * step_s + sum(others)

    def _time(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was launched before belongs to what came before
        return self._now()


def times_due(after_step: int, last_step: int, every_steps: int) -> int:
    """How often work is due in the steps after `after_step`: at multiples of every_steps, if not 0, and at the last."""
    if after_step >= last_step:
        return 0
    if every_steps == 0:
        return 1
    return last_step // every_steps - after_step // every_steps + (last_step % every_steps > 0)
