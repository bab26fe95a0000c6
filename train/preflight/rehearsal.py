"""Whether there are rows to rehearse: those that ship are of what the shipped weights know, and of nothing else."""

from pathlib import Path

from data.mixture.order import check_dataset
from data.mixture.quarantine import LeftOut
from nexus_gen.artifacts.artifact import MANIFEST, Manifest, fingerprint_path
from nexus_gen.parts.models import SHIPPED_RUN
from nexus_gen.specs.errors import UserError
from train.schemas.inputs import RowsConfig


def require_rehearsal_rows(data: RowsConfig, key: str, checkpoint: Path) -> None:
    """UserError when `data.rehearsal` would take the shipped rows for a model that never saw them.

    checkpoint: the language model, at `key`, that training begins with, or one that was finetuned from it.
    """
    if not data.rehearsal or data.rehearsal_rows or knows_shipped_rows(checkpoint):
        return
    raise UserError(
        f"data.rehearsal is {data.rehearsal:g}, and no rows are known of what {key} {checkpoint} was trained on: those "
        "that ship are of the shipped weights. Give rows of its training with data.rehearsal_rows=PATH, or switch "
        "rehearsal off with data.rehearsal=0"
    )


def knows_shipped_rows(checkpoint: Path) -> bool:
    """Whether this is the shipped language model, or was trained from it."""
    if not (checkpoint / MANIFEST).is_file():
        return False
    shipped, own = SHIPPED_RUN / "pretrain" / "artifact", Manifest.load(checkpoint)
    return own.fingerprint == Manifest.load(shipped).fingerprint or (
        own.inputs.get("model.qwen") == fingerprint_path(shipped)
    )


def check_rehearsal(data: RowsConfig, left_out: LeftOut, max_bad_fraction: float) -> dict[str, int]:
    """Rows of each task that can be rehearsed, none without a share. Raises UserError as `check_dataset` does."""
    if not data.rehearsal:
        return {}
    return check_dataset(data.rehearsal_file, max_bad_fraction, left_out, data.picture_root)
