"""`nexus-gen completion`: tab completion for bash; put `source <(nexus-gen completion)` into ~/.bashrc."""

from launch.cli import COMMANDS
from launch.compose import CONFIGS
from train.schemas.fields import keys
from train.schemas.stages import SCHEMAS

SCRIPT = """_nexus_gen() {
  local IFS=$'\\n'; COMP_WORDBREAKS=${COMP_WORDBREAKS//=}; compopt -o nospace
  local line=${COMP_LINE:0:COMP_POINT}
  COMPREPLY=($(nexus-gen completion --for "$line"))
}
complete -o default -F _nexus_gen nexus-gen"""


def candidates(line: str) -> list[str]:
    """What the last word of a command line can become."""
    *before, word = line.split(" ")[1:]
    if before == ["ablate"]:
        return sorted(f"{path.stem} " for path in (CONFIGS / "ablation").glob(f"{word}*.yaml"))
    if before[:1] != ["run"]:
        typed = " ".join([*before, word])
        names = {" ".join(command.split()[: len(before) + 1]) for command in COMMANDS}
        return sorted(f"{name.split()[-1]} " for name in names if name.startswith(typed))
    stage = next((given.partition("=")[2] for given in before if given.startswith("stage=")), "")
    group, chosen, _ = word.partition("=")
    if chosen and (CONFIGS / group).is_dir():
        choices = [f"{group}={path.stem} " for path in (CONFIGS / group).glob("*.yaml")]
    else:
        groups = [path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "ablation"]
        choices = [f"{key}=" for key in {*groups, *(keys(stage) if stage in SCHEMAS else ())}]
    return sorted(choice for choice in choices if choice.startswith(word))


def main(argv: list[str]) -> int:
    if argv[1:2] == ["--for"]:
        print("\n".join(candidates(" ".join(argv[2:]) or "nexus-gen ")))
    else:
        print(SCRIPT)
    return 0
