"""From overrides on a command line to a validated, resolved config of one stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nexus_gen.specs.errors import UserError, nearest
from train.schemas.fields import keys, path_values, typed
from train.schemas.stages import SCHEMAS, StageConfig

CONFIGS = Path(__file__).parent.parent / "configs"
# Sections that describe more than one stage reads; a stage takes its part of them.
SHARED = ("model", "data", "logger")


@dataclass(frozen=True)
class Override:
    """One `key=value` of the command line. is_group: it picks a file of configs/<key>/."""

    text: str
    key: str
    is_group: bool

    @staticmethod
    def parse(text: str) -> "Override":
        try:
            parsed = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"'{text}' is not key=value: {str(error).splitlines()[-1]}") from error
        if parsed.is_sweep_override():
            raise UserError(f"'{text}' is a sweep; give one value, or start one run per value")
        if parsed.is_delete():
            raise UserError(f"'{text}' takes a key away, and every stage needs its keys; give key=value")
        key = parsed.key_or_group.split("@")[0]
        is_group = (CONFIGS / key).is_dir()
        if is_group and not isinstance(parsed.value(), str):
            files = (path.stem for path in (CONFIGS / key).glob("*.yaml"))
            raise UserError(f"'{text}' names no file of configs/{key}/{nearest('', files)}")
        return Override(text, key, is_group)


def compose_stage(overrides: list[Override]) -> StageConfig:
    """Compose, cut the shared sections down to what the stage reads, validate, make paths absolute.

    Raises UserError naming the nearest valid key, file or type.
    """
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        try:
            composed = compose("run", overrides=[override.text for override in overrides])
            values: Any = OmegaConf.to_container(composed, resolve=True)
            stage = values["stage"]
            for override in overrides:
                refuse_without_effect(override, stage, composed)
            return typed(stage, absolute(stage, keep(values, keys(stage))))
        except MissingConfigException as error:
            raise UserError(missing_config(error)) from error
        except ConfigCompositionException as error:
            raise UserError(composition_error(error, overrides)) from error
        except HydraException as error:
            raise UserError(str(error).splitlines()[0]) from error
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from error


def refuse_without_effect(override: Override, stage: str, composed: DictConfig) -> None:
    """An option that the stage does not read is an error, also where another stage reads it."""
    valid = keys(stage)
    if override.is_group or override.key in valid:
        return
    if override.key.split(".")[0] in SHARED and OmegaConf.select(composed, override.key) is not None:
        raise UserError(
            f"{override.key} has no effect on stage={stage}; it reads {', '.join(near_keys(override.key, valid))}"
        )
    raise UserError(f"stage={stage} has no key '{override.key}'{nearest(override.key, valid)}")


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
        section[leaf] = str(Path(section[leaf]).expanduser().absolute())
    return values


def missing_config(error: MissingConfigException) -> str:
    """`stage=prtrain` and the like: the group, the choice and the nearest one."""
    missing = error.missing_cfg_file or ""
    group, _, choice = missing.rpartition("/")
    return f"there is no {group}={choice}{nearest(choice, error.options or [])}"


def composition_error(error: ConfigCompositionException, overrides: list[Override]) -> str:
    """A key that nothing in the composed config has."""
    lines = str(error).splitlines()
    if "You must specify" in lines[0]:
        return f"give stage=... or pipeline=...; stages: {', '.join(SCHEMAS)}"
    for override in overrides:
        if f"'{override.key}'" in lines[0]:
            valid = keys(next((o.text.split("=")[1] for o in overrides if o.key == "stage"), "pretrain"))
            return f"there is no key '{override.key}'{nearest(override.key, valid)}"
    return lines[0]
