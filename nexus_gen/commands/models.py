"""`nexus-gen models download | inspect | convert`.

nexus-gen models download generate --source modelscope --to models --dry-run
nexus-gen models inspect models/FLUX.1-dev
nexus-gen models convert models/Nexus-GenV2/generation_decoder.bin generation_decoder.safetensors --to released
"""

import argparse
import shutil
from pathlib import Path

from nexus_gen.commands.downloads import SOURCES, Model, Part, models, select
from nexus_gen.parts.inspection import as_json, inspect
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.kinds import NAMED_KEYS
from nexus_gen.tensors.layouts import TARGETS

GB = 1e9


def parser(command: str) -> Parser:
    summaries = {
        "download": "Fetch the released models; a second start goes on where the first ended.",
        "inspect": "What a checkpoint is, from the headers of its files. Status 1 when something is missing.",
        "convert": "Write a checkpoint in another layout; nothing that exists is overwritten.",
    }
    result = Parser(
        prog=f"nexus-gen models {command}",
        description=summaries[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command == "download":
        result.epilog = "\n".join(["what there is:", *table([(model, model.parts) for model in models()])])
        result.add_argument(
            "what", nargs="*", metavar="WHAT", help="a model, MODEL/PART, or a stage or command (default: everything)"
        )
        result.add_argument("--source", choices=SOURCES, default=SOURCES[0], help="default: %(default)s")
        result.add_argument("--to", type=Path, default=Path("models"), help="directory (default: %(default)s)")
        result.add_argument("--dry-run", action="store_true", help="say what would be fetched, and end")
        return result
    if command == "inspect":
        result.add_argument("path", type=Path, metavar="PATH", help="a file, or a directory of a checkpoint")
        result.add_argument("--json", action="store_true", help="for programs")
    else:
        result.add_argument("source", type=Path, metavar="SRC")
        result.add_argument("target", type=Path, metavar="DST", help="a file where SRC is one, else a directory")
        result.add_argument(
            "--to",
            choices=TARGETS,
            required=True,
            help="released: as published (BFL's names for FLUX); diffusers: for FLUX's transformer and autoencoder; "
            "nexus-gen: the names of the modules in memory",
        )
    result.add_argument("--verbose", action="store_true", help="name every key that does not fit")
    return result


def table(chosen: list[tuple[Model, tuple[Part, ...]]]) -> list[str]:
    """What is fetched, how large it is, and what needs it, one part a line."""
    rows = [
        (f"{model.name}/{part.name}", f"{part.num_bytes / GB:.1f} GB", ", ".join(part.users))
        for model, parts in chosen
        for part in parts
    ]
    width = max(len(name) for name, _, _ in rows)
    return [f"  {name:<{width}}  {size:>8}  for {users}" for name, size, users in rows]


def download(arguments: argparse.Namespace) -> int:
    chosen = select(arguments.what)
    total = sum(part.num_bytes for _, parts in chosen for part in parts)
    print("\n".join([*table(chosen), f"{total / GB:.1f} GB in all, from {arguments.source} to {arguments.to}/"]))
    if arguments.source == "huggingface":
        for model in (model for model, _ in chosen if model.gated):
            print(
                f"{model.name} is gated: accept its licence at https://huggingface.co/{model.huggingface} "
                "and log in with `hf auth login`, or take --source modelscope"
            )
    if arguments.dry_run:
        return 0
    for model, parts in chosen:
        directory = arguments.to / model.name
        missing = sum(part.num_bytes for part in parts) - held(directory)
        free = shutil.disk_usage(existing(arguments.to)).free
        if missing > free:
            raise UserError(
                f"{directory} needs {missing / GB:.1f} GB more and its disk has {free / GB:.1f} GB free; "
                "make room, or give another --to"
            )
        from nexus_gen.commands.download import fetch  # the hubs' clients: a second to import

        fetch(model, parts, arguments.source, directory)
        print(f"{directory} is complete")
    return 0


def held(directory: Path) -> int:
    """Bytes of what is there already, unfinished files included."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def existing(directory: Path) -> Path:
    """The nearest directory above that exists."""
    directory = directory.absolute()
    return next(place for place in (directory, *directory.parents) if place.is_dir())


def main(argv: list[str]) -> int:
    command = argv[0]
    arguments = parser(command).parse_args(argv[1:])
    if command == "download":
        return download(arguments)
    limit = None if arguments.verbose else NAMED_KEYS
    if command == "inspect":
        report = inspect(arguments.path, limit)
        print(as_json(report) if arguments.json else "\n".join(report.lines()))
        return 0 if report.whole else 1
    from nexus_gen.commands.convert import convert  # torch

    print("\n".join(convert(arguments.source, arguments.target, arguments.to, limit)))
    return 0
