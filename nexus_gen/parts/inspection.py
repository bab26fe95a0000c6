"""What a checkpoint is, from the headers of its files: kind, layout, geometry, size, and what it lacks. No weights.

    nexus-gen models inspect PATH

Torch is imported for `.bin` files only, and reads their table of contents without unpickling anything but tensors.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nexus_gen.artifacts.artifact import MANIFEST, Manifest
from nexus_gen.flux.text_shapes import FOLDERS, text_weights
from nexus_gen.language.processor_files import missing_processor_files, unfit_processor
from nexus_gen.parts.models import (
    RELEASED,
    RELEASED_LANGUAGE,
    RELEASED_VISION,
    decoder_artifact,
)
from nexus_gen.parts.wording import Wording
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import RELEASED_TARGET_TOKENS
from nexus_gen.tensors.headers import TensorHeader, read_checkpoint
from nexus_gen.tensors.kinds import NAMED_KEYS, TITLES, TextEncoder, text_encoder_of
from nexus_gen.tensors.layouts import ADDED_KEYS
from nexus_gen.tensors.tensor_shapes import Weights, read_config, recognise
from nexus_gen.tensors.weight_files import (
    BIN,
    FLUX_WEIGHTS,
    WeightFiles,
    flux_places,
    has_weights,
    is_flux_directory,
    weight_files,
)

RELEASED_GEOMETRY: dict[str, Any] = {
    **RELEASED["editing_decoder"],
    "vision": vars(RELEASED_VISION),
    "language": vars(RELEASED_LANGUAGE),
    "target": {"tokens": RELEASED_TARGET_TOKENS},
}


@dataclass
class Report:
    """What was found. dtypes: name -> number of tensors. unlike_released: `KEY VALUE (released: VALUE)`.

    wrappers: what was taken off the names of its tensors. details: what inference takes from a decoder's manifest.
    wording: how prompts are worded, by task and language, where a checkpoint says so.
    unread: other weights beside these, which no command reads. problems: sentences about what is missing or does not
    fit; empty when it is whole. parts: of a directory of several.
    """

    path: str
    what: str
    layout: str = ""
    geometry: dict[str, Any] = field(default_factory=dict)
    unlike_released: list[str] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    files: int = 0
    wrappers: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    wording: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    parts: list["Report"] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.problems and all(part.whole for part in self.parts)

    def lines(self) -> list[str]:
        """For people."""
        rows = [("what", self.what + (f", layout {self.layout}" if self.layout else ""))]
        rows += [(name, described(value)) for name, value in self.geometry.items()]
        if self.geometry:
            unlike = "; ".join(self.unlike_released[:NAMED_KEYS])
            others = len(self.unlike_released) - NAMED_KEYS
            text = f"not the released one: {unlike}{f'; {others} more' if others > 0 else ''}"
            rows.append(("geometry", text if unlike else "that of the released model"))
        if self.dtypes:
            dtypes = ", ".join(f"{number} in {name}" for name, number in self.dtypes.items())
            size = f"{self.bytes / 1e9:,.2f} GB" if self.bytes > 1e8 else f"{self.bytes / 1e6:,.2f} MB"
            files = f"{self.files} file{'' if self.files == 1 else 's'}"
            rows.append(("weights", f"{self.parameters:,} parameters, {size} in {files}; tensors: {dtypes}"))
        if self.details:
            rows.append(("as trained", described(self.details)))
        rows += [("worded", f"{name}: {kind}") for name, kind in self.wording.items()]
        if self.wrappers:
            rows.append(("taken off", f"{', '.join(self.wrappers)} around the names of its tensors"))
        if self.unread:
            rows.append(("not read", ", ".join(self.unread)))
        rows += [("problem", problem) for problem in self.problems]
        if self.whole:
            rows.append(("whole", "nothing is missing"))
        return [self.path, *(f"  {name:<12}{text}" for name, text in rows)] + [
            line for part in self.parts for line in part.lines()
        ]


def described(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)


def inspect(path: Path, limit: int | None = NAMED_KEYS) -> Report:
    """What is at `path`; problems name the first `limit` keys of a kind, None names all.

    Raises UserError when there is nothing, or nothing readable.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a checkpoint's file or directory")
    artifact = decoder_artifact(path)
    if artifact is not None:
        return inspect_decoder(path, *artifact, limit)
    if (path / MANIFEST).is_file():
        return inspect_artifact(path, limit)
    if is_flux_directory(path):
        return inspect_flux(path, limit)
    return inspect_weights(path, limit)


@dataclass(frozen=True)
class Headers:
    """What the headers of weight files say. tensors: by plain names. wrappers: what was taken off them."""

    tensors: dict[str, TensorHeader]
    files: WeightFiles
    wrappers: list[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: header.shape for key, header in self.tensors.items()}


def headers_of(path: Path) -> Headers:
    """Of a weight file or a directory of them. Raises UserError."""
    files = weight_files(path)
    if files.files[0].suffix != BIN:
        checkpoint = read_checkpoint(path)
        return Headers({key: header for key, (_, header) in checkpoint.tensors.items()}, files, checkpoint.wrappers)
    from nexus_gen.tensors.files import TensorFiles  # loads torch

    tensors = TensorFiles(path)
    return Headers({key: tensors.header(key) for key in tensors}, files, tensors.wrappers)


def weights_of(path: Path, headers: Headers) -> Weights:
    """What the headers of a weight file or of a directory of them say. Raises UserError."""
    return recognise(headers.shapes, path, read_config(path if path.is_dir() else path.parent))


def inspect_weights(path: Path, limit: int | None) -> Report:
    headers = headers_of(path)
    encoder = text_encoder_of(headers.tensors)
    if encoder is not None:
        return inspect_text_encoder(encoder, path, headers, limit)
    weights = weights_of(path, headers)
    what = TITLES[weights.kind]
    if weights.kind == "autoregressive":
        added = all(key in weights.shapes for key in ADDED_KEYS)
        what = "Nexus-Gen autoregressive model" if added else f"plain Qwen2.5-VL, without {' and '.join(ADDED_KEYS)}"
    problems, wording = weights.differences.sentences(limit), {}
    if weights.kind == "autoregressive" and path.is_dir():
        problems += missing_processor_files(path) + unfit_processor(path)
        wording = Wording.load(path).recorded()
    return Report(
        str(path),
        what,
        weights.layout,
        weights.geometry,
        unlike(weights.geometry),
        **totals(headers),
        wording=wording,
        problems=problems,
    )


def totals(headers: Headers) -> dict[str, Any]:
    tensors = headers.tensors.values()
    return {
        "dtypes": dict(Counter(header.dtype for header in tensors).most_common()),
        "parameters": sum(header.numel for header in tensors),
        "bytes": sum(header.num_bytes for header in tensors),
        "files": len(headers.files.files),
        "wrappers": headers.wrappers,
        "unread": headers.files.unread,
    }


def unlike(
    geometry: Mapping[str, Any], other: Mapping[str, Any] = RELEASED_GEOMETRY, whose: str = "released"
) -> list[str]:
    """Where a geometry differs from another, that of the released models unless given."""
    found = []
    for name, value in geometry.items():
        if isinstance(value, Mapping):
            found += [f"{name}.{rest}" for rest in unlike(value, other[name], whose)]
        elif value != other[name]:
            found.append(f"{name} {value} ({whose}: {other[name]})")
    return found


def inspect_artifact(path: Path, limit: int | None) -> Report:
    manifest = Manifest.load(path)
    if manifest.kind == "ar_checkpoint":
        report = inspect_weights(path, limit)
    else:
        report = Report(str(path), "")
        candidates = [child for child in sorted(path.iterdir()) if child.is_dir()]
        report.parts = [inspect(child, limit) for child in candidates if is_flux_directory(child) or has_weights(child)]
    return of_artifact(report, manifest, path)


def inspect_decoder(path: Path, file: Path, manifest: Manifest, limit: int | None) -> Report:
    """A decoder's artifact, or its file: its manifest says what the weights do not."""
    report = inspect_weights(file, limit)
    details = manifest.details
    known = {name: details[name] for name in report.geometry if name in details}
    unfit = unlike({name: report.geometry[name] for name in known}, known, "in the manifest")
    if unfit:
        report.problems.append(f"not the decoder of its manifest: {'; '.join(unfit[:limit])}")
    names = ("image_size", "num_target_tokens", "round_positions", "reference")
    report.details = {name: details[name] for name in names if name in details} | details.get("sampling", {})
    return of_artifact(report, manifest, file.parent)


def of_artifact(report: Report, manifest: Manifest, directory: Path) -> Report:
    report.what = f"artifact of stage {manifest.stage}, kind {manifest.kind}" + (
        f": {report.what}" if report.what else ""
    )
    lacking = [name for name in manifest.files if not (directory / name).is_file()]
    if lacking:
        first = ", ".join(lacking[:NAMED_KEYS])
        report.problems.append(f"{len(lacking)} files of its manifest are missing ({first})")
    return report


def inspect_flux(path: Path, limit: int | None) -> Report:
    """A FLUX.1-dev directory, as downloaded or with diffusers' folders only."""
    report = Report(str(path), "FLUX.1 directory")
    for title, (file, folder) in FLUX_WEIGHTS.items():
        found = flux_places(path, title)
        if found:
            report.parts.append(inspect_weights(found[0], limit))
            report.unread += [f"{place.name}/ (the {title} is read from {found[0].name})" for place in found[1:]]
        else:
            report.problems.append(f"no {title}: neither {file} nor {folder}/")
    for encoder, (weights, tokenizer) in FOLDERS.items():
        if (path / weights / "config.json").is_file():
            report.parts.append(inspect_text_encoder(encoder, path / weights, headers_of(path / weights), limit))
        else:
            report.problems.append(f"no {encoder} text encoder: {weights}/config.json")
        if not (path / tokenizer).is_dir() or not any((path / tokenizer).iterdir()):
            report.problems.append(f"no {encoder}'s tokenizer: {tokenizer}/")
    return report


def inspect_text_encoder(encoder: TextEncoder, path: Path, headers: Headers, limit: int | None) -> Report:
    directory = path if path.is_dir() else path.parent
    config = read_config(directory)
    if config is None:
        problems = ["no config.json beside it, by which its size is known"]
    else:
        problems = text_weights(encoder, headers.shapes, directory, config).differences.sentences(limit)
    return Report(str(path), f"{encoder} text encoder", **totals(headers), problems=problems)


def as_json(report: Report) -> str:
    """For programs: the report's fields and `whole`, nested."""

    def fields(part: Report) -> dict[str, Any]:
        return {**vars(part), "whole": part.whole, "parts": [fields(child) for child in part.parts]}

    return json.dumps(fields(report), indent=1)
