"""`nexus-gen models ship`: a run cut down to what inference, evaluation and finetuning read, in half precision.

nexus-gen models ship runs/shapes --output weights/shapes --made-by "nexus-gen run pipeline=shapes" --hardware "an H100"
nexus-gen evaluate weights/shapes --rows runs/shapes/shapes/artifact/heldout.jsonl --output scored/heldout
... the first command again with --scores scored/heldout: the same run gives the same weights, which the scores are of

The result has the layout of a run, so every command that takes one takes it. Left out are what only training reads
(training rows, shards, checkpoints) and what trained weights replaced: the stand-ins of Qwen2.5-VL and of FLUX's
transformer. Its own manifest holds the lineage of every stage, of those that left nothing else too.
"""

import base64
import dataclasses
import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from nexus_gen.artifacts.artifact import (
    MANIFEST,
    Manifest,
    Seals,
    building,
    fingerprint_path,
    hash_file,
    seal,
    write_text_atomic,
)
from nexus_gen.artifacts.results import check_result
from nexus_gen.parts.lineage import evaluations_of, flux_of_all, parts_of
from nexus_gen.parts.models import DECODER_KINDS, ModelPaths
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from train.runs.directory import TIMING, code_version, timing_of
from train.schemas.fields import path_values
from train.schemas.table import SCHEMAS

# stage -> patterns of what its artifact gives; `shapes` gives rows, by `ship_rows`.
FILES = {
    "standins": ("FLUX.1-dev/*",),
    "pretrain": ("*",),
    "generation_decoder": ("*",),
    "editing_decoder": ("*",),
}
REPLACED = ("FLUX.1-dev/flux1-dev.safetensors",)  # by the transformers of both decoders
RECORDS = ("config.yaml", "environment.json", TIMING, "metrics.jsonl")
ROW_SPLITS = ("heldout", "compositional")
DTYPES = ("float16", "bfloat16")
RUNS_DIR = "runs"  # of paths inside the run, which readers move to where it is
MB = 1e6


def parser() -> Parser:
    result = Parser(
        prog="nexus-gen models ship",
        description="Cut a run down to what inference, evaluation and finetuning read, in half precision.",
    )
    result.add_argument("run", type=Path, help="run directory, such as runs/shapes")
    result.add_argument("--output", type=Path, required=True, help="directory to make; one of this sort is replaced")
    result.add_argument("--made-by", required=True, metavar="COMMAND", help="the command that made the run")
    result.add_argument("--hardware", required=True, help="what it ran on")
    result.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the tensors (default: %(default)s)")
    result.add_argument("--max-mb", type=float, default=24.0, help="refuse to write more (default: %(default)s)")
    result.add_argument(
        "--num-rows", type=int, default=100, help="rows of each task and held-out split (default: %(default)s)"
    )
    result.add_argument(
        "--scores", type=Path, nargs="+", default=[], metavar="EVALUATION", help="evaluations of what this ships"
    )
    return result


@dataclasses.dataclass(frozen=True)
class Loss:
    """What half precision costs a file: the largest relative error of its tensors, |x - half(x)| / |x| in 2-norms."""

    tensor: str
    error: float


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv[1:])
    run, output = arguments.run, arguments.output
    missing = [stage for stage in FILES if stage != "standins" and not has_artifact(run, stage)]
    if missing:
        raise UserError(f"{run} has not finished {', '.join(missing)}; nexus-gen run pipeline=... goes on from there")
    require_replaceable(output)
    check_result(output, "--output", directory=True)
    if arguments.num_rows < 0:
        raise UserError(f"--num-rows is {arguments.num_rows}; it must be 0 or more")
    with building(output) as directory:
        details: dict[str, Any] = {
            "made_by": arguments.made_by,
            "hardware": arguments.hardware,
            "stages": {stage: lineage(run, stage) for stage in SCHEMAS if has_artifact(run, stage)},
        }
        details["losses"] = ship_weights(run, directory, arguments.dtype)
        ship_rows(run, directory, arguments.num_rows)
        ship_scores(arguments.scores, directory)
        inputs = {stage: facts["fingerprint"] for stage, facts in details["stages"].items()}
        settings = {"dtype": arguments.dtype, "num_rows": arguments.num_rows}
        seal(directory, Manifest("shipped_run", "ship", settings, inputs, code_version(), details))
        sizes = {part.name: num_bytes(part) for part in sorted(directory.iterdir())}
        for name, size in {**sizes, "in all": sum(sizes.values())}.items():
            print(f"{name:<20}{size / MB:8.2f} MB")
        if sum(sizes.values()) > arguments.max_mb * MB:
            raise UserError(
                f"{sum(sizes.values()) / MB:.2f} MB are more than --max-mb {arguments.max_mb:g}; "
                f"give fewer --num-rows, or a higher limit. {output} is as it was"
            )
    for file, loss in details["losses"].items():
        errors = ", ".join(f"{dtype} {facts['error']:.1e}" for dtype, facts in loss.items())
        print(f"largest relative error in {file}: {errors}")
    print(f"wrote {output}, {arguments.dtype}")
    return 0


def has_artifact(run: Path, stage: str) -> bool:
    return (run / stage / "artifact" / MANIFEST).is_file()


def require_replaceable(output: Path) -> None:
    """UserError when `output` holds anything but an earlier result."""
    if output.is_dir() and any(output.iterdir()):
        if not (output / MANIFEST).is_file():
            raise UserError(f"{output} holds other files; give an empty or a new directory")
        Manifest.load(output).require("shipped_run", output)


def num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def lineage(run: Path, stage: str) -> dict[str, Any]:
    """What made an artifact: config, inputs by fingerprint, code, seconds, processes; a shipped run tells on."""
    manifest = Manifest.load(run / stage / "artifact")
    seconds, processes = timing_of(run / stage)
    return {
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "config": manifest.config,
        "inputs": manifest.inputs,
        "code": manifest.code,
        "created_at": manifest.created_at,
        "seconds": seconds,
        "processes": processes,
    }


def ship_weights(run: Path, directory: Path, dtype: str) -> dict[str, dict[str, Any]]:
    """Write records and artifacts of the stages with weights; returns what each dtype loses, by file."""
    losses: dict[str, dict[str, Any]] = {}
    for stage, patterns in FILES.items():
        if not has_artifact(run, stage):
            continue
        ship_records(run, stage, directory)
        artifact, target = run / stage / "artifact", directory / stage / "artifact"
        manifest = Manifest.load(artifact)
        for name, facts in manifest.files.items():
            if name in REPLACED or not any(fnmatch(name, pattern) for pattern in patterns):
                continue
            source = artifact / name
            if not source.is_file() or hash_file(source) != facts["sha256"]:
                raise UserError(f"{source} is missing or differs from its manifest; make or copy it again")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".safetensors":
                lost = in_half_precision(source, target / name, dtype)
                losses[f"{stage}/{name}"] = {kind: dataclasses.asdict(loss) for kind, loss in lost.items()}
            elif source.name == "config.json":
                values = json.loads(source.read_text(encoding="utf-8"))
                values |= {key: dtype for key in ("dtype", "torch_dtype") if key in values}
                write_text_atomic(target / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            else:
                shutil.copyfile(source, target / name)
        seal_shipped(target, manifest, dtype=dtype)
    return losses


def seal_shipped(target: Path, manifest: Manifest, **how: Any) -> None:
    """The manifest of what is left of an artifact: its own facts, and the fingerprint of the whole one."""
    seal(
        target,
        dataclasses.replace(manifest, details={**manifest.details, "shipped": {"of": manifest.fingerprint, **how}}),
    )


def in_half_precision(source: Path, target: Path, dtype: str) -> dict[str, Loss]:
    """Write the tensors of a file in `dtype`; returns what each of DTYPES loses at most.

    Raises UserError for a value that `dtype` cannot hold.
    """
    import torch  # after the arguments hold

    from nexus_gen.tensors.files import TensorFiles, save_tensors

    tensors = dict(TensorFiles(source).items())
    losses = dict.fromkeys(DTYPES, Loss("", 0.0))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        exact = tensor.double()
        for kind in DTYPES:
            rounded = tensor.to(getattr(torch, kind))
            if kind == dtype and not rounded.isfinite().all():
                raise UserError(f"{source}: {name} reaches {exact.abs().max():.3g}, which {dtype} cannot hold")
            error = float((exact - rounded.double()).norm() / exact.norm().clamp_min(1e-30))
            losses[kind] = max(losses[kind], Loss(name, error), key=lambda loss: loss.error)
        tensors[name] = tensor.to(getattr(torch, dtype))
    save_tensors(tensors, target)
    return losses


def ship_records(run: Path, stage: str, directory: Path) -> None:
    """What a stage recorded about itself; paths inside the run no longer say where it was made."""
    (directory / stage).mkdir()
    for name in RECORDS:
        if (run / stage / name).is_file():
            shutil.copyfile(run / stage / name, directory / stage / name)
    path = directory / stage / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    recorded = Path(values["runs_dir"]) / values["name"]
    for section, leaf in path_values(stage, values):
        if Path(section[leaf]).is_relative_to(recorded):
            section[leaf] = str(RUNS_DIR / Path(values["name"]) / Path(section[leaf]).relative_to(recorded))
    values["runs_dir"] = RUNS_DIR
    write_text_atomic(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def ship_rows(run: Path, directory: Path, num_rows: int) -> None:
    """The first rows of each task of the held-out splits of a procedural dataset, pictures inside them."""
    if not has_artifact(run, "shapes"):
        return
    ship_records(run, "shapes", directory)
    artifact, target = run / "shapes" / "artifact", directory / "shapes" / "artifact"
    target.mkdir()
    for split in ROW_SPLITS:
        fingerprint_path(artifact / f"{split}.jsonl")  # raises unless they are as they were made
        rows = chosen_rows(artifact / f"{split}.jsonl", num_rows)
        text = "".join(json.dumps(with_pictures(row, artifact), ensure_ascii=False) + "\n" for row in rows)
        write_text_atomic(target / f"{split}.jsonl", text)
    seal_shipped(target, Manifest.load(artifact), rows_of_each_task=num_rows)


def chosen_rows(path: Path, num_rows: int) -> list[dict[str, Any]]:
    """The first rows of each task of a file of shapes, in its order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def of(task: str) -> Iterator[int]:
        return (place for place, row in enumerate(rows) if row["truth"]["task"] == task)

    places = {place for task in {row["truth"]["task"] for row in rows} for place in islice(of(task), num_rows)}
    return [rows[place] for place in sorted(places)]


def with_pictures(row: dict[str, Any], artifact: Path) -> dict[str, Any]:
    """A row that holds its pictures itself. UserError for one that is not as it was made."""
    seals = Seals()
    for image in row["images"]:
        if not image.startswith("data:"):
            seals.require(str(artifact / image), hash_file(artifact / image))
    images = [
        image
        if image.startswith("data:")
        else f"data:image/png;base64,{base64.b64encode((artifact / image).read_bytes()).decode()}"
        for image in row["images"]
    ]
    return {**row, "images": images}


def ship_scores(evaluations: list[Path], directory: Path) -> None:
    """What `nexus-gen evaluate` found, without its pictures. UserError unless it is of exactly these weights."""
    if not evaluations:
        return
    for evaluation in evaluations:
        manifest = Manifest.load(evaluation).require("evaluation", evaluation)
        fingerprint_path(evaluation / "scores.json")  # raises unless they are as they were found
        target = directory / "evaluation" / manifest.config["split"]
        if target.exists():
            raise UserError(f"--scores holds two evaluations of the split {target.name}; give one of each")
        target.mkdir(parents=True)
        shutil.copyfile(evaluation / "scores.json", target / "scores.json")
        seal_shipped(target, manifest)
    paths = shipped_paths(directory)
    stale = evaluations_of(directory, parts_of(paths), flux_of_all(paths))[1]
    if stale:
        raise UserError(
            f"the scores of {', '.join(path.name for path in stale)} are of other weights than these; "
            "ship without --scores, run `nexus-gen evaluate` on the result, and ship again with its evaluations"
        )


def shipped_paths(directory: Path) -> dict[str | None, ModelPaths]:
    return {kind: ModelPaths.find(directory, decoder=kind) for kind in DECODER_KINDS}
