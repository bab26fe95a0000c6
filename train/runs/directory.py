"""The directory of one stage of a run: what is recorded before processes start, and what of an earlier try is kept."""

import copy
import importlib.metadata
import json
import platform
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nexus_gen.artifacts.artifact import MANIFEST, Manifest, require_whole, write_text_atomic
from nexus_gen.artifacts.content import Contents
from nexus_gen.specs.errors import UserError
from train.preflight.inputs import input_fingerprints, pictures_of
from train.runs.checkpoints import last_step
from train.runs.earlier import accepts, completed, say_accepted
from train.runs.failures import forget_failures
from train.runs.lengths import (
    LENGTHS,
    in_words,
    read_history,
    refuse_shorter,
    rows_of,
    without_length,
    write_history,
)
from train.schemas.decoders import DecoderConfig
from train.schemas.fields import as_yaml, counted_keys, fingerprint_values, keys, path_values, typed
from train.schemas.stage import StageConfig
from train.schemas.table import SCHEMAS

PACKAGES = ("torch", "transformers", "ms-swift", "deepspeed", "lightning", "diffsynth", "webdataset", "safetensors")
CHECKPOINTS = "checkpoints"
QUARANTINE = "quarantine"  # the bad rows that training came across
TIMING = "timing.jsonl"  # a line for each start of the latest try
IDENTITY = "identity.json"  # beside the checkpoints: the config values and inputs that they belong to
REQUEST = "from.json"  # in the run: the from=... that is under way
# Keys that configs of earlier versions lack, with the values that stand for what those versions did.
ADDED_SINCE: dict[str, Any] = {
    "objective.round_positions": True,
    "average.initial": 0.0,
    "embed.pixels": "squash",
    "data.token_budget": 0,
    "optim.name": "adamw",
    "schedule.optimizer": "adamw",
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


@dataclass(frozen=True)
class Beginning:
    """Where a start of a stage begins.

    resumes: with what is there, checkpoints as a rule; otherwise that is dropped. said: a sentence for the person who
    started it; empty where there is no news. was: what differs from the training so far, as of `changes`. accepted: see
    `completed`.
    """

    resumes: bool
    said: str = ""
    was: dict[str, Any] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)


def beginning(config: StageConfig, wanted: dict[str, Any], more: bool = False) -> Beginning:
    """Whether a stage goes on from its checkpoints, and what is to be said of it; writes nothing.

    It does when its try is unfinished and config and inputs are the same, and, finished or not, when they differ only
    in how long it trains. more: asked for by `more=...`, which continues on new embeddings of the same rows, too.
    Raises UserError for an unfinished try with other differences, and for a length that is passed already.
    """
    checkpoints = config.run_dir / CHECKPOINTS
    if not config.resume:
        return Beginning(resumes=False)
    if not checkpoints.exists() or not any(checkpoints.iterdir()):
        return without_checkpoints(config, wanted)
    finished, earlier = is_finished(config), checkpoints_identity(config)
    known, accepted = completed(config, earlier, wanted) if earlier else (earlier, [])
    was = changes(known, wanted)
    if config.trains and earlier and was and was.keys() <= may_change(config, more):
        if last_step(checkpoints):
            refuse_shorter(config.stage, checkpoints, wanted["config"], {})
            return Beginning(True, continues(config, known, wanted, was), was, accepted)
        return without_checkpoints(config, wanted) if finished else Beginning(resumes=True)
    if finished:
        values = [name for name in was if not name.startswith("inputs.") and name not in LENGTHS]
        if more and values:
            raise UserError(
                f"{config.stage}: more=... continues what was trained, and there {', '.join(values)} differed; leave "
                "that out, or give resume=false and a length instead of more=... to start over"
            )
        return Beginning(resumes=False, said=starts_over(config, known, wanted))
    if known != wanted and not config.reuses_by_content:
        if not earlier:
            raise UserError(
                f"{checkpoints / IDENTITY} is missing or damaged, so nobody knows what the checkpoints beside it "
                "belong to; put it back, or give resume=false to start over"
            )
        raise UserError(
            f"{checkpoints} belong to an unfinished try with another {', '.join(was)}"
            f"{changed_pictures(config)}; restore that, give resume=false to start over, or another name=..."
        )
    return Beginning(resumes=True, accepted=accepted if earlier != wanted else [])


def steps_done(config: StageConfig) -> int:
    """Steps of the checkpoints that a stage would go on from, as far as values tell; its inputs are not read."""
    earlier = checkpoints_identity(config).get("config", {})
    same = config.resume and without_length(earlier) == without_length(fingerprint_values(config))
    return last_step(config.run_dir / CHECKPOINTS) if same else 0


def may_change(config: StageConfig, more: bool) -> set[str]:
    """Dotted names of what may differ from the training so far when a stage goes on from its checkpoints."""
    allowed = set(LENGTHS)
    if more and isinstance(config, DecoderConfig):
        allowed |= {"inputs.init.decoder", "inputs.init.transformer"}  # its weights are in the checkpoint
        if read_history(config.run_dir / CHECKPOINTS).get("rows") == rows_of(config.shards):
            allowed.add("inputs.shards")
    return allowed


def continues(config: StageConfig, known: dict[str, Any], wanted: dict[str, Any], was: dict[str, Any]) -> str:
    step, before = last_step(config.run_dir / CHECKPOINTS), in_words(known["config"])
    optim: Any = getattr(config, "optim", None)
    planned = "" if optim.schedule == "constant" else "; learning rate re-planned"
    shards = " on new embeddings of the same rows" if "inputs.shards" in was else ""
    return f"{config.stage}: continues from step {step} of {before} to {in_words(wanted['config'])}{shards}{planned}"


def starts_over(config: StageConfig, known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What is said when a training stage that was finished starts over; its artifact stays until a new one is made."""
    was = changes(known, wanted)
    if not config.trains or not was:
        return ""
    names = ", ".join(name for name in was if name not in LENGTHS)
    why = f"because {names} changed" if names else "because its checkpoints are gone"
    return f"{config.stage}: starts over with {in_words(wanted['config'], unit=True)}, {why}"


def without_checkpoints(config: StageConfig, wanted: dict[str, Any]) -> Beginning:
    """The beginning of a stage that has nothing to go on from, and perhaps an artifact."""
    made = None if waits_for_another(config) else recorded(config)
    if made is None or not config.trains:
        return Beginning(resumes=True)
    known, _ = completed(config, made, wanted)
    if changes(known, wanted).keys() <= set(LENGTHS):
        refuse_shorter(config.stage, config.run_dir / CHECKPOINTS, wanted["config"], trained=known["config"])
    return Beginning(resumes=False, said=starts_over(config, known, wanted))


def prepare(config: StageConfig, wanted: dict[str, Any], more: bool = False) -> Path:
    """Record config, identity and environment, keep or drop earlier checkpoints (`beginning`); returns where config is.

    The artifact of an earlier try stays until a new one replaces it.
    """
    (config.run_dir / "log").mkdir(parents=True, exist_ok=True)
    forget_failures(config.run_dir / "log")
    checkpoints = config.run_dir / CHECKPOINTS
    begins = beginning(config, wanted, more)
    if not begins.resumes:
        forget_try(config)
    if begins.accepted:
        say_accepted(config, begins.accepted, "resume=false")
    checkpoints.mkdir(exist_ok=True)
    record_history(config, begins)
    write_text_atomic(checkpoints / IDENTITY, json.dumps(wanted, indent=1))
    write_text_atomic(config.run_dir / "environment.json", json.dumps(code_version(), indent=1))
    path = config.run_dir / "config.yaml"
    write_text_atomic(path, as_yaml(config))
    return path


def record_history(config: StageConfig, begins: Beginning) -> None:
    """Write down what the identity of the checkpoints does not say, and before it: an end in between loses nothing."""
    checkpoints = config.run_dir / CHECKPOINTS
    earlier = read_history(checkpoints)
    continued = list(earlier.get("continued", []))
    entry = {"step": last_step(checkpoints), "was": begins.was}
    if begins.was and entry not in continued:
        continued.append(entry)
    rows = rows_of(config.shards) if isinstance(config, DecoderConfig) else ""
    if rows or continued:
        write_history(checkpoints, rows, continued)


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


def changes(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> what it was, of the values that differ."""
    found: dict[str, Any] = {}
    for name in sorted(earlier.keys() | now.keys()):
        old, new = earlier.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{prefix}{name}.")
        elif old != new:
            found[f"{prefix}{name}".removeprefix("config.")] = old
    return found


def changed_pictures(config: StageConfig) -> str:
    """How many pictures are seen to have changed since the latest try began, and the first; empty when none is."""
    identity_file = config.run_dir / CHECKPOINTS / IDENTITY
    since = identity_file.stat().st_mtime_ns if identity_file.is_file() else 0
    contents = Contents.at(config.contents)
    names = dict.fromkeys(name for of_split in pictures_of(config).values() for name in of_split)
    changed = contents.changed_since(names, since)
    return f" (pictures that changed: {len(changed)}, the first is {changed[0]})" if changed else ""
