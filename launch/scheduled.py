"""What stage=schedule decided for the other stages of a pipeline, put into their configs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.longer import with_overrides
from launch.overrides import Override
from train.preflight.inputs import inputs_of
from train.preflight.rows import task_rows
from train.runs.directory import identity, load_config, made_by
from train.schemas.embed import EmbedStageConfig
from train.schemas.schedule import SCHEDULE_FILE, ScheduleStageConfig
from train.schemas.stage import StageConfig
from train.schemas.table import SCHEMAS

SCHEDULE = "schedule"  # the stage


def schedule_of(configs: Sequence[StageConfig]) -> ScheduleStageConfig | None:
    """The stage of a pipeline that decides how the others train."""
    return next((config for config in configs if isinstance(config, ScheduleStageConfig)), None)


def with_schedule(configs: Sequence[StageConfig], given: Sequence[Override]) -> list[StageConfig]:
    """The configs with what was decided for them, where it was decided for this config and these inputs.

    given: the overrides of the command line; what they say stays.
    """
    schedule = schedule_of(configs)
    if schedule is None or not (schedule.artifact_dir / SCHEDULE_FILE).is_file():
        return list(configs)
    if not all(where.exists() for where in inputs_of(schedule).values()) or not made_by(schedule, identity(schedule)):
        return list(configs)
    content: dict[str, Any] = json.loads((schedule.artifact_dir / SCHEDULE_FILE).read_text(encoding="utf-8"))
    return [with_overrides(config, decided(config.stage, content["values"], given)) for config in configs]


def decided(stage: str, values: dict[str, dict[str, Any]], given: Sequence[Override]) -> list[Override]:
    """values: stage -> key -> value. Without what the command line gives for that stage, or for all."""
    explicit = {override.key for override in given if override.stage in ("", stage)}
    return [
        Override.parse(f"{stage}.{key}={value}") for key, value in values.get(stage, {}).items() if key not in explicit
    ]


def idle_stages(stages: Sequence[str], schedule: ScheduleStageConfig | None) -> tuple[list[str], str]:
    """The stages of a scheduled pipeline that its training rows do not feed, and a sentence that says so."""
    if schedule is None:
        return [], ""
    tasks = task_rows(schedule)
    schemas = [(stage, SCHEMAS[stage]) for stage in stages]
    absent = {stage: of.task for stage, of in schemas if issubclass(of, EmbedStageConfig) and of.task not in tasks}
    idle = [*absent, *(f"{task}_decoder" for task in absent.values())]
    absence = f"{schedule.data.train} holds no {' and no '.join(absent.values())} rows: left out are {', '.join(idle)}"
    return [stage for stage in stages if stage in idle], absence if idle else ""


def recorded_schedule(run: Path) -> ScheduleStageConfig | None:
    """The config of stage=schedule that a run has recorded."""
    config = load_config(run / SCHEDULE) if (run / SCHEDULE / "config.yaml").is_file() else None
    assert config is None or isinstance(config, ScheduleStageConfig)
    return config
