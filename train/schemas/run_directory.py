"""The directory of one stage of a run: what is recorded before processes start, and what of an earlier try is kept."""

import copy
import importlib.metadata
import json
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from nexus_gen.specs.artifact import MANIFEST, Manifest, require_whole, write_text_atomic
from nexus_gen.specs.content import Contents
from nexus_gen.specs.errors import UserError
from train.schemas.earlier import accepts, completed, say_accepted
from train.schemas.failures import forget_failures
from train.schemas.fields import as_yaml, counted_keys, fingerprint_values, input_fingerprints, keys, path_values, typed
from train.schemas.stages import SCHEMAS, StageConfig

PACKAGES = ("torch", "transformers", "ms-swift", "deepspeed", "lightning", "diffsynth", "webdataset", "safetensors")
CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"  # the bad rows that training came across
TIMING = "timing.jsonl"  # a line for each start of the latest try
IDENTITY = "identity.json"  # beside the checkpoints: the config values and inputs that they belong to
REQUEST = "from.json"  # in the run: the from=... that is under way
# Keys that configs of earlier versions lack, with the values that stand for what those versions did.
ADDED_SINCE: dict[str, Any] = {
    "objective.round_positions": True,
    "embed.pixels": "squash",
    "data.token_budget": 0,
    "data.quarantine": [],
    "data.picture_root": "",
    "data.rehearsal": 0.0,
    "data.rehearsal_rows": "",
    "shapes.new_names": 0.0,
    "model.num_target_tokens": 81,
}


def code_version() -> dict[str, Any]:
    """Commit of the checkout (with a mark when files differ from it), Python and package versions."""
    root = Path(__file__).parent.parent.parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "HEAD") or "unknown"
    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"commit": commit + changed, "python": platform.python_version(), "packages": packages}


def identity(config: StageConfig) -> dict[str, Any]:
    """What decides what a stage makes: its values, the fingerprints of its inputs, the version of what it computes.

    Reads the inputs. Raises UserError for what is not as its artifact's manifest says.
    """
    inputs = input_fingerprints(config)
    return {"config": fingerprint_values(config), "inputs": inputs, "numerics": config.numerics}


def created_at(config: StageConfig) -> str:
    """When the stage's artifact was made; empty when there is none."""
    return Manifest.load(config.artifact_dir).created_at if (config.artifact_dir / MANIFEST).is_file() else ""


def made_by(config: StageConfig, wanted: dict[str, Any]) -> bool:
    """Whether the stage's artifact has this identity, the one of now, and no from=... waits for another one."""
    made = recorded(config)
    if made is None or waits_for_another(config):
        return False
    return made == wanted or accepts(config, created_at(config), made, wanted)


def recorded(config: StageConfig) -> dict[str, Any] | None:
    """The identity of the stage's artifact; None where there is none, or not all of one."""
    if not created_at(config):
        return None
    made = Manifest.load(config.artifact_dir)
    if made.details.get("lost"):  # by `shards repair`, which said so; only the stage can make it again
        return None
    values = with_added(made.config, counted_keys(config.stage))
    return {"config": values, "inputs": made.inputs, "numerics": made.numerics}


def is_finished(config: StageConfig) -> bool:
    """Whether the latest try has made the artifact that is there, and no from=... waits for another one."""
    return recorded(config) == checkpoints_identity(config) and not waits_for_another(config)


def require_artifact(config: StageConfig) -> None:
    """UserError unless the files of the stage's artifact are those that it made."""
    contents = Contents.at(config.contents)
    try:
        require_whole(config.artifact_dir, Manifest.load(config.artifact_dir), contents)
    finally:
        contents.save()


def waits_for_another(config: StageConfig) -> bool:
    """Whether from=... asked for a new artifact of this stage, and the old one is still there."""
    request = read_request(config.run_dir.parent)
    return bool(request) and request == {"stage": config.stage, "replaces": created_at(config)}


def read_request(run: Path) -> dict[str, str]:
    """The from=... that a run has not come to the end of: `stage`, and when the artifact to replace was made."""
    path = run / REQUEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def forget_request(run: Path) -> None:
    """The pipeline has come to its end."""
    (run / REQUEST).unlink(missing_ok=True)


def request_another(config: StageConfig) -> None:
    """Record from=STAGE, so that it is gone on with after an interruption; so is a try that is unfinished now."""
    if is_finished(config):
        forget_try(config)
    request = {"stage": config.stage, "replaces": created_at(config)}
    write_text_atomic(config.run_dir.parent / REQUEST, json.dumps(request))


def checkpoints_identity(config: StageConfig) -> dict[str, Any]:
    """What the checkpoints of the latest try belong to; empty when there are none, or when that file is damaged."""
    path = config.run_dir / CHECKPOINTS / IDENTITY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"numerics": 1, **found, "config": with_added(found["config"], counted_keys(config.stage))}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def forget_try(config: StageConfig) -> None:
    """Drop what the latest try left beside its artifact, but for what a stage looks up by content and may take up."""
    left = [CHECKPOINTS, QUARANTINE]
    if not (config.reuses_by_content and config.resume):
        left += ["artifact.partial", "artifact.earlier"]
    for name in left:
        if (config.run_dir / name).exists():
            shutil.rmtree(config.run_dir / name)
    (config.run_dir / TIMING).unlink(missing_ok=True)


def prepare(config: StageConfig, wanted: dict[str, Any]) -> Path:
    """Record config, identity and environment, decide about earlier checkpoints; returns the config's path.

    Checkpoints of an unfinished try are gone on from when config and inputs are the same (and resume is true); when
    they differ, UserError. Checkpoints of a finished try are dropped: the artifact stays until a new one replaces it.
    """
    (config.run_dir / "log").mkdir(parents=True, exist_ok=True)
    forget_failures(config.run_dir / "log")
    checkpoints = config.run_dir / CHECKPOINTS
    if checkpoints.exists() and any(checkpoints.iterdir()):
        if is_finished(config) or not config.resume:
            forget_try(config)
        elif (earlier := checkpoints_identity(config)) != wanted and not config.reuses_by_content:
            if not earlier:
                raise UserError(
                    f"{checkpoints / IDENTITY} is missing or damaged, so nobody knows what the checkpoints beside it "
                    "belong to; put it back, or give resume=false to start over"
                )
            earlier, accepted = completed(config, earlier, wanted)
            if earlier != wanted:
                raise UserError(
                    f"{checkpoints} belong to an unfinished try with another {difference(earlier, wanted)}"
                    f"{changed_pictures(config)}; restore that, give resume=false to start over, or another name=..."
                )
            say_accepted(config, accepted, "resume=false")
    checkpoints.mkdir(exist_ok=True)
    write_text_atomic(checkpoints / IDENTITY, json.dumps(wanted, indent=1))
    write_text_atomic(config.run_dir / "environment.json", json.dumps(code_version(), indent=1))
    path = config.run_dir / "config.yaml"
    write_text_atomic(path, as_yaml(config))
    return path


def timing_of(stage_dir: Path) -> tuple[float, int]:
    """(seconds of all starts of the latest try, processes of the last one); zeros when there is no record of any.

    There is none beside the artifact of an earlier try while a new one runs.
    """
    path = stage_dir / TIMING
    starts = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):  # cut short by a full disk
            starts.append(json.loads(line))
    return sum(start["seconds"] for start in starts), starts[-1]["processes"] if starts else 0


def load_config(stage_dir: Path) -> StageConfig:
    """The recorded config of a stage, of an earlier version too; paths inside its run follow it to where it is now."""
    path = stage_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} does not exist; {stage_dir} is not the directory of a stage that was started")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        values = None
    if (
        not isinstance(values, dict)
        or not {"stage", "name", "runs_dir"} <= values.keys()
        or values["stage"] not in SCHEMAS
    ):
        raise UserError(f"{path} is not the config of a stage; run the stage again, which writes it")
    run = stage_dir.absolute().parent
    recorded = Path(values["runs_dir"]) / values["name"]
    for section, leaf in path_values(values["stage"], values):
        if Path(section[leaf]).is_relative_to(recorded):
            section[leaf] = str(run / Path(section[leaf]).relative_to(recorded))
    values = with_added(values, keys(values["stage"]))
    return typed(values["stage"], {**values, "runs_dir": str(run.parent), "name": run.name})


def with_added(values: dict[str, Any], among: set[str]) -> dict[str, Any]:
    """Values as recorded, perhaps by an earlier version, with the keys that it lacked of those that may be there."""
    completed = copy.deepcopy(values)
    for key in ADDED_SINCE.keys() & among:
        *sections, leaf = key.split(".")
        section: Any = completed
        for name in sections:
            section = (section or {}).get(name)
        if isinstance(section, dict):  # `typed` says what is missing
            section.setdefault(leaf, ADDED_SINCE[key])
    return completed


def difference(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """Dotted names of the values that differ."""
    names = []
    for name in sorted(earlier.keys() | now.keys()):
        old, new = earlier.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            names.append(difference(old, new, f"{prefix}{name}."))
        elif old != new:
            names.append(f"{prefix}{name}".removeprefix("config."))
    return ", ".join(filter(None, names))


def changed_pictures(config: StageConfig) -> str:
    """How many pictures are seen to have changed since the latest try began, and the first; empty when none is."""
    identity_file = config.run_dir / CHECKPOINTS / IDENTITY
    since = identity_file.stat().st_mtime_ns if identity_file.is_file() else 0
    contents = Contents.at(config.contents)
    names = dict.fromkeys(name for of_split in config.pictures().values() for name in of_split)
    changed = contents.changed_since(names, since)
    return f" (pictures that changed: {len(changed)}, the first is {changed[0]})" if changed else ""
