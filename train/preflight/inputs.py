"""What a stage reads, by the roles that its config gives it: where it is, whether it is there, and its fingerprints."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.mixture.pictures import PictureHashes, fingerprint_pictures, named_pictures
from data.mixture.spec import load_mixture
from data.records.dataset_files import is_there
from nexus_gen.artifacts.artifact import fingerprint_path
from nexus_gen.artifacts.content import Contents
from nexus_gen.specs.errors import UserError
from train.preflight.rows import dataset_of, left_out_of, read_splits
from train.schemas.decoders import DecoderConfig, EditingDecoderConfig
from train.schemas.embed import EmbedStageConfig
from train.schemas.inputs import RowsConfig, TrainRowsConfig
from train.schemas.pretrain import PretrainConfig
from train.schemas.schedule import ScheduleStageConfig
from train.schemas.stage import StageConfig

PICTURES = "pictures_{split}.jsonl"  # the pictures that the rows of a split name


def inputs_of(config: StageConfig) -> dict[str, Path]:
    """Role -> the file or directory that a stage reads, in the order in which missing ones are reported."""
    match config:
        case ScheduleStageConfig(model=model, schedule=begins):
            decoders = {"generation_decoder": begins.generation_decoder, "editing_decoder": begins.editing_decoder}
            models = {"model.qwen": Path(model.qwen), "model.flux": Path(model.flux)}
            return {**models, **where_given("schedule", decoders), **row_files(config)}
        case PretrainConfig():
            return {"model.qwen": Path(config.model.qwen), **row_files(config)}
        case EmbedStageConfig(embed=embed):
            inputs = {"embed.autoregressive": Path(embed.autoregressive), **row_files(config)}
            return {**inputs, "model.flux": Path(config.model.flux)} if embed.latents else inputs
        case DecoderConfig(init=init):
            inputs = {"shards": Path(config.shards), "model.flux": Path(config.model.flux)}
            inputs |= where_given("init", {"decoder": init.decoder, "transformer": init.transformer})
            if isinstance(config, EditingDecoderConfig) and not init.decoder:
                inputs["model.qwen"] = Path(config.model.qwen)
            return inputs
    return row_files(config)


def where_given(section: str, paths: dict[str, str]) -> dict[str, Path]:
    """section.name -> path, of those that are not empty."""
    return {f"{section}.{name}": Path(path) for name, path in paths.items() if path}


def row_files(config: StageConfig) -> dict[str, Path]:
    """Role -> the files of message rows among a stage's inputs."""
    data: Any = getattr(config, "data", None)
    return message_inputs(data) if data else {}


def message_inputs(data: TrainRowsConfig) -> dict[str, Path]:
    """Datasets, every file that they draw from where they are several, quarantine files: their contents count."""
    inputs = {}
    places = {role: Path(getattr(data, role)) for role in data.splits}
    if isinstance(data, RowsConfig) and data.rehearsal:
        places["rehearsal_rows"] = data.rehearsal_file
    for role, where in places.items():
        files = load_mixture(where).files if is_there(where) else [where]
        if where.is_file() or files == [where]:
            inputs[f"data.{role}"] = where
        inputs |= {f"data.{role}[{n}]": file for n, file in enumerate(files) if file != where}
    return inputs | {f"data.quarantine[{n}]": Path(path) for n, path in enumerate(data.quarantine)}


def require_inputs(config: StageConfig, inputs: dict[str, Path]) -> None:
    """UserError for the first of a stage's inputs that is not there."""
    for role, where in inputs.items():
        if not where.exists():
            raise UserError(f"{role}: {where} does not exist; {remedy(config, where)}")


def remedy(config: StageConfig, where: Path) -> str:
    """How the missing input comes into being."""
    run = config.run_dir.parent
    if run in where.parents:
        return f"run stage={where.relative_to(run).parts[0]} first, or give another path"
    if where.is_relative_to(Path.cwd()):
        return "check the path, which begins where the command was started unless it is absolute"
    return "check the path"


def pictures_of(config: StageConfig) -> dict[str, Iterable[str]]:
    """Role -> names of the pictures that rows among a stage's inputs name."""
    data: Any = getattr(config, "data", None)
    if not isinstance(data, TrainRowsConfig):
        return {}
    left_out = left_out_of(data)
    return {
        f"pictures.{split}": named_pictures(
            dataset_of(data, split), left_out, config.run_dir / PICTURES.format(split=split), data.picture_root
        )
        for split in data.splits
    }


def content_fingerprints(config: StageConfig) -> dict[str, str]:
    """Role -> fingerprint of what a stage reads beyond `inputs_of`: the pictures that its rows name."""
    if isinstance(config, EmbedStageConfig):  # of its task alone, which it reads anyway
        return {f"pictures.{split.split}": split.fingerprint for split in read_splits(config)}
    hashes = PictureHashes(config.contents)
    found = {role: fingerprint_pictures(names, hashes) for role, names in pictures_of(config).items()}
    hashes.contents.save()
    return found


def input_fingerprints(config: StageConfig) -> dict[str, str]:
    """Role -> fingerprint of what a stage reads. Raises UserError for what is not as its artifact's manifest says."""
    contents = Contents.at(config.contents)
    with contextlib.suppress(OSError):  # where it cannot be made, nothing is remembered
        config.contents.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = {role: fingerprint_path(where, contents) for role, where in inputs_of(config).items()}
    finally:
        contents.save()
    return found | content_fingerprints(config)
