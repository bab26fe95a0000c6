"""From overrides on a command line to a validated, resolved config of one stage."""

import os
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.overrides import CONFIGS, Override
from launch.python_path import CHECKOUT
from nexus_gen.specs.errors import UserError, nearest
from train.schemas.fields import keys, path_values, typed, types_of_keys
from train.schemas.stage import StageConfig
from train.schemas.table import SCHEMAS

# Sections that describe more than one stage reads; a stage takes its part of them.
SHARED = ("model", "data", "logger")
# ${checkout:PATH} in configs/: shipped weights are found wherever a command is started.
OmegaConf.register_new_resolver("checkout", lambda path: str(CHECKOUT / path), replace=True)


def compose_stage(overrides: list[Override]) -> StageConfig:
    """Compose, cut the shared sections down to what the stage reads, validate, make paths absolute.

    Raises UserError naming the nearest valid key, file or type.
    """
    stages = [override.value for override in overrides if override.key == "stage"]
    if not stages:
        raise UserError(f"give stage=... or pipeline=...; stages: {', '.join(SCHEMAS)}")
    stage = stages[-1]
    for override in overrides:
        refuse_without_effect(override, stage)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        try:
            composed = compose("run", overrides=[override.in_hydra for override in overrides])
            values: Any = OmegaConf.to_container(composed, resolve=True)
        except HydraException as error:
            raise UserError(str(error).splitlines()[0]) from error
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from error
    return typed(stage, absolute(stage, keep(values, keys(stage))))


def refuse_without_effect(override: Override, stage: str) -> None:
    """An option that the stage does not read is an error, also where another stage reads it."""
    valid = keys(stage)
    if override.stage and override.stage != stage:
        raise UserError(f"'{override.text}' is for stage={override.stage}, and this is stage={stage}; leave it out")
    if override.is_group or override.key in valid:
        return
    if override.key.split(".")[0] in SHARED and override.key in types_of_keys():
        raise UserError(
            f"{override.key} has no effect on stage={stage}; it reads {', '.join(near_keys(override.key, valid))}"
        )
    refuse_misspelt_stage(override, [stage])
    raise UserError(f"stage={stage} has no key '{override.key}'{nearest(override.key, valid)}")


def refuse_misspelt_stage(override: Override, stages: list[str]) -> None:
    """UserError for STAGE.key=value that names no stage of `stages` and a key that one of them reads."""
    name, _, key = override.key.partition(".")
    if override.stage not in stages and (override.stage or any(key in keys(stage) for stage in stages)):
        name = override.stage or name
        raise UserError(f"'{override.text}': there is no stage {name} here{nearest(name, stages)}")


def near_keys(key: str, valid: set[str]) -> list[str]:
    """The leaves of the same section, or the sections."""
    section = key.split(".")[0]
    same = sorted(name for name in valid if name.startswith(f"{section}."))
    return same or sorted(name for name in valid if "." not in name)


def keep(values: dict[str, Any], valid: set[str], prefix: str = "") -> dict[str, Any]:
    """Drop from the shared sections what the stage has no key for; other unknown keys stay, to be refused."""
    kept = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in valid and key.split(".")[0] in SHARED:
            continue
        kept[name] = keep(value, valid, f"{key}.") if isinstance(value, dict) and key.split(".")[0] in SHARED else value
    return kept


def absolute(stage: str, values: dict[str, Any]) -> dict[str, Any]:
    """Paths of the command line are relative to where it was typed; workers may start elsewhere."""
    for section, leaf in path_values(stage, values):
        section[leaf] = str(Path(os.path.expanduser(section[leaf])).absolute())
    return values
