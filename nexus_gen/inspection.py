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

from nexus_gen.specs.artifact import MANIFEST, Manifest
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import RELEASED_TARGET_TOKENS
from nexus_gen.specs.layouts import ADDED_KEYS
from nexus_gen.specs.models import DECODER_FILES, RELEASED, RELEASED_LANGUAGE, RELEASED_VISION
from nexus_gen.specs.shapes import NAMED_KEYS, Weights, read_config, recognise
from nexus_gen.specs.tensor_headers import INDEX_SUFFIX, TensorHeader, read_headers, weight_files

TITLES = {
    "flux": "FLUX transformer",
    "vae": "FLUX autoencoder",
    "generation_decoder": "generation decoder",
    "editing_decoder": "editing decoder",
}
# The parts of a FLUX.1-dev directory: title -> places that hold it, the first found is read.
FLUX_WEIGHTS = {
    "transformer": ("flux1-dev.safetensors", "transformer"),
    "autoencoder": ("ae.safetensors", "vae"),
}
FLUX_TEXT = {"text_encoder": "CLIP", "text_encoder_2": "T5"}
FLUX_TOKENIZERS = {"tokenizer": "CLIP's tokenizer", "tokenizer_2": "T5's tokenizer"}
RELEASED_GEOMETRY: dict[str, Any] = {
    **RELEASED["editing_decoder"],
    "vision": vars(RELEASED_VISION),
    "language": vars(RELEASED_LANGUAGE),
    "target": {"tokens": RELEASED_TARGET_TOKENS},
}


@dataclass
class Report:
    """What was found. dtypes: name -> number of tensors. unlike_released: `KEY VALUE (released: VALUE)`.

    problems: sentences about what is missing or does not fit; empty when it is whole. parts: of a directory of several.
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
    if path.is_file():
        return inspect_weights(path, limit)
    if (path / MANIFEST).is_file():
        return inspect_artifact(path, limit)
    if is_flux_directory(path):
        return inspect_flux(path, limit)
    return inspect_weights(path, limit)


def is_flux_directory(path: Path) -> bool:
    return any((path / name).exists() for name in ("model_index.json", "flux1-dev.safetensors", "ae.safetensors"))


def headers_of(path: Path) -> tuple[dict[str, TensorHeader], int]:
    """(the tensors, the number of files) of a weight file or a directory of them. Raises UserError."""
    if path.is_dir() or path.suffix == ".safetensors":
        return {key: header for key, (_, header) in read_headers(path).items()}, len(
            weight_files(path) if path.is_dir() else [path]
        )
    from nexus_gen.tensor_files import TensorFiles  # loads torch

    tensors = TensorFiles(path)
    return {key: tensors.header(key) for key in tensors}, 1


def weights_of(path: Path) -> tuple[Weights, dict[str, TensorHeader], int]:
    """(what they are, the tensors, the number of files) of a weight file or a directory of them. Raises UserError."""
    headers, num_files = headers_of(path)
    config = read_config(path if path.is_dir() else path.parent)
    return recognise({key: header.shape for key, header in headers.items()}, path, config), headers, num_files


def inspect_weights(path: Path, limit: int | None) -> Report:
    weights, headers, num_files = weights_of(path)
    what = TITLES.get(weights.kind, "")
    if weights.kind == "autoregressive":
        added = all(key in weights.shapes for key in ADDED_KEYS)
        what = "Nexus-Gen autoregressive model" if added else f"plain Qwen2.5-VL, without {' and '.join(ADDED_KEYS)}"
    problems = weights.differences.sentences(limit)
    if weights.kind == "autoregressive" and path.is_dir():
        problems += missing_processor_files(path)
    return Report(
        str(path),
        what,
        weights.layout,
        weights.geometry,
        unlike_released(weights.geometry),
        **totals(headers, num_files),
        problems=problems,
    )


def totals(headers: Mapping[str, TensorHeader], num_files: int) -> dict[str, Any]:
    return {
        "dtypes": dict(Counter(header.dtype for header in headers.values()).most_common()),
        "parameters": sum(header.numel for header in headers.values()),
        "bytes": sum(header.num_bytes for header in headers.values()),
        "files": num_files,
    }


def unlike_released(geometry: Mapping[str, Any], released: Mapping[str, Any] = RELEASED_GEOMETRY) -> list[str]:
    """Where a geometry differs from that of the released models."""
    found = []
    for name, value in geometry.items():
        if isinstance(value, Mapping):
            found += [f"{name}.{rest}" for rest in unlike_released(value, released[name])]
        elif value != released[name]:
            found.append(f"{name} {value} (released: {released[name]})")
    return found


def missing_processor_files(path: Path) -> list[str]:
    """What an autoregressive checkpoint needs beside its weights to read text and pictures."""
    if (path / "processor").is_dir():
        path = path / "processor"
    alternatives = (("tokenizer.json", "vocab.json"), ("tokenizer_config.json",), ("preprocessor_config.json",))
    lacking = [" or ".join(names) for names in alternatives if not any((path / name).is_file() for name in names)]
    if (path / "vocab.json").is_file() and not any(
        (path / name).is_file() for name in ("tokenizer.json", "merges.txt")
    ):
        lacking.append("merges.txt")
    return [f"no {', '.join(lacking)}: text and pictures cannot be read"] if lacking else []


def inspect_artifact(path: Path, limit: int | None) -> Report:
    manifest = Manifest.load(path)
    if manifest.kind in DECODER_FILES:
        report = inspect_weights(path / DECODER_FILES[manifest.kind], limit)
    elif manifest.kind == "ar_checkpoint":
        report = inspect_weights(path, limit)
    else:
        report = Report(str(path), "")
        candidates = [child for child in sorted(path.iterdir()) if child.is_dir()]
        report.parts = [inspect(child, limit) for child in candidates if holds_weights(child)]
    report.what = f"artifact of stage {manifest.stage}, kind {manifest.kind}" + (
        f": {report.what}" if report.what else ""
    )
    lacking = [name for name in manifest.files if not (path / name).is_file()]
    if lacking:
        first = ", ".join(lacking[:NAMED_KEYS])
        report.problems.append(f"{len(lacking)} files of its manifest are missing ({first})")
    return report


def holds_weights(path: Path) -> bool:
    return is_flux_directory(path) or any(path.glob("*.safetensors")) or any(path.glob(f"*{INDEX_SUFFIX}"))


def inspect_flux(path: Path, limit: int | None) -> Report:
    """A FLUX.1-dev directory, as downloaded or with diffusers' folders only."""
    report = Report(str(path), "FLUX.1 directory")
    for title, places in FLUX_WEIGHTS.items():
        found = next((path / place for place in places if (path / place).exists()), None)
        if found is None:
            report.problems.append(f"no {title}: neither {places[0]} nor {places[1]}/")
        else:
            report.parts.append(inspect_weights(found, limit))
    for folder, title in FLUX_TEXT.items():
        if not (path / folder / "config.json").is_file():
            report.problems.append(f"no {title} text encoder: {folder}/config.json")
            continue
        headers, num_files = headers_of(path / folder)
        report.parts.append(Report(str(path / folder), f"{title} text encoder", **totals(headers, num_files)))
    for folder, title in FLUX_TOKENIZERS.items():
        if not (path / folder).is_dir() or not any((path / folder).iterdir()):
            report.problems.append(f"no {title}: {folder}/")
    return report


def as_json(report: Report) -> str:
    """For programs: the report's fields and `whole`, nested."""

    def fields(part: Report) -> dict[str, Any]:
        return {**vars(part), "whole": part.whole, "parts": [fields(child) for child in part.parts]}

    return json.dumps(fields(report), indent=1)
