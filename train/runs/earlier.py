"""What earlier versions recorded of a stage, held against what this one looks at.

They looked at the ends of large files alone, and at no pictures of `pretrain` and `standins`. What they made is not
made again because of that: what cannot be compared is accepted, which is said once, and counts as it is from then on.
"""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from nexus_gen.artifacts.artifact import Seals, digest, write_text_atomic
from nexus_gen.artifacts.content import hash_file
from train.preflight.inputs import inputs_of
from train.schemas.stage import StageConfig

log = logging.getLogger(__name__)

ACCEPTED = "accepted.json"  # beside an artifact of an earlier version: the inputs that it was accepted with
SAMPLED_BYTES = 1 << 20  # of a file of more than two of these, the ends and the size stood for the whole


def completed(config: StageConfig, found: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An identity as recorded, and the roles of its inputs that an earlier version did not look at as this one does.

    These are taken over from `wanted`, the identity of now, unless what was looked at has changed.
    """
    where, inputs = inputs_of(config), found.get("inputs", {})

    def is_accepted(role: str, fingerprint: str) -> bool:
        if role not in inputs:
            return role.startswith("pictures.")
        if inputs[role] == fingerprint or role not in where or Seals().artifact_of(str(where[role])):
            return False  # what is in an artifact has the fingerprint that it always had
        return inputs[role] == sampled_fingerprint(where[role])

    accepted = [role for role, fingerprint in wanted["inputs"].items() if is_accepted(role, fingerprint)]
    return {**found, "inputs": inputs | {role: wanted["inputs"][role] for role in accepted}}, accepted


def accepts(config: StageConfig, created_at: str, found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether an artifact's identity, as recorded, may be the one of now; says so once, and remembers it."""
    path = config.run_dir / ACCEPTED
    with suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["created_at"] == created_at:
            return {**found, "inputs": known["inputs"]} == wanted
    now, roles = completed(config, found, wanted)
    if now != wanted:
        return False
    say_accepted(config, roles, f"from={config.stage}, or without {config.artifact_dir}")
    with suppress(OSError):  # a read-only run; it is said again then
        write_text_atomic(path, json.dumps({"created_at": created_at, "inputs": wanted["inputs"]}, indent=1))
    return True


def say_accepted(config: StageConfig, roles: list[str], again: str) -> None:
    log.warning(
        "%s was recorded by an earlier version, which did not look at all of %s: taken as unchanged, and as it is now "
        "from here on; it is made again with %s",
        config.stage,
        ", ".join(roles),
        again,
    )


def sampled_fingerprint(where: Path) -> str:
    """The fingerprint of a file or directory as earlier versions took it."""
    if where.is_file():
        return _sampled(where)
    files = [path for path in sorted(where.rglob("*")) if path.is_file()]
    return digest([[path.relative_to(where).as_posix(), _sampled(path)] for path in files])


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    if size <= 2 * SAMPLED_BYTES:
        return hash_file(path)
    with open(path, "rb") as file:
        head = file.read(SAMPLED_BYTES)
        file.seek(size - SAMPLED_BYTES)
        return digest([size, head.hex(), file.read().hex()])
