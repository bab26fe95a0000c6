"""The directory of one stage of a run: what is recorded before processes start, and what of an earlier try is kept."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from nexus_gen.specs.artifact import MANIFEST, Manifest, write_text_atomic
from nexus_gen.specs.errors import UserError
from train.schemas.fields import as_yaml, fingerprint_values, input_fingerprints
from train.schemas.stages import StageConfig

PACKAGES = ("torch", "transformers", "ms-swift", "deepspeed", "lightning", "diffsynth", "webdataset", "safetensors")
IDENTITY = "identity.json"  # beside the checkpoints: the config values and inputs that they belong to


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


def unchanged(config: StageConfig) -> bool:
    """Whether the stage's artifact was made by this config from these inputs."""
    if not (config.artifact_dir / MANIFEST).is_file():
        return False
    made = Manifest.load(config.artifact_dir)
    return made.config == fingerprint_values(config) and made.inputs == input_fingerprints(config)


def identity_of(artifact: Path) -> dict[str, Any]:
    """What the checkpoints that led to an artifact belong to."""
    made = Manifest.load(artifact)
    return {"config": made.config, "inputs": made.inputs}


def prepare(config: StageConfig, again: bool) -> Path:
    """Record config and environment, decide about earlier checkpoints; returns the config's path.

    Checkpoints of an unfinished try are gone on from when config and inputs are the same (and resume is true); when
    they differ, UserError. Checkpoints of a finished try are dropped: the artifact stays until a new one replaces it.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "log").mkdir(exist_ok=True)
    checkpoints = config.run_dir / "checkpoints"
    identity = {"config": fingerprint_values(config), "inputs": input_fingerprints(config)}
    if checkpoints.exists():
        earlier = json.loads((checkpoints / IDENTITY).read_text()) if (checkpoints / IDENTITY).is_file() else {}
        finished = (config.artifact_dir / MANIFEST).is_file() and earlier == identity_of(config.artifact_dir)
        if again or finished or not config.resume:
            shutil.rmtree(checkpoints)
            shutil.rmtree(config.artifact_dir.with_name("artifact.partial"), ignore_errors=True)
            (config.run_dir / "timing.jsonl").unlink(missing_ok=True)
        elif earlier != identity:
            raise UserError(
                f"{checkpoints} belong to an unfinished try with another {difference(earlier, identity)}; "
                "restore that, give resume=false to start over, or another name=..."
            )
    checkpoints.mkdir(exist_ok=True)
    write_text_atomic(checkpoints / IDENTITY, json.dumps(identity, indent=1))
    write_text_atomic(config.run_dir / "environment.json", json.dumps(code_version(), indent=1))
    path = config.run_dir / "config.yaml"
    write_text_atomic(path, as_yaml(config))
    return path


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
