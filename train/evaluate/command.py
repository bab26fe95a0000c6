"""`nexus-gen evaluate RUN`: scores of a run's models on held-out rows, as an artifact and a page.

nexus-gen evaluate runs/tiny --split compositional --num 100

Docs: docs/evaluation.md says what is measured and what counts as right.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.messages.rows import Row
from data.messages.truth import has_scenes
from data.mixture.pictures import PictureHashes
from data.mixture.quarantine import NOTHING
from data.records.dataset_files import is_pattern
from nexus_gen.artifacts.artifact import Manifest, building, digest, fingerprint_path, seal, write_text_atomic
from nexus_gen.artifacts.content import Contents
from nexus_gen.artifacts.results import check_result
from nexus_gen.commands.use import add_model_arguments
from nexus_gen.parts.models import DECODER_KINDS, ModelPaths, default_run, flag_of, memory_of, results_of
from nexus_gen.parts.preflight import require_loadable
from nexus_gen.pictures.framing import Frame
from nexus_gen.pictures.images import open_image
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from train.evaluate.benchmarks import batches, noise_seed
from train.evaluate.found_again import PictureFinder
from train.evaluate.own_rows import judge_change, judge_reply
from train.evaluate.page import render
from train.evaluate.rows import KnownPicture, fingerprint_dataset, look_at, probe_pictures, read_tasks
from train.evaluate.score_lines import table
from train.preflight.rows import left_out_of
from train.runs.directory import code_version, load_config
from train.scores.limits import limits
from train.scores.outcomes import (
    MAX_ANSWER_TOKENS,
    Outcome,
    judge_answer,
    judge_editing,
    judge_generation,
    judge_reconstruction,
    outcome_of,
    scores_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from nexus_gen.inference import NexusGen

GENERATION_DECODER, EDITING_DECODER = DECODER_KINDS
log = logging.getLogger(__name__)

SPLITS = ("heldout", "compositional")
TASKS = ("understanding", "generation", "editing", "reconstruction")
OUTCOMES, IDENTITY = "outcomes.jsonl", "identity.json"


def parser() -> Parser:
    result = Parser(
        prog="nexus-gen evaluate",
        description="Score a run's models on held-out rows. Interrupted, the same command resumes.",
    )
    result.add_argument("run", type=Path, nargs="?", default=default_run(), help="default: %(default)s")
    result.add_argument(
        "--split", default="heldout", choices=SPLITS, help="of the run's dataset (default: %(default)s)"
    )
    result.add_argument("--rows", type=Path, help="any rows instead of a split")
    result.add_argument(
        "--probe-rows",
        type=Path,
        help="rows whose pictures teach the probe what prompts and labels look like (default: the run's training rows)",
    )
    result.add_argument("--num", type=int, help="the first rows of each task (default: all)")
    result.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="default: all")
    result.add_argument(
        "--output", type=Path, help="directory to write (default: RUN/evaluation/SPLIT; of what ships, under runs/)"
    )
    result.add_argument("--batch-size", type=int, default=16, help="rows at a time (default: %(default)s)")
    result.add_argument("--seed", type=int, default=42, help="of the noise, with the row's id (default: %(default)s)")
    result.add_argument(
        "--editor", default=EDITING_DECODER, choices=DECODER_KINDS, help="what paints edits (default: %(default)s)"
    )
    result.add_argument("--num-inference-steps", type=int, help="Euler steps (default: the decoders' own)")
    result.add_argument("--cfg-scale", type=float, help="classifier-free guidance (default: the decoders' own)")
    result.add_argument(
        "--num-shown", type=int, default=24, help="rows on the page, of each task (default: %(default)s)"
    )
    models = add_model_arguments(result, paints=True)
    for kind in DECODER_KINDS:
        models.add_argument(flag_of(kind), type=Path, help="decoder file or artifact directory")
    return result


def rows_file(arguments: argparse.Namespace) -> Path:
    """The rows to evaluate on: those that are given, or a split beside the run's held-out rows."""
    if arguments.rows is not None:
        return arguments.rows
    if not arguments.run.is_dir():
        raise UserError(f"{arguments.run} is not a run directory; finished runs are under runs/")
    if not (arguments.run / "pretrain" / "config.yaml").is_file():
        raise UserError(f"{arguments.run} has not begun stage=pretrain; finish it, or give --rows")
    config: Any = load_config(arguments.run / "pretrain")
    heldout = Path(config.data.heldout)
    path = heldout if arguments.split == "heldout" else heldout.with_name(f"{arguments.split}.jsonl")
    if not path.exists() and not is_pattern(path):
        raise UserError(
            f"{path}, the {arguments.split} rows of {arguments.run}, does not exist; draw it, or give --rows"
        )
    return path


class EvaluatedRows:
    """What an evaluation asks, and of which pictures it finds what is painted again; reads all of it at once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.path = rows_file(arguments)
        config: Any = load_config(arguments.run / "pretrain") if arguments.rows is None else None
        own = config.data if config is not None else None
        root = Path(own.picture_root) if own is not None and own.picture_root else None
        left_out = left_out_of(own, "heldout") if own is not None and arguments.split == "heldout" else NOTHING
        every = read_tasks(self.path, None, root, left_out)
        self.by_id = {row.id: row for of_task in every.values() for row in of_task}
        self.tasks: dict[str, list[Row]] = {}
        self.known: dict[str, list[KnownPicture]] = {}
        self.keys: dict[str, str] = {}
        for task, of_task in every.items():
            self.tasks[task], self.known[task], keys = look_at(of_task, arguments.num)
            self.keys |= keys
        self.for_probe: dict[str, list[KnownPicture]] = {}
        train = arguments.probe_rows or (Path(own.train) if own is not None else None)
        if train is not None and (arguments.probe_rows or train.exists() or is_pattern(train)):
            options = (root, left_out_of(own, "train")) if own is not None and not arguments.probe_rows else ()
            for task, known in self.known.items():
                self.for_probe[task] = probe_pictures(train, known, task, *options)

    def inputs(self, hashes: PictureHashes) -> dict[str, str]:
        """Fingerprints of the rows with their pictures, and of the pictures that teach a probe, if any."""
        pictures = [image for of_task in self.tasks.values() for row in of_task for image in row.images]
        pictures += [picture.image for of_task in self.known.values() for picture in of_task]
        found = {"rows": fingerprint_dataset(self.path, pictures, hashes)}
        taught = [
            [picture.key, *sorted(picture.prompts | picture.labels)]
            for of_task in self.for_probe.values()
            for picture in of_task
        ]
        return found | ({"probe": digest(taught)} if taught else {})


class Models:
    """The models of an evaluation. Paths are looked up at once, weights loaded when a phase needs them."""

    def __init__(self, arguments: argparse.Namespace, decoders: list[str]) -> None:
        """decoders: those that are wanted; without any, models that paint nothing."""
        self.device = arguments.device
        self.paths: dict[str | None, ModelPaths] = {
            kind: ModelPaths.find(
                arguments.run,
                decoder=kind,
                autoregressive=arguments.autoregressive,
                decoder_path=None if kind is None else getattr(arguments, kind),
                flux=arguments.flux,
                decoder_flag=flag_of(kind or ""),
            )
            for kind in (*decoders,) or (None,)
        }
        for paths in self.paths.values():
            require_loadable(paths, arguments.cfg_scale)
        self._loaded: NexusGen | None = None

    def inputs(self, contents: Contents) -> dict[str, str]:
        """Role -> fingerprint of everything that is loaded."""
        found: dict[str, Path] = {}
        for kind, paths in self.paths.items():
            found["autoregressive"] = paths.autoregressive
            if kind is not None and paths.decoder is not None and paths.flux is not None:
                found |= {kind: paths.decoder, "flux": paths.flux}
        return {role: fingerprint_path(path, contents) for role, path in sorted(found.items())}

    def get(self, kind: str | None) -> "NexusGen":
        """The model with a decoder of that kind, or with any; one decoder is in memory at a time."""
        from nexus_gen.inference import NexusGen  # loads torch: only once the arguments hold

        paths = self.paths[kind] if kind is not None else next(iter(self.paths.values()))
        if self._loaded is None or (kind is not None and self._loaded.paths != paths):
            before, self._loaded = self._loaded, NexusGen(paths, self.device)
            if before is not None:
                self._loaded.autoregressive = before.autoregressive
        return self._loaded


class Outcomes:
    """`outcomes.jsonl` and the pictures beside it, written as they are made, so that an interrupted command goes on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / OUTCOMES
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was cut short is made again
        self.outcomes: list[Outcome] = [json.loads(line) for line in whole.splitlines()]
        path.write_text(whole, encoding="utf-8")

    def missing(self, phase: str, rows: list[Row]) -> list[Row]:
        done = {outcome["id"] for outcome in self.outcomes if outcome["phase"] == phase}
        return [row for row in rows if row.id not in done]

    def add(self, outcome: Outcome, picture: "Image | None") -> None:
        if picture is not None:
            outcome["picture"] = f"pictures/{outcome['phase']}/{len(self.outcomes):06d}.png"
            (self.directory / outcome["picture"]).parent.mkdir(parents=True, exist_ok=True)
            picture.save(self.directory / outcome["picture"])
        self.outcomes.append(outcome)
        with open(self.directory / OUTCOMES, "a", encoding="utf-8") as file:
            file.write(json.dumps(outcome, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Phase:
    """One thing asked of the models: for which rows, with which decoder, and what answers a batch of rows."""

    name: str
    rows: list[Row]
    decoder: str | None
    answer: "Callable[[NexusGen, list[Row]], list[tuple[Outcome, Image | None]]]"


def phases(tasks: dict[str, list[Row]], finder: PictureFinder, arguments: argparse.Namespace) -> list[Phase]:
    """What the arguments ask for, in an order that loads each decoder once."""

    def sampling(rows: list[Row]) -> dict[str, Any]:
        return {
            "num_inference_steps": arguments.num_inference_steps,
            "cfg_scale": arguments.cfg_scale,
            "seed": [noise_seed(arguments.seed, row.id) for row in rows],
        }

    def turns(rows: list[Row]) -> tuple[list[str], list[str]]:
        users, replies = ([row.messages[turn]["content"] for row in rows] for turn in (0, 1))
        return users, replies

    def understand(model: "NexusGen", rows: list[Row]) -> "list[tuple[Outcome, Image | None]]":
        users = [row.messages[0]["content"] for row in rows]
        answers = model.answer_all(users, [list(row.images) for row in rows], MAX_ANSWER_TOKENS)
        judges = [judge_answer if has_scenes(row) else judge_reply for row in rows]
        return [(judge(row, answer), None) for judge, row, answer in zip(judges, rows, answers, strict=True)]

    def generate(model: "NexusGen", rows: list[Row]) -> "list[tuple[Outcome, Image | None]]":
        embeds = model.imagine_all(*turns(rows), [list(row.images[:-1]) for row in rows])
        pictures = model.paint(embeds, **sampling(rows))
        return compared(model, rows, pictures, embeds, judge_generation, lambda row, _: outcome_of(row, "generation"))

    def edit(model: "NexusGen", rows: list[Row]) -> "list[tuple[Outcome, Image | None]]":
        embeds, frames, sources = model.imagine_edits(*turns(rows), [row.images[:-1] for row in rows])
        pictures = model.repaint(embeds, frames, sources, **sampling(rows))
        return compared(model, rows, pictures, embeds, judge_editing, judge_change)

    def reconstruct(model: "NexusGen", rows: list[Row]) -> "list[tuple[Outcome, Image | None]]":
        kind = model.paths.decoder_kind
        assert kind is not None
        if kind == GENERATION_DECODER:
            pictures = model.paint(model.target_embeds(*(row.images[-1] for row in rows)), **sampling(rows))
        else:
            targets, sources = ([open_image(row.images[place]) for row in rows] for place in (-1, -2))
            frames = [Frame.of(source.size, model.details) for source in sources]
            shown = [frame.fit(target) for frame, target in zip(frames, targets, strict=True)]
            pictures = model.repaint(model.target_embeds(*shown), frames, sources, **sampling(rows))

        def judge(row: Row, picture: "Image") -> Outcome:
            return judge_reconstruction(row, picture, kind)

        return compared(model, rows, pictures, None, judge, judge)

    def compared(
        model: "NexusGen",
        rows: list[Row],
        pictures: "list[Image]",
        embeds: "Tensor | None",
        judge: "Callable[[Row, Image], Outcome]",
        judge_own: "Callable[[Row, Image], Outcome]",
    ) -> "list[tuple[Outcome, Image | None]]":
        """Outcomes of painted pictures; those of rows without scenes are found again among held-out ones.

        embeds: that they are painted from, unless these are the true ones. judge_own: for rows without scenes.
        """
        places = [place for place, row in enumerate(rows) if not has_scenes(row)]
        own = [rows[place] for place in places]
        found: dict[int, Outcome] = {place: {} for place in places}
        if own:
            parts = {"painted": finder.painted(model, own, [pictures[place] for place in places])}
            if embeds is not None:
                parts["imagined"] = finder.imagined(model, own, embeds[places])
            for name, comparisons in parts.items():
                for place, comparison in zip(places, comparisons, strict=True):
                    found[place] |= {name: comparison} if comparison is not None else {}
        return [
            (judge_own(row, picture) | found[place] if place in found else judge(row, picture), picture)
            for place, (row, picture) in enumerate(zip(rows, pictures, strict=True))
        ]

    generation, editing = tasks.get("generation", []), tasks.get("editing", [])
    asked = {
        "understanding": [Phase("understanding", tasks.get("understanding", []), None, understand)],
        "generation": [Phase("generation", generation, GENERATION_DECODER, generate)],
        "editing": [Phase("editing", editing, arguments.editor, edit)],
        "reconstruction": [
            Phase(f"reconstruction/{kind}", rows, kind, reconstruct)
            for kind, rows in ((GENERATION_DECODER, generation), (EDITING_DECODER, editing))
        ],
    }
    wanted = [phase for task in arguments.tasks for phase in asked[task] if phase.rows]
    decoders = (None, GENERATION_DECODER, EDITING_DECODER)
    return sorted(wanted, key=lambda phase: decoders.index(phase.decoder))


def run_phases(models: Models, wanted: list[Phase], outcomes: Outcomes, batch_size: int) -> None:
    """Put the rows that have no outcome yet to the models."""
    for phase in wanted:
        rows = outcomes.missing(phase.name, phase.rows)
        print(f"{phase.name}: {len(rows)} rows", file=sys.stderr)
        for batch in batches(rows, batch_size, phase.name):
            for outcome, picture in phase.answer(models.get(phase.decoder), batch):
                outcomes.add(outcome, picture)


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv[1:])
    for name in ("num", "batch_size", "num_inference_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    if arguments.num_shown < 0:
        raise UserError(f"--num-shown is {arguments.num_shown}; it must be 0 or more")
    rows = EvaluatedRows(arguments)
    finder = PictureFinder(rows.known, rows.for_probe, rows.keys, arguments.batch_size)
    wanted = phases(rows.tasks, finder, arguments)
    if not wanted:
        raise UserError(f"{rows.path} holds no rows of {', '.join(arguments.tasks)}; give other --tasks or --rows")
    painting = {phase.decoder for phase in wanted}
    models = Models(arguments, [kind for kind in DECODER_KINDS if kind in painting])
    split = arguments.split if arguments.rows is None else rows.path.stem
    options = ("num", "tasks", "seed", "editor", "num_inference_steps", "cfg_scale")
    settings = {"split": split, **{name: getattr(arguments, name) for name in options}}
    hashes = PictureHashes(memory_of(arguments.run))
    inputs = {**rows.inputs(hashes), **models.inputs(hashes.contents)}
    hashes.contents.save()
    output = arguments.output or results_of(arguments.run) / "evaluation" / split
    if output.exists() and not (output / IDENTITY).is_file() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} holds something else; give --output with an empty or a new directory")
    check_result(output, "--output", directory=True)
    code = code_version()
    identity = json.dumps({"config": settings, "inputs": inputs, "commit": code["commit"]}, indent=1) + "\n"
    begun = output.with_name(output.name + ".partial") / IDENTITY
    goes_on = begun.is_file() and begun.read_text(encoding="utf-8") == identity
    with building(output, keep_partial=goes_on, resumable=True) as directory:
        write_text_atomic(directory / IDENTITY, identity)
        outcomes = Outcomes(directory)
        try:
            run_phases(models, wanted, outcomes, arguments.batch_size)
        except BaseException:
            if not outcomes.outcomes:  # nothing that the same command could resume from
                shutil.rmtree(directory)
            raise
        scores = {name: score.as_json for name, score in scores_of(outcomes.outcomes).items()}
        write_text_atomic(directory / "scores.json", json.dumps(scores, indent=1) + "\n")
        title = f"{arguments.run.name}, {split}"
        write_text_atomic(
            directory / "index.html",
            render(title, scores, outcomes.outcomes, rows.by_id, directory, arguments.num_shown),
        )
        seal(directory, Manifest("evaluation", "evaluate", settings, inputs, code, {"scores": scores}))
    print(table(scores))
    for limit in limits(scores):
        print(limit.sentence)
    print(f"page: {(output / 'index.html').absolute()}")
    return 0
