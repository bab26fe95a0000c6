"""`nexus-gen shards verify | repair | stats | show ARTIFACT`: what an embedding stage stored, checked and seen.

Everything but `--help` reads tensors and imports torch when it comes to that.
"""

import argparse
import base64
import html
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data.messages.rows import Row
from data.mixture.order import read_places
from data.shards.files import (
    Listing,
    Member,
    Sample,
    ShardSpec,
    checksum,
    index_shard,
    read_member,
    read_sample,
    same_file,
    scan_shard,
    write_shard,
)
from nexus_gen.artifacts.artifact import Manifest, seal, write_text_atomic
from nexus_gen.artifacts.results import check_result
from nexus_gen.pictures.images import open_image
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

THUMBNAIL_PX = 96
NUM_NEIGHBOURS = 5


def parser() -> Parser:
    result = Parser(prog="nexus-gen shards", description="Check, repair, measure and show shards.")
    commands = result.add_subparsers(dest="command", required=True)
    helps = {
        "verify": "check sums, members, counts, shapes and values; exit status 1 when something is wrong",
        "repair": "keep the whole samples of damaged shards; the next run of the stage embeds what is lost",
        "stats": "counts, bytes, norms, means, variances, duplicates",
        "show": "one page: pictures and their nearest neighbours by embedding",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("artifact", type=Path, help="the artifact/ directory of an embedding stage")
        if name in ("stats", "show"):
            command.add_argument("--split", default="train", choices=("train", "heldout"))
            command.add_argument("--max-samples", type=int, default=1000, help="read so many, spread evenly")
        if name == "show":
            command.add_argument("--out", type=Path, default=Path("shards.html"), help="where the page is written")
            command.add_argument("--rows", type=Path, help="the dataset, if not the one in the stage's config.yaml")
            command.add_argument("--num-pictures", type=int, default=24, help="pictures that get a line of neighbours")
    return result


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    for name in ("max_samples", "num_pictures"):
        if getattr(arguments, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be 1 or more")
    if arguments.command == "show":
        check_result(arguments.out, "--out")
    manifest = Manifest.load(arguments.artifact).require("embedding_shards", arguments.artifact)
    ShardSpec.load(manifest)
    if arguments.command == "verify":
        return verify(arguments.artifact, manifest)
    if arguments.command == "repair":
        return repair(arguments.artifact, manifest)
    if arguments.command == "stats":
        return stats(arguments.artifact, manifest, arguments.split, arguments.max_samples)
    return show(arguments.artifact, manifest, arguments)


def shards_of(manifest: Manifest) -> list[dict[str, Any]]:
    """Of every split: file, samples, bytes, sha256."""
    return [shard for split in manifest.details["splits"].values() for shard in split]


# ---- verify -------------------------------------------------------------------------------------------------------


def verify(artifact: Path, manifest: Manifest) -> int:
    problems = []
    shards = {shard["file"]: shard for shard in shards_of(manifest)}
    for name, facts in manifest.files.items():
        path = artifact / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif not same_file(path, facts["bytes"], facts["sha256"]):
            size = path.stat().st_size
            difference = f"{size} bytes instead of {facts['bytes']}" if size != facts["bytes"] else "other bytes"
            problems.append(f"{name} holds {difference} than its manifest says")
    unlisted = {str(path.relative_to(artifact)) for path in artifact.rglob("*") if path.is_file()} - {
        *manifest.files,
        "manifest.json",
    }
    problems += [f"{name} is not in the manifest" for name in sorted(unlisted)]
    spec = ShardSpec.load(manifest)
    num_samples = 0
    for name, facts in shards.items():
        if (artifact / name).is_file():
            found = shard_problems(artifact / name, facts["samples"], spec)
            problems += [f"{name}: {problem}" for problem in found]
            num_samples += facts["samples"]
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problems; `nexus-gen shards repair {artifact}` keeps what is whole")
        return 1
    print(f"{len(shards)} shards with {num_samples} samples are whole")
    return 0


def shard_problems(path: Path, num_samples: int, spec: ShardSpec) -> Iterator[str]:
    """What is wrong with a shard's members and values."""
    try:
        members = index_shard(path)
    except UserError as error:
        yield str(error)
        return
    listing = Listing.read(path)
    if listing is None:
        yield "its listing is missing or does not belong to it"
    if len(members) != num_samples:
        yield f"{len(members)} samples where its manifest says {num_samples}"
    listed = {facts["index"]: facts for facts in listing.samples} if listing else {}
    for place in members:
        sample = read_whole(path, place)
        if sample is None:
            yield f"the sample at byte {place['safetensors'][0]} is damaged"
            continue
        key, _, facts = sample
        if listing and listed.get(facts["index"]) != facts:
            yield f"sample {key} is not what its listing says"
        tensors = read_sample(path, place)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != spec.shapes():
            yield f"sample {key} holds {shapes} where {spec.shapes()} is specified"
        for name, tensor in tensors.items():
            if not bool(tensor.float().isfinite().all()):
                yield f"sample {key}: {name} holds values that are not finite"


def read_whole(path: Path, place: dict[str, Member]) -> tuple[str, bytes, dict[str, Any]] | None:
    """A sample's key, safetensors and facts; None unless its bytes have the checksum that it says."""
    try:
        facts = json.loads(read_member(path, place["json"]))
        data = read_member(path, place["safetensors"])
        return (f"{facts['index']:09d}", data, facts) if facts["checksum"] == checksum(data) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- repair -------------------------------------------------------------------------------------------------------


def repair(artifact: Path, manifest: Manifest) -> int:
    """Rewrite damaged shards with their whole samples alone, and the manifest with what is lost.

    The stage is not skipped then: its next run copies what is here and embeds what is lost. Without damage nothing is
    written.
    """
    lost: list[dict[str, Any]] = []
    mended = []
    for split, shards in manifest.details["splits"].items():
        for shard in shards:
            path = artifact / shard["file"]
            listing = Listing.read(path)
            if listing is not None and same_file(path, shard["bytes"], shard["sha256"]):
                continue
            mended.append(shard["file"])
            written, gone = mend(path, shard["samples"], listing, manifest.details["recipe"])
            lost += [{"split": split, **sample} for sample in gone]
            shard.update(samples=len(written.samples), bytes=written.bytes, sha256=written.sha256)
            print(f"{shard['file']}: {len(written.samples)} samples kept, {len(gone)} lost")
    other = [
        name
        for name, facts in manifest.files.items()
        if name.rpartition(".")[0] not in {file.removesuffix(".tar") for file in mended}
        and not same_file(artifact / name, facts["bytes"], facts["sha256"])
    ]
    for name in other:
        (artifact / name).unlink(missing_ok=True)
        lost.append({"file": name})
        print(f"{name}: damaged, taken out")
    if not mended and not other:
        print("nothing is damaged")
        return 0
    for sample in lost:
        print(f"lost: {' '.join(f'{name} {value}' for name, value in sample.items())}")
    manifest.details["lost"] = [*manifest.details.get("lost", []), *lost] or [{"file": name} for name in mended]
    untouched = {name: facts["sha256"] for name, facts in manifest.files.items() if (artifact / name).is_file()}
    for file in mended:
        untouched.pop(file, None)
        untouched.pop(file.replace(".tar", ".json"), None)
    seal(artifact, manifest, untouched)
    print(f"run {manifest.stage} again: it copies what is whole and embeds {len(lost)} lost")
    return 0


def mend(
    path: Path, num_samples: int, listing: Listing | None, recipe: dict[str, Any]
) -> tuple[Listing, list[dict[str, Any]]]:
    """Write a shard of the whole samples alone: its listing, and what is lost of it, by key and id where known."""
    if listing is None:
        try:  # of a tar that was cut short; it still says what there was
            listing = Listing(**json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            listing = None
    places = scan_shard(path, salvage=True) if path.is_file() else {}
    whole = {sample[0]: sample for place in places.values() if (sample := read_whole(path, place))}
    kept: list[Sample] = [whole[key] for key in sorted(whole)]
    if listing is not None:
        keys = {f"{facts['index']:09d}": facts["id"] for facts in listing.samples}
        gone: list[dict[str, Any]] = [{"key": key, "id": row} for key, row in keys.items() if key not in whole]
    else:
        gone = [{"key": "unknown", "file": path.name}] * (num_samples - len(kept))
    written = write_shard(path, kept, recipe, listing.quarantined if listing else [])
    return written, gone


# ---- stats --------------------------------------------------------------------------------------------------------


@dataclass
class Read:
    """Samples of a split: their facts, and where they stand."""

    facts: dict[str, Any]
    path: Path
    place: dict[str, Member]

    def tensors(self) -> dict[str, "Tensor"]:
        return read_sample(self.path, self.place)


def read_split(artifact: Path, manifest: Manifest, split: str, max_samples: int) -> list[Read]:
    """At most so many samples, spread evenly over a split."""
    total = sum(shard["samples"] for shard in manifest.details["splits"][split])
    if not total:
        raise UserError(f"{artifact} holds no {split} samples")
    step = max(1, -(-total // max_samples))
    found, number = [], 0
    for shard in manifest.details["splits"][split]:
        path = artifact / shard["file"]
        for place in index_shard(path):
            if number % step == 0:
                found.append(Read(json.loads(read_member(path, place["json"])), path, place))
            number += 1
    return found


def stats(artifact: Path, manifest: Manifest, split: str, max_samples: int) -> int:
    import torch

    shards = manifest.details["splits"][split]
    samples = read_split(artifact, manifest, split, max_samples)
    num_bytes = sum(shard["bytes"] for shard in shards)
    print(f"{split}: {len(shards)} shards, {sum(s['samples'] for s in shards)} samples, {num_bytes:,} bytes")
    print(f"rows: {manifest.details['rows'][split]}; stored as {manifest.details['spec']['dtype']}")
    addresses: Counter[str] = Counter()
    for shard in shards:
        listing = Listing.read(artifact / shard["file"])
        addresses.update(facts["address"] for facts in (listing.samples if listing else []))
    repeated = sum(count - 1 for count in addresses.values())
    print(f"duplicates: {repeated} samples share their address with an earlier one")
    sums: dict[str, Any] = {}
    for sample in samples:
        for name, tensor in sample.tensors().items():
            values = tensor.double()
            values = values.flatten(1).T if name == "latents" else values  # (positions, channels or dimensions)
            norms, total, squares, count = sums.get(name, ([], 0, 0, 0))
            norms.append(float(values.norm(dim=-1).mean()))
            sums[name] = (norms, total + values.sum(0), squares + values.square().sum(0), count + len(values))
    print(f"over {len(samples)} samples:")
    print(f"  {'':18}{'mean norm':>10}{'mean':>10}{'variance of a dimension: least':>32}{'median':>10}{'largest':>10}")
    for name, (norms, total, squares, count) in sums.items():
        variance = squares / count - (total / count).square()
        numbers = (sum(norms) / len(norms), float((total / count).mean()))
        spread = [float(value) for value in torch.quantile(variance, torch.tensor([0.0, 0.5, 1.0]).double())]
        print(f"  {name:18}{numbers[0]:10.4g}{numbers[1]:10.3g}{spread[0]:32.3g}{spread[1]:10.3g}{spread[2]:10.3g}")
    for name, error in manifest.details["storage_error"].items():
        print(f"storage of {name}: relative error {error['relative_rms']:.2e}, cosine {error['cosine']:.6f}")
    if gap := manifest.details["gap"]:
        print(f"predicted against true embeddings: cosine {gap['cosine']:.4f}, MSE {gap['mse']:.4f}")
    return 0


# ---- show ---------------------------------------------------------------------------------------------------------


def show(artifact: Path, manifest: Manifest, arguments: argparse.Namespace) -> int:
    """A page that holds its pictures: each sample's own, and those whose target embeddings are nearest by cosine."""
    import torch
    import torch.nn.functional as F

    samples = read_split(artifact, manifest, arguments.split, arguments.max_samples)
    embeds = torch.stack([sample.tensors()["target_embeds"].float().flatten() for sample in samples])
    # Without the mean, which all pictures share, cosines tell pictures apart.
    directions = F.normalize(embeds - embeds.mean(0), dim=-1)
    step = max(1, len(samples) // arguments.num_pictures)
    shown = range(0, len(samples), step)[: arguments.num_pictures]
    cosines = directions[list(shown)] @ directions.T
    nearest = cosines.topk(min(NUM_NEIGHBOURS + 1, len(samples)), dim=-1)
    wanted = {number for row in nearest.indices.tolist() for number in row} | set(shown)
    pictures = thumbnails(artifact, arguments, {key_of(samples[number].facts) for number in wanted})

    def figure(number: int, note: str) -> str:
        facts = samples[number].facts
        source = pictures.get(key_of(facts), "")
        caption = html.escape(f"{facts['id']}: {facts['caption']}"[:120])
        return f'<figure title="{caption}"><img src="{source}" alt="{caption}"><figcaption>{note}</figcaption></figure>'

    lines = []
    for number, values, indices in zip(shown, nearest.values.tolist(), nearest.indices.tolist(), strict=True):
        others = [(other, value) for other, value in zip(indices, values, strict=True) if other != number]
        figures = [figure(other, f"{value:.2f}") for other, value in others[:NUM_NEIGHBOURS]]
        own = figure(number, html.escape(samples[number].facts["id"]))
        lines.append(f'<div class="line">{own}<b>&rarr;</b>{"".join(figures)}</div>')
    page = PAGE.format(title=f"{manifest.stage}: {arguments.split}", count=len(samples), lines="\n".join(lines))
    write_text_atomic(arguments.out, page)
    print(arguments.out)
    return 0


def key_of(facts: dict[str, Any]) -> tuple[str, str]:
    return facts["source"], facts["id"]


def thumbnails(
    artifact: Path, arguments: argparse.Namespace, wanted: set[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """The last picture of the wanted rows as data: addresses."""
    rows, picture_root = arguments.rows, ""
    if rows is None:
        config = artifact.parent / "config.yaml"
        if not config.is_file():
            raise UserError(f"{config} does not exist; give --rows, the dataset that {artifact} was made from")
        try:
            data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
            rows, picture_root = Path(data[arguments.split]), data.get("picture_root", "")
        except (UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise UserError(f"{config} does not say what data.{arguments.split} was; give --rows") from error
    found = {}
    for _, row, _ in read_places(rows, picture_root=picture_root):
        if isinstance(row, Row) and (row.source, row.id) in wanted and row.images:
            image = open_image(row.images[-1])
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            file = io.BytesIO()
            image.save(file, "JPEG", quality=85)
            found[row.source, row.id] = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return found


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; color: #222 }}
.line {{ display: flex; align-items: center; gap: 10px; border-bottom: 1px solid #ddd; padding: 6px 0 }}
figure {{ margin: 0; text-align: center; width: 104px; overflow: hidden }}
figcaption {{ font-size: 11px; color: #555; white-space: nowrap }}
img {{ max-width: 96px; max-height: 96px }}
</style><h1>{title}</h1>
<p>Left a picture, right those of {count} samples whose target embeddings are nearest, with the cosine after the mean
over all samples was taken off.</p>
{lines}
"""
