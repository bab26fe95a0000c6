"""The console script `nexus-gen`: a table from command to the module that owns it.

Modules are imported when their command is called, so that `--help`, errors and completion stay fast.
"""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:  # python -m launch.cli, where nexus-gen is not installed
    # In place of the working directory, before anything is imported from there.
    sys.path[0] = os.path.dirname(os.path.dirname(__file__))

import errno
import importlib
import select
import signal
import threading

from launch.python_path import python_variables
from nexus_gen.specs.errors import UserError, nearest

# command -> (module with main(argv), what it does)
COMMANDS = {
    "run": ("launch.run", "run one stage (stage=...) or a pipeline of stages (pipeline=...)"),
    "data shapes": ("data.shapes.dataset", "draw the procedural dataset of coloured shapes"),
    "data check": ("data.doctor.command", "find what would break training in message datasets, before it starts"),
    "shards verify": ("data.shards.commands", "check the shards of an embedding stage"),
    "shards repair": ("data.shards.commands", "keep what is whole of damaged shards"),
    "shards stats": ("data.shards.commands", "counts, norms and variances of stored embeddings"),
    "shards show": ("data.shards.commands", "a page of pictures and their nearest neighbours by embedding"),
    "understand": ("nexus_gen.commands.use", "answer a question about a picture"),
    "generate": ("nexus_gen.commands.use", "paint a picture from a prompt"),
    "edit": ("nexus_gen.commands.use", "repaint a picture by an instruction"),
    "ui": ("nexus_gen.ui.server", "a page in the browser for all three, on a run's models"),
    "models download": ("nexus_gen.commands.models", "fetch the released models, or say what there is (--dry-run)"),
    "models inspect": ("nexus_gen.commands.models", "what a checkpoint is, its layout and size, and what it lacks"),
    "models convert": ("nexus_gen.commands.models", "write a checkpoint in another layout"),
    "models ship": ("train.ship", "cut a run down to what inference and finetuning read, in half precision"),
    "completion": ("launch.completion", "tab completion for bash: source <(nexus-gen completion)"),
    "evaluate": (
        "train.evaluate.command",
        "scores of a run's models on held-out rows, what limits them, and a page with pictures",
    ),
    "evaluate geneval": ("train.evaluate.benchmarks", "paint prompts into the file layout of GenEval"),
    "evaluate imgedit": ("train.evaluate.benchmarks", "edit pictures into the file layout of ImgEdit"),
    "evaluate choices": ("train.evaluate.multiple_choice", "accuracy on multiple-choice questions, as MMMU has them"),
    "ablate": ("launch.ablate", "train arms of a run that differ in one thing, and compare them"),
    "ablate plot": ("train.report.ablation", "draw ablations again from what their arms logged, or from a result"),
    "report": ("train.report.command", "one HTML page of a run: curves, pictures, answers"),
}
# What happens to files that no check beforehand rules out; that one is missing is for checks to say.
FILE_TROUBLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
# The only variables that the program reads; a misspelt one would silently do nothing.
VARIABLES = {"NEXUS_GEN_RUNS": "where runs are written when runs_dir is not given"}


def listed(family: str = "") -> list[str]:
    """A line for each command, or for those of two words that begin with `family`."""
    names = [name for name in COMMANDS if not family or name.startswith(f"{family} ")]
    width = max(map(len, names), default=0)
    return [f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names]


def usage() -> str:
    variables = [f"  {name}  {meaning}" for name, meaning in VARIABLES.items()]
    return "\n".join(
        [
            "usage: nexus-gen COMMAND [ARGUMENTS]",
            "",
            "Train and use one model that understands, generates and edits images.",
            "",
            "commands:",
            *listed(),
            "",
            "`nexus-gen COMMAND --help` says more.",
            "",
            "environment:",
            *variables,
        ]
    )


def check_environment() -> None:
    for name in os.environ:
        if name.startswith("NEXUS_GEN_") and name not in VARIABLES:
            raise UserError(f"environment variable {name} is not one that nexus-gen reads{nearest(name, VARIABLES)}")


def resolve(argv: list[str]) -> tuple[str, list[str]]:
    """Split the arguments into a command of the table and what follows it."""
    for words in (2, 1):
        command = " ".join(argv[:words])
        if len(argv) >= words and command in COMMANDS:
            return command, argv[words:]
    raise UserError(f"no command '{' '.join(argv[:2])}'{nearest(' '.join(argv[:2]), COMMANDS)}")


def reader_is_gone(file: int) -> bool:
    """Whether nobody reads any more what is written to a pipe, as after `| head`."""
    poll = select.poll()
    poll.register(file, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def end(number: int, _frame: object) -> None:
    """End by the usual way out of Python, which removes what is half written."""
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        argv = sys.argv[1:]
        os.environ |= python_variables()  # for all that commands start
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(usage(), flush=True)
            return 0
        if argv[0] not in COMMANDS and argv[1:] in ([], ["-h"], ["--help"]) and (family := listed(argv[0])):
            print(f"usage: nexus-gen {argv[0]} COMMAND [ARGUMENTS]", "", *family, sep="\n", flush=True)
            return 0
        check_environment()
        command, rest = resolve(argv)
        module = importlib.import_module(COMMANDS[command][0])
        # One module may own several commands: it is told which by the first argument.
        status = module.main([command.split()[-1], *rest])
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not reader_is_gone(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would complain at its end
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in FILE_TROUBLE:
            raise
        where = error.filename2 or error.filename
        print(
            f"error: {f'{where}: ' if where else ''}{error.strerror}; fix that, or give another path", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
