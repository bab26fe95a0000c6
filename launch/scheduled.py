"""What stage=schedule decided for the other stages of a pipeline, as overrides of their configs."""

import json
from collections.abc import Sequence
from typing import Any

from launch.overrides import Override
from train.schemas.run_directory import identity, made_by
from train.schemas.stages import SCHEDULE_FILE, DecoderConfig, EmbedStageConfig, ScheduleStageConfig, StageConfig


def schedule_of(configs: Sequence[StageConfig]) -> ScheduleStageConfig | None:
    """The stage of a pipeline that decides how the others train."""
    return next((config for config in configs if isinstance(config, ScheduleStageConfig)), None)


def scheduled(config: ScheduleStageConfig, given: Sequence[Override]) -> dict[str, list[Override]]:
    """Stage -> what was decided for it, without the keys that the command line gives.

    Nothing where the stage has not run, or not with this config and these inputs.
    """
    path = config.artifact_dir / SCHEDULE_FILE
    if not path.is_file() or not made_by(config, identity(config)):
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        stage: [
            Override.parse(f"{stage}.{key}={value}")
            for key, value in values.items()
            if not any(override.key == key and override.stage in ("", stage) for override in given)
        ]
        for stage, values in content["values"].items()
    }


def without_idle_stages(configs: Sequence[StageConfig]) -> tuple[list[StageConfig], list[str]]:
    """The stages of a scheduled pipeline that the training rows feed, and sentences about the others."""
    schedule = schedule_of(configs)
    if schedule is None:
        return list(configs), []
    tasks = schedule.task_rows()
    idle = [config for config in configs if isinstance(config, EmbedStageConfig) and config.task not in tasks]
    unfed = {config.artifact_dir for config in idle}
    kept: list[StageConfig] = []
    left_out: list[StageConfig] = []
    for config in configs:
        feeds = config.artifact_dir in unfed or (
            isinstance(config, DecoderConfig) and any(str(directory) == config.shards for directory in unfed)
        )
        (left_out if feeds else kept).append(config)
    sentences = [
        f"{config.stage}: left out, for {schedule.data.train} holds no {config.task} rows" for config in idle
    ] + [f"{config.stage}: left out with it" for config in left_out if config not in idle]
    return kept, sentences
