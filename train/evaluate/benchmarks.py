"""Pictures in the file layouts that the scripts of published benchmarks read.

nexus-gen evaluate geneval runs/full --prompts evaluation_metadata.jsonl --output geneval
nexus-gen evaluate imgedit runs/full --edits basic_edit.json --images originals --output imgedit

Either takes rows of our own dataset instead of the benchmark's file. Pictures that are there already are kept, so an
interrupted command resumes, with the same models and settings. Sources: the repositories djghosh13/geneval and
PKU-YuanGroup/ImgEdit.
"""

import argparse
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data.messages.rows import Row, read_rows
from data.records.reading import read_records
from nexus_gen.artifacts.artifact import fingerprint_path, write_text_atomic
from nexus_gen.artifacts.content import Contents
from nexus_gen.artifacts.results import check_result
from nexus_gen.commands.use import add_model_arguments, save_atomic
from nexus_gen.parts.models import DECODER_KINDS, ModelPaths, memory_of
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.numbers import not_finite
from train.progress import progress_bar
from train.scores.outcomes import prompt_of, require_truth
from train.scores.scoring import Metadata, geneval_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

    from nexus_gen.inference import NexusGen

# operation of an edit of ours -> ImgEdit's type
EDIT_TYPES = {
    "add": "add",
    "remove": "remove",
    "recolour": "alter",
    "move": "action",
    "replace": "replace",
    "background": "background",
}
PAINTED_BY = ".painted_by.json"  # in the output: the models and settings of its pictures
Item = TypeVar("Item")


def parser(command: str) -> Parser:
    result = Parser(
        prog=f"nexus-gen evaluate {command}",
        description={
            "geneval": "Paint prompts into OUTPUT/00000/samples/0000.png with OUTPUT/00000/metadata.jsonl beside it.",
            "imgedit": "Edit pictures into OUTPUT/KEY.png, in the aspect that they have.",
        }[command],
    )
    result.add_argument("run", type=Path, help="run directory, such as runs/tiny")
    if command == "geneval":
        result.add_argument(
            "--prompts",
            type=Path,
            required=True,
            help="GenEval's metadata (JSONL), a text file with a prompt on each line, or rows of our own dataset",
        )
        result.add_argument("--num-samples", type=int, default=4, help="pictures of a prompt (default: %(default)s)")
    else:
        result.add_argument(
            "--edits",
            type=Path,
            required=True,
            help="ImgEdit's JSON (key to id, prompt, edit_type), or rows of ours",
        )
        result.add_argument("--images", type=Path, help="where the ids of edits begin (default: beside --edits)")
        result.add_argument("--editor", default=DECODER_KINDS[1], choices=DECODER_KINDS, help="default: %(default)s")
    result.add_argument("--output", type=Path, required=True, help="directory to write")
    result.add_argument("--num", type=int, help="the first ones only")
    result.add_argument("--batch-size", type=int, default=16, help="pictures at a time (default: %(default)s)")
    result.add_argument("--seed", type=int, default=42)
    result.add_argument("--num-inference-steps", type=int, help="Euler steps (default: the decoder's)")
    result.add_argument("--cfg-scale", type=float, help="classifier-free guidance (default: the decoder's)")
    models = add_model_arguments(result, paints=True)
    models.add_argument("--decoder", type=Path, help="decoder file or artifact directory")
    return result


def read_prompts(path: Path) -> list[Metadata]:
    """GenEval's metadata for each prompt: as it stands, or with the prompt alone where nothing more is known."""
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); give a text file in UTF-8, a prompt a line") from error
        return [{"prompt": line.strip()} for line in lines if line.strip()]
    prompts: list[Metadata] = []
    for record in read_records(path):
        if record.values is not None and "messages" in record.values:
            rows = [row for row in read_rows(path) if row.task == "generation"]
            return [
                geneval_metadata(require_truth(row), prompt_of(row)) if row.truth else {"prompt": prompt_of(row)}
                for row in rows
            ]
        if record.values is None or not isinstance(record.values.get("prompt"), str):
            raise UserError(f"{record.where}: no prompt; each line is an object with a prompt, as GenEval's metadata")
        for key, value in not_finite(record.values):
            raise UserError(f"{record.where}: {key} is {value}; it must be a finite number")
        prompts.append(record.values)
    return prompts


@dataclass(frozen=True)
class Edit:
    """One edit of ImgEdit's file. image: the source. prompt: the instruction."""

    key: str
    image: Path
    prompt: str
    edit_type: str


def read_edits(path: Path, images: Path) -> list[Edit]:
    """The edits of ImgEdit's file, or of rows of ours; UserError for what is neither, or lacks a picture."""
    if path.suffix == ".jsonl":
        edits = [
            Edit(row.id, source_file(row), prompt_of(row), EDIT_TYPES[require_truth(row)["category"]])
            for row in read_rows(path)
            if row.task == "editing"
        ]
    else:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            edits = [Edit(key, images / edit["id"], edit["prompt"], edit["edit_type"]) for key, edit in values.items()]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); give ImgEdit's JSON file or rows") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not key -> id, prompt, edit_type ({error!r}); give ImgEdit's file") from error
    for edit in edits:
        if not isinstance(edit.prompt, str):
            raise UserError(f"{path}: the prompt of {edit.key} is {edit.prompt!r}; give a text")
        if not edit.image.is_file():
            raise UserError(f"{path}: {edit.image} of {edit.key} does not exist; give --images, where its ids begin")
        if Path(edit.key).name != edit.key:
            raise UserError(f"{path}: the key {edit.key!r} is no file name; give every edit a plain one")
    return edits


def source_file(row: Row) -> Path:
    """The picture that a row edits; UserError when it is none that ImgEdit's scripts could read."""
    source = row.images[-2]
    if not isinstance(source, Path):
        raise UserError(
            f"{row.where}: its pictures are inside the row, and ImgEdit's scripts read files; give rows that name "
            "files, as `nexus-gen data shapes` draws them"
        )
    return source


def batches(items: list[Item], size: int, name: str) -> Iterator[list[Item]]:
    """The items in pieces, with their progress."""
    with progress_bar(len(items), name) as bar:
        for first in range(0, len(items), size):
            yield items[first : first + size]
            bar.update(len(items[first : first + size]))


def noise_seed(seed: int, key: str) -> int:
    """Its own noise for every picture, whatever else is in its batch."""
    return zlib.crc32(f"{seed} {key}".encode())


def prepare_prompts(arguments: argparse.Namespace) -> "Callable[[NexusGen], int]":
    """Write all that is known without a model; what is returned paints, and returns how many pictures it painted."""
    output, todo = arguments.output, []
    prompts = read_prompts(arguments.prompts)[: arguments.num]
    if not prompts:
        raise UserError(f"{arguments.prompts} holds no prompts; give GenEval's metadata, lines of text, or rows")
    for index, metadata in enumerate(prompts):
        folder, text = output / f"{index:05d}", json.dumps(metadata, ensure_ascii=False) + "\n"
        known = folder / "metadata.jsonl"
        if known.is_file() and known.read_text(encoding="utf-8") != text:
            raise UserError(f"{known} is of another prompt; give --output with an empty or a new directory")
        write_text_atomic(known, text)
        samples = [folder / "samples" / f"{number:04d}.png" for number in range(arguments.num_samples)]
        todo += [(metadata["prompt"], path) for path in samples if not path.is_file()]
    return lambda model: paint_prompts(model, todo, arguments)


def paint_prompts(model: "NexusGen", todo: list[tuple[str, Path]], arguments: argparse.Namespace) -> int:
    """Paint (prompt, path) pairs."""
    for batch in batches(todo, arguments.batch_size, "geneval"):
        asked = list(dict.fromkeys(prompt for prompt, _ in batch))  # the samples of a prompt share its embeddings
        turns = [model.wording.turn("generation", prompt) for prompt in asked]
        embeds = model.imagine_all(
            [turn.user for turn in turns],
            [turn.reply for turn in turns],
            [[] for _ in asked],
            [turn.system for turn in turns],
        )
        rows = [asked.index(prompt) for prompt, _ in batch]
        save(model.paint(embeds[rows], **sampling([path for _, path in batch], arguments)), batch)
    return len(todo)


def prepare_edits(arguments: argparse.Namespace) -> "Callable[[NexusGen], int]":
    """As `prepare_prompts`. Edits of rows leave `edits.json`, which ImgEdit's scripts read, beside their pictures."""
    images = arguments.images or arguments.edits.parent
    edits = read_edits(arguments.edits, images)[: arguments.num]
    if not edits:
        raise UserError(f"{arguments.edits} holds no edits; give ImgEdit's JSON file or rows")
    if arguments.edits.suffix == ".jsonl":
        table = {
            edit.key: {"id": os.path.relpath(edit.image, images), "prompt": edit.prompt, "edit_type": edit.edit_type}
            for edit in edits
        }
        write_text_atomic(arguments.output / "edits.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    pairs = [(edit, arguments.output / f"{edit.key}.png") for edit in edits]
    todo = [(edit, path) for edit, path in pairs if not path.is_file()]
    return lambda model: paint_edits(model, todo, arguments)


def paint_edits(model: "NexusGen", todo: list[tuple[Edit, Path]], arguments: argparse.Namespace) -> int:
    """Paint (edit, path) pairs."""
    for batch in batches(todo, arguments.batch_size, "imgedit"):
        turns = [model.wording.turn("editing", edit.prompt, num_pictures=1) for edit, _ in batch]
        pictures = model.edit_all(
            [turn.user for turn in turns],
            [turn.reply for turn in turns],
            [[edit.image] for edit, _ in batch],
            systems=[turn.system for turn in turns],
            **sampling([path for _, path in batch], arguments),
        )
        save(pictures, batch)
    return len(todo)


def sampling(paths: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `NexusGen.paint`, with noise of its own for every picture."""
    return {
        "num_inference_steps": arguments.num_inference_steps,
        "cfg_scale": arguments.cfg_scale,
        "seed": [noise_seed(arguments.seed, str(path.relative_to(arguments.output))) for path in paths],
    }


def save(pictures: "list[Image]", batch: Sequence[tuple[Any, Path]]) -> None:
    for picture, (_, path) in zip(pictures, batch, strict=True):
        save_atomic(picture, path)


def require_same(arguments: argparse.Namespace, paths: ModelPaths) -> None:
    """UserError when earlier pictures in the output are of other models or settings; records what paints now."""
    contents = Contents.at(memory_of(arguments.run))
    models = {"autoregressive": paths.autoregressive, "decoder": paths.decoder, "flux": paths.flux}
    painted_by = {role: fingerprint_path(path, contents) for role, path in models.items() if path is not None}
    contents.save()
    painted_by |= {name: getattr(arguments, name) for name in ("seed", "num_inference_steps", "cfg_scale")}
    path = arguments.output / PAINTED_BY
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else painted_by
    if unlike := [name for name, value in painted_by.items() if before.get(name) != value]:
        raise UserError(
            f"the pictures in {arguments.output} were painted with another {', '.join(unlike)}; "
            "give --output with an empty or a new directory"
        )
    write_text_atomic(path, json.dumps(painted_by, indent=1) + "\n")


def main(argv: list[str]) -> int:
    command = argv[0]
    arguments = parser(command).parse_args(argv[1:])
    for name in ("num", "num_samples", "batch_size", "num_inference_steps"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    check_result(arguments.output, "--output", directory=True)
    fill = prepare_prompts(arguments) if command == "geneval" else prepare_edits(arguments)
    paths = ModelPaths.find(
        arguments.run,
        decoder=DECODER_KINDS[0] if command == "geneval" else arguments.editor,
        autoregressive=arguments.autoregressive,
        decoder_path=arguments.decoder,
        flux=arguments.flux,
    )
    require_same(arguments, paths)
    from nexus_gen.inference import NexusGen  # loads torch: only once the arguments hold

    num_painted = fill(NexusGen(paths, arguments.device))
    print(f"{arguments.output}: {num_painted} pictures painted")
    return 0
