"""Which rows an evaluation asks, and of which held-out pictures it finds what was painted again. No torch here."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data.messages.rows import Row, RowError
from data.messages.truth import has_scenes, truth_problem
from data.mixture.order import read_places
from data.mixture.pictures import PictureHashes, fingerprint_rows
from data.mixture.quarantine import NOTHING, LeftOut
from data.mixture.spec import load_mixture
from nexus_gen.artifacts.artifact import digest, fingerprint_path
from nexus_gen.pictures.images import StoredImage, open_image
from nexus_gen.specs.errors import UserError
from train.scores.outcomes import prompt_of

log = logging.getLogger(__name__)

MAX_KNOWN = 500  # distinct pictures of a task among which others are found again; a vision tower looks at each
MAX_READ = 20_000  # rows that are searched for pictures of the same prompts


@dataclass(frozen=True)
class KnownPicture:
    """A distinct picture of the held-out rows of a task. key: of its pixels. image: where it is.

    row, place: the first row that shows it, and its number in it. prompts, labels: of all rows that make it; those
    of edits have no prompts, because an instruction says little of what the whole picture shows.
    """

    key: str
    image: StoredImage
    row: str
    place: int
    prompts: frozenset[str]
    labels: frozenset[str]


def read_tasks(
    path: Path, num: int | None, root: Path | None = None, left_out: LeftOut = NOTHING
) -> dict[str, list[Row]]:
    """The first `num` rows of each task that can be asked; what else there is, is said once.

    root: what their pictures are relative to, the file unless given. left_out: rows that a run leaves out. Raises
    UserError for a row whose `truth` cannot be scored by, and when no row is left.
    """
    tasks: dict[str, list[Row]] = {}
    passed_over: dict[str, list[str]] = {}
    times: dict[str, int] = {}
    for _, row, reason in read_places(path, left_out, root):
        if reason:
            continue
        if isinstance(row, RowError):
            passed_over.setdefault("cannot be read", []).append(str(row))
            continue
        if problem := truth_problem(row):
            raise UserError(f"{row.where}: {problem}")
        if why := _not_asked(row):
            passed_over.setdefault(why, []).append(row.where)
            continue
        times[row.id] = times.get(row.id, 0) + 1
        if times[row.id] > 1:
            if has_scenes(row):
                raise UserError(f"{row.where}: the id {row.id} is there twice; give every row its own")
            row = dataclasses.replace(row, id=f"{row.id}#{times[row.id]}")  # files of a mixture number their rows alike
        rows = tasks.setdefault(row.task, [])
        if num is None or len(rows) < num:
            rows.append(row)
    for why, places in passed_over.items():
        log.warning("%s: left out, because they %s: %d rows, the first is %s", path, why, len(places), places[0])
    if not tasks:
        raise UserError(f"{path} holds no rows of one exchange about pictures, which alone can be scored")
    return tasks


def _not_asked(row: Row) -> str:
    """Why a row is not asked; empty for one that is."""
    if row.task == "text":
        return "have no pictures"
    if len(row.messages) != 2:
        return "hold more than one exchange, or a system message"
    return "make more than one picture" if row.num_targets > 1 else ""


def look_at(rows: Iterable[Row], num: int | None) -> tuple[list[Row], list[KnownPicture], dict[str, str]]:
    """(the first `num` rows of a task, the pictures to find theirs among, the key of the picture that each row makes).

    The pictures are those of rows without scenes, of the asked ones and of others up to MAX_KNOWN. Rows without scenes
    whose pictures cannot be opened are left out, and said.
    """
    asked: list[Row] = []
    known: dict[str, KnownPicture] = {}
    keys: dict[str, str] = {}
    broken: list[str] = []
    for row in rows:
        is_asked = num is None or len(asked) < num
        if has_scenes(row):
            asked += [row] * is_asked
            continue
        if not is_asked and (not row.num_targets or len(known) >= MAX_KNOWN):
            continue
        try:
            of_row = [key_of(image) for image in row.images]
        except UserError as error:
            broken.append(f"{row.where}: {error}")
            continue
        asked += [row] * is_asked
        if not row.num_targets:
            continue
        keys[row.id] = of_row[-1]
        for place, key in enumerate(of_row):
            if key in known or len(known) < MAX_KNOWN:
                known[key] = _seen_again(known.get(key), key, row, place)
    if broken:
        log.warning("left out, because their pictures cannot be opened: %d rows, such as %s", len(broken), broken[0])
    return asked, list(known.values()), keys


def probe_pictures(
    path: Path, known: Sequence[KnownPicture], task: str, root: Path | None = None, left_out: LeftOut = NOTHING
) -> list[KnownPicture]:
    """Pictures of other rows of a task, of training as a rule, that have a prompt or a label of the known ones.

    They teach a probe what these look like; at most MAX_KNOWN, out of the first MAX_READ rows. Rows that cannot be read
    or opened are passed over.
    """
    names = frozenset[str]().union(*(picture.prompts | picture.labels for picture in known))
    if len(names) < 2:
        return []
    there = {picture.key for picture in known}
    found: dict[str, KnownPicture] = {}
    for _, row, reason in islice(read_places(path, left_out, root), MAX_READ):
        if len(found) >= MAX_KNOWN:
            break
        if reason or isinstance(row, RowError) or row.task != task or has_scenes(row) or _not_asked(row):
            continue
        about = _seen_again(None, "", row, len(row.images) - 1)
        if names.isdisjoint(about.prompts | about.labels):
            continue
        with suppress(UserError):
            key = key_of(row.images[-1])
            if key not in there:
                found[key] = _seen_again(found.get(key), key, row, about.place)
    return list(found.values())


def _seen_again(before: KnownPicture | None, key: str, row: Row, place: int) -> KnownPicture:
    """A known picture with what one more row says of it; a picture that is only given is of no prompt."""
    is_made = place == len(row.images) - 1
    label = (row.truth or {}).get("label")
    prompts = frozenset([prompt_of(row)] if is_made and row.task == "generation" else [])
    labels = frozenset([label] if is_made and label else [])
    if before is None:
        return KnownPicture(key, row.images[place], row.id, place, prompts, labels)
    return dataclasses.replace(before, prompts=before.prompts | prompts, labels=before.labels | labels)


def key_of(image: StoredImage) -> str:
    """What tells pictures apart: their pixels, whatever files they are in. Raises UserError as `open_image` does."""
    pixels = open_image(image)
    return hashlib.sha256(f"{pixels.size}".encode() + pixels.tobytes()).hexdigest()[:32]


def fingerprint_dataset(path: Path, pictures: Iterable[StoredImage], hashes: PictureHashes) -> str:
    """Of everything that `read_tasks` reads: one file, or all of a mixture, a pattern or a folder."""
    dataset = load_mixture(path)
    first, *others = [path] * dataset.is_mixture + dataset.files
    rows = fingerprint_rows(first, pictures, hashes)
    return digest([rows, *(fingerprint_path(file, hashes.contents) for file in others)]) if others else rows
