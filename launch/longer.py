"""`more=2x` of `nexus-gen run`: training stages of a run train on, to a multiple of the length that it has recorded.

With it a stage's config is the recorded one, whatever the run was started with, and overrides on the command line come
on top. The request is kept in the run until it is fulfilled, so that an interrupted one is not multiplied again.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launch.compose import absolute, compose_stage, refuse_without_effect
from launch.overrides import CONFIGS, Override, read, unquoted
from nexus_gen.artifacts.artifact import MANIFEST, Manifest, write_text_atomic
from nexus_gen.specs.errors import UserError, nearest
from nexus_gen.specs.numbers import read_number
from train.runs.directory import load_config
from train.runs.lengths import LENGTHS, length
from train.schemas.fields import escaped, typed
from train.schemas.stage import StageConfig
from train.schemas.table import SCHEMAS

MORE = "more"
REQUEST = "more.json"  # in a run: stage -> the key of its length, and its values: recorded before, requested last
TRAINING = [stage for stage, schema in SCHEMAS.items() if schema.trains]
OF_RECORDS = ("launch", "logger")  # groups that can be given over a recorded config: how it runs, not what it makes


def is_more(text: str) -> bool:
    """Whether an argument is more=... or STAGE.more=..."""
    return text.partition("=")[0].rpartition(".")[2] == MORE and "=" in text


def read_more(texts: Iterable[str], stages: Sequence[str]) -> dict[str, float]:
    """Stage -> factor, of the training stages among `stages` that are to train on. Raises UserError."""
    factors: dict[str, float] = {}
    trained = [stage for stage in stages if stage in TRAINING]
    for text in sorted(texts, key=lambda text: text.startswith(f"{MORE}=")):
        key, _, value = text.partition("=")
        stage = key.removesuffix(MORE).removesuffix(".")
        if stage and stage not in trained:
            raise UserError(f"'{text}': there is no training stage {stage} here{nearest(stage, trained)}")
        if not trained:
            raise UserError(f"'{text}' is for stages that train: {', '.join(TRAINING)}")
        for name in [stage] if stage else trained:
            factors.setdefault(name, read_factor(text, unquoted(value)))
    return factors


def read_factor(text: str, value: str) -> float:
    """2.0 of `2x`. Raises UserError."""
    try:
        number = read_number(value.removesuffix("x"))
    except ValueError as error:
        raise UserError(f"'{text}': {MORE} is how many times as long, as in {MORE}=2x or {MORE}=1.5x") from error
    if not value.endswith("x") or number <= 1:
        raise UserError(f"'{text}': {MORE} is how many times as long, above 1, as in {MORE}=2x or {MORE}=1.5x")
    return number


def with_length(config: StageConfig, key: str, value: float) -> StageConfig:
    """The same config with another value of trainer.max_steps, data.num_epochs or data.token_budget."""
    section, leaf = key.split(".")
    changed: Any = {section: dataclasses.replace(getattr(config, section), **{leaf: value})}
    return dataclasses.replace(config, **changed)


def lengthened(config: StageConfig, factor: float) -> StageConfig:
    """The same config, training `factor` times as long; steps and tokens are rounded up."""
    key, value = length(dataclasses.asdict(config))
    longer = value * factor
    return with_length(config, key, longer if key == "data.num_epochs" else math.ceil(longer))


# ---- recorded configs -----------------------------------------------------------------------------------------------


def recorded_stage(own: list[Override], given: list[Override], factors: Mapping[str, float]) -> StageConfig:
    """The config that a run has recorded of a stage, with the overrides of `given` over it, and so many times as long.

    own: all overrides of the stage; by them alone it is composed where nothing is recorded. UserError where it is to
    train on from nothing, or `given` says how long, too.
    """
    stage = next(override.value for override in own if override.key == "stage")
    over = [override for override in own if override in given]
    directory = directory_of(own) / stage
    for override in over:
        if stage in factors and override.key in LENGTHS:
            raise UserError(
                f"'{override.text}' says how long {stage} trains, and {MORE}=... that it is times what was recorded; "
                "give one of them"
            )
    if not (directory / "config.yaml").is_file():
        if stage in factors:
            raise UserError(
                f"{MORE}=... trains on from what a run has recorded, and {directory} is not the directory of a stage "
                f"that was started; run it without {MORE}=... first"
            )
        return compose_stage(own)
    config = with_overrides(dataclasses.replace(load_config(directory), resume=True), over)
    if not config.resume and stage in factors:
        raise UserError(
            f"resume=false starts {stage} over, and {MORE}=... trains on from where it is; give one of them"
        )
    return lengthened(base_of(config), factors[stage]) if stage in factors else config


def directory_of(overrides: list[Override]) -> Path:
    """The directory of the run that overrides are about."""
    values: Any = OmegaConf.load(CONFIGS / "run.yaml")
    names: dict[str, str] = {key: str(values[key]) for key in ("runs_dir", "name")}
    names |= {override.key: text_of(override) for override in overrides if override.key in names}
    return Path(names["runs_dir"]).expanduser().absolute() / names["name"]


def text_of(override: Override) -> str:
    return str(OmegaConf.create({"value": value_of(override)}).value)


def value_of(override: Override) -> Any:
    return read(override.text, override.key, override.value, "a value").value()


def with_overrides(config: StageConfig, overrides: list[Override]) -> StageConfig:
    """A recorded config with values given anew."""
    values = OmegaConf.create(escaped(dataclasses.asdict(config)))
    for override in sorted(overrides, key=lambda override: not override.is_group):
        refuse_without_effect(override, config.stage)
        if override.key not in OF_RECORDS and override.is_group:
            raise UserError(
                f"'{override.text}' chooses a file of configs/, and with {MORE}=... configs are those that the run has "
                "recorded; give the keys that should differ"
            )
        if override.is_group:
            with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
                composed = compose("run", overrides=[f"stage={config.stage}", override.in_hydra])
            values[override.key] = composed[override.key]
        else:
            OmegaConf.update(values, override.key, value_of(override), merge=False)
    plain: Any = OmegaConf.to_container(values, resolve=True)
    return typed(config.stage, absolute(config.stage, plain))


# ---- the request under way ------------------------------------------------------------------------------------------


def base_of(config: StageConfig) -> StageConfig:
    """A recorded config with the length that `more` multiplies: that before a request that is still under way.

    Its config is read before the request: of several machines that start the same command, one may have begun already.
    """
    key, value = length(dataclasses.asdict(config))
    run = config.run_dir.parent
    entry = read_request(run).get(config.stage, {})
    if entry.get("key") != key or value not in entry["values"] or is_fulfilled(run):
        return config
    return with_length(config, key, entry["values"][0])


def is_fulfilled(run: Path) -> bool:
    """Whether every stage of a run's request has an artifact of the requested length."""
    entries = read_request(run).items()
    return all(made_length(run / stage / "artifact") == entry["values"][-1] for stage, entry in entries)


def made_length(artifact: Path) -> float:
    """How long an artifact was trained, 0 where there is none."""
    return length(Manifest.load(artifact).config)[1] if (artifact / MANIFEST).is_file() else 0


def read_request(run: Path) -> dict[str, dict[str, Any]]:
    path = run / REQUEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def record_request(configs: Iterable[StageConfig], factors: Mapping[str, float]) -> None:
    """Record what `more` has made of the lengths of stages, before any of them starts."""
    for config in configs:
        if config.stage not in factors:
            continue
        run = config.run_dir.parent
        request = {} if is_fulfilled(run) else read_request(run)
        key, wanted = length(dataclasses.asdict(config))
        base = length(dataclasses.asdict(base_of(load_config(config.run_dir))))[1]
        values = request.get(config.stage, {}).get("values", [])
        # Of a request that another one followed before it was fulfilled, config.yaml may hold the value.
        earlier = [value for value in values if value != wanted] if values[:1] == [base] else [base]
        request[config.stage] = {"key": key, "values": [*earlier, wanted]}
        write_text_atomic(run / REQUEST, json.dumps(request, indent=1))


def forget_fulfilled(run: Path) -> None:
    """Later requests multiply the length reached by then."""
    if is_fulfilled(run):
        (run / REQUEST).unlink(missing_ok=True)
