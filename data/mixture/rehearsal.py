"""Rehearsal: rows of what a checkpoint was trained on, mixed into those that it is finetuned on. No torch here.

New rows teach a model new skills and cost it old ones; a share of rows that it knew keeps these. The shipped weights
have theirs in `weights/rehearsal`.
"""

from dataclasses import replace

import numpy as np

from data.mixture.spec import MixtureSpec
from nexus_gen.parts.models import SHIPPED_RUN

SHIPPED_ROWS = SHIPPED_RUN.with_name("rehearsal") / "shapes.jsonl"
CHOICE_SEED = 0  # of the rows that are embedded, in every run


def num_rehearsed(num_own: int, share: float) -> int:
    """Rows of rehearsal beside `num_own` others, so that they are `share` of all: by rounding, and at least one."""
    return max(1, round(num_own * share / (1 - share))) if share and num_own else 0


def with_rehearsal(own: MixtureSpec, rehearsal: MixtureSpec, share: float) -> MixtureSpec:
    """A dataset with the sources of another behind its own, which get `share` of the draws between them.

    share: above 0, below 1. How the others' draws are divided among them stays as their dataset says.
    """
    return replace(own, sources=own.sources + rehearsal.sources, rehearsal=rehearsal, rehearsal_share=share)


def chosen(num_rows: int, num_wanted: int) -> list[int]:
    """Which of the rows of rehearsal are embedded, in their order; all when there are fewer than are wanted.

    A longer choice holds every shorter one, so that a few rows more or less embed few anew.
    """
    return sorted(np.random.default_rng(CHOICE_SEED).permutation(num_rows)[:num_wanted].tolist())
