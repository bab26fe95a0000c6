"""`nexus-gen completion`: tab completion for bash; put `source <(nexus-gen completion)` into ~/.bashrc."""

import os
import re
import shlex
from typing import Any

from omegaconf import OmegaConf

from launch.cli import COMMANDS
from launch.longer import MORE, TRAINING
from launch.overrides import CONFIGS, GROUPS, choices
from train.schemas.common import PATH
from train.schemas.fields import keys, walk
from train.schemas.table import SCHEMAS

OPTIONS = ("--cfg", "--dry-run", "--keys")  # of `nexus-gen run`
SCRIPT = """_nexus_gen() {
  COMP_WORDBREAKS=${COMP_WORDBREAKS//=}; compopt -o nospace
  mapfile -t COMPREPLY < <(nexus-gen completion --for "${COMP_LINE:0:COMP_POINT}")
  [[ ${COMPREPLY[0]} ]] || COMPREPLY=()
}
complete -o default -F _nexus_gen nexus-gen"""


def candidates(line: str) -> list[str]:
    """What the last word of a command line can become, as it is typed in bash."""
    *before, word = words_of(line)[1:]
    if before == ["ablate"]:
        return [f"{name} " for name in choices("ablation") if name.startswith(word)]
    if before[:1] != ["run"]:
        typed = " ".join([*before, word])
        names = {" ".join(command.split()[: len(before) + 1]) for command in COMMANDS}
        return sorted(f"{name.split()[-1]} " for name in names if name.startswith(typed))
    stages = stages_of(before)
    key, equals, value = word.partition("=")
    group = key.removeprefix(f"{key.split('.')[0]}.") if key.split(".")[0] in SCHEMAS else key
    if equals and group in (*GROUPS, "pipeline"):
        found = [f"{key}={name} " for name in choices(group)]
    elif equals and key == "from":
        found = [f"from={stage} " for stage in stages]
    elif equals and key.rpartition(".")[2] == MORE:
        found = [f"{key}=2x "]
    elif equals:
        is_path = any((group, True) == (name, PATH in marks) for s in SCHEMAS.values() for name, marks in walk(s))
        found = [f"{key}={path}" for path in paths(value)] if is_path else []
    elif word.startswith("-"):
        found = [f"{option} " for option in OPTIONS]
    elif before[-1] == "--keys" and stages:
        found = sorted({f"{name} " for stage in stages for name in keys(stage)})
    else:
        keys_of = {f"{name}=" for stage in stages for name in keys(stage)}
        of_stage = {stage: {*keys(stage), *([MORE] if stage in TRAINING else [])} for stage in stages}
        own = {f"{stage}.{name}=" for stage in stages for name in of_stage[stage] if word.startswith(f"{stage}.")}
        found = sorted({f"{name}=" for name in (*GROUPS, "pipeline", "from", MORE)} | keys_of | own)
    return [escape(choice) for choice in found if choice.startswith(word)]


def words_of(line: str) -> list[str]:
    """The words of a line as bash takes it apart; the last one is empty after a blank."""
    try:
        words = shlex.split(line)
    except ValueError:  # a quote is open
        return line.split(" ")
    return [*words, ""] if line.endswith(" ") and not line.endswith("\\ ") else words


def stages_of(before: list[str]) -> list[str]:
    """The stages that a line is about so far."""
    chosen = dict(word.split("=", 1) for word in before if "=" in word)
    if chosen.get("pipeline") in choices("pipeline"):
        plan: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "pipeline" / f"{chosen['pipeline']}.yaml"))
        return plan["stages"]
    return [stage for stage in SCHEMAS if stage == chosen.get("stage")]


def paths(begun: str) -> list[str]:
    """Files and directories that begin like this, directories with a slash behind them."""
    head, slash, tail = begun.rpartition("/")
    try:
        entries = sorted(os.scandir(os.path.expanduser(f"{head}{slash}") or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    names = (entry.name + ("/" if entry.is_dir() else " ") for entry in entries if entry.name.startswith(tail))
    return [f"{head}{slash}{name}" for name in names]


def escape(choice: str) -> str:
    """A word as it is typed in bash; a blank at its end, which says that it is whole, stays."""
    whole = choice.removesuffix(" ")
    return re.sub(r"([^\w@%+=:,./~-])", r"\\\1", whole) + choice[len(whole) :]


def main(argv: list[str]) -> int:
    if argv[1:2] == ["--for"]:
        print("\n".join(candidates(" ".join(argv[2:]) or "nexus-gen ")))
    else:
        print(SCRIPT)
    return 0
