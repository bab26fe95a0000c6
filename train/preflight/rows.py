"""The message rows that a stage's config names: where they come from, which are left out, and whether they will do."""

import logging
from pathlib import Path

from data.mixture.order import check_dataset
from data.mixture.pictures import PictureHashes
from data.mixture.quarantine import LeftOut, read_left_out
from data.mixture.rehearsal import num_rehearsed, with_rehearsal
from data.mixture.spec import MixtureSpec, load_mixture
from data.shards.plan import ROWS, SplitRows
from nexus_gen.specs.errors import UserError
from train.preflight.rehearsal import check_rehearsal, require_rehearsal_rows
from train.schemas.embed import EmbedStageConfig
from train.schemas.inputs import RowsConfig, TrainRowsConfig
from train.schemas.pretrain import PretrainConfig
from train.schemas.schedule import ScheduleStageConfig
from train.schemas.stage import StageConfig
from train.schemas.standins import StandinsStageConfig

log = logging.getLogger(__name__)


def dataset_of(data: TrainRowsConfig, split: str) -> MixtureSpec:
    """Where the rows of a split come from, rehearsal included; no rows are read. Raises UserError."""
    own = load_mixture(getattr(data, split), data.picture_root)
    if split != "train" or not isinstance(data, RowsConfig) or not data.rehearsal:
        return own
    return with_rehearsal(own, load_mixture(data.rehearsal_file, data.picture_root), data.rehearsal)


def left_out_of(data: TrainRowsConfig, *splits: str) -> LeftOut:
    """The rows of these splits, of all unless given, that are quarantined; reads them. Raises UserError."""
    if not data.quarantine:
        return LeftOut()
    files = [file for split in splits or data.splits for file in dataset_of(data, split).files]
    return read_left_out(data.quarantine, list(dict.fromkeys(files)))


def checked_quarantine(config: StageConfig, data: RowsConfig) -> LeftOut:
    """The rows that a stage leaves out. UserError when it writes the files itself, or none of their rows is its own."""
    for path in data.quarantine:
        if Path(path).is_relative_to(config.run_dir):
            raise UserError(f"data.quarantine: {path} is written by this stage itself; give a copy from outside of it")
    left_out = left_out_of(data)
    if left_out.elsewhere and not left_out:
        raise UserError(
            f"data.quarantine names rows of {', '.join(left_out.elsewhere)}, and of no file of data.train and "
            "data.heldout; run `nexus-gen data check` on these and give what it writes"
        )
    for file, count in left_out.elsewhere.items():
        log.warning("data.quarantine names %s, which is in neither data.train nor data.heldout (rows: %d)", file, count)
    return left_out


def preflight_rows(config: StageConfig) -> None:
    """The part of `preflight` that message rows alone decide: a pipeline asks it before its first stage starts."""
    match config:
        case StandinsStageConfig(data=rows):
            check_dataset(rows.train, left_out=left_out_of(rows), picture_root=rows.picture_root)
        case ScheduleStageConfig():
            checked_quarantine(config, config.data)
            task_rows(config)
        case PretrainConfig(data=messages):
            left_out = checked_quarantine(config, messages)
            check_dataset(messages.train, messages.max_bad_fraction, left_out, messages.picture_root)
            check_dataset(messages.heldout, left_out=left_out, picture_root=messages.picture_root)
            require_rehearsal_rows(messages, "model.qwen", Path(config.model.qwen))
            check_rehearsal(messages, left_out, messages.max_bad_fraction)
        case EmbedStageConfig():
            preflight_embedded_rows(config)


def preflight_embedded_rows(config: EmbedStageConfig) -> None:
    """UserError when a split has no rows of the task that the stage embeds."""
    data, left_out = config.data, checked_quarantine(config, config.data)
    for split in (data.train, data.heldout):
        tasks = check_dataset(split, data.max_bad_fraction, left_out, data.picture_root)
        if config.task not in tasks:
            raise UserError(
                f"{split} holds no {config.task} rows (it has {tasks}); stage={config.stage} needs some, and "
                "stage=... instead of pipeline=... runs the stages that do without, one at a time"
            )
    check_rehearsal(data, left_out, data.max_bad_fraction)


def task_rows(config: ScheduleStageConfig) -> dict[str, int]:
    """Training rows of each task."""
    data = config.data
    return check_dataset(data.train, data.max_bad_fraction, left_out_of(data), data.picture_root)


def num_train_rows(config: EmbedStageConfig) -> int:
    """Samples that the training split of an embedding stage's artifact holds at most."""
    data, left_out = config.data, left_out_of(config.data)
    own = check_dataset(data.train, data.max_bad_fraction, left_out, data.picture_root)[config.task]
    old = check_rehearsal(data, left_out, data.max_bad_fraction).get(config.task, 0)
    return own + min(num_rehearsed(own, data.rehearsal), old)


def read_splits(config: EmbedStageConfig) -> list[SplitRows]:
    """The rows of both splits with what their pictures hold; only new or changed pictures are read for it."""
    hashes, left_out = PictureHashes(config.contents), left_out_of(config.data)
    splits = [
        SplitRows.read(
            split,
            dataset_of(config.data, split),
            config.task,
            config.reads_conversations,
            hashes,
            left_out,
            config.run_dir / ROWS.format(split=split),
            config.data.picture_root,
        )
        for split in config.data.splits
    ]
    hashes.contents.save()
    return splits
