"""Which pictures rows name, and fingerprints of rows with what their pictures hold."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.messages.rows import read_rows
from data.mixture.pictures import PictureHashes, fingerprint_pictures, fingerprint_rows, named_pictures, place_of
from data.mixture.quarantine import LeftOut
from nexus_gen.artifacts.artifact import Manifest, digest, fingerprint_path, hash_file, seal
from nexus_gen.specs.errors import UserError


def row(*images: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>" * len(images) + "?"}, {"role": "assistant", "content": "Yes."}]
    return {"images": list(images), "messages": turns}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def picture(path: Path, colour: str) -> Path:
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def test_every_picture_is_named_once_but_those_that_are_left_out_or_inside_the_file(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", row("b.png", "a.png"), row("c.png"), row("a.png", "../d.png"))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name, data in (("1.json", json.dumps(row("1.png")).encode()), ("1.png", b"inside")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("sources: [{path: a.jsonl}, {path: b.tar}, {path: a.jsonl}]")

    def named(left_out: LeftOut) -> list[str]:
        return [name.removeprefix(f"{tmp_path}/") for name in named_pictures(mixture, left_out, tmp_path / "memory")]

    assert named(LeftOut()) == ["b.png", "a.png", "c.png", "../d.png"]
    assert named(LeftOut({rows: {1: "broken"}})) == ["b.png", "a.png", "../d.png"]


def test_a_fingerprint_is_of_the_pictures_in_their_order(tmp_path: Path) -> None:
    names = [str(picture(tmp_path / f"{colour}.png", colour)) for colour in ("red", "green", "blue")]
    hashes = PictureHashes(None)
    before = fingerprint_pictures(names, hashes)
    assert fingerprint_pictures(names[::-1], hashes) != before
    picture(tmp_path / "green.png", "black")
    assert fingerprint_pictures(names, hashes) != before
    picture(tmp_path / "green.png", "green")
    assert fingerprint_pictures(names, hashes) == before
    (tmp_path / "green.png").unlink()
    assert fingerprint_pictures(names, hashes) != before


def test_many_rows_keep_their_order_whatever_the_threads_do(tmp_path: Path) -> None:
    names = []
    for number in range(1200):
        (tmp_path / str(number)).write_text(str(number))
        names.append(str(tmp_path / str(number)))
    found = list(PictureHashes(None).of_rows(names, lambda name: [name]))
    assert found == [(name, [hash_file(name)]) for name in names]


def test_members_and_encoded_pictures_are_hashed_as_their_files_are(tmp_path: Path) -> None:
    data = picture(tmp_path / "a.png", "red").read_bytes()
    (tmp_path / "tar").write_bytes(b"head" + data + b"tail")
    hashes, wanted = PictureHashes(tmp_path / "memory"), hash_file(tmp_path / "a.png")
    assert hashes.of([str(tmp_path / "tar"), 4, len(data)]) == hashes.of(str(tmp_path / "a.png")) == wanted
    assert hashes.of([str(tmp_path / "gone"), 4, 1]) == hashes.of(str(tmp_path / "gone")) == ""
    inside = write(tmp_path / "rows.jsonl", row("data:image/png;base64,iVBORw0KGgo="))
    (image,) = next(read_rows(inside)).images
    place = place_of(image)
    assert hashes.of(place) == place[0]


def test_rows_of_an_evaluation_are_the_same_with_the_same_pictures(tmp_path: Path) -> None:
    hashes = PictureHashes(None)

    def of(path: Path) -> str:
        return fingerprint_rows(path, [image for one in read_rows(path) for image in one.images], hashes)

    rows = write(tmp_path / "rows.jsonl", row("a.png"))
    picture(tmp_path / "a.png", "red")
    before = of(rows)
    picture(tmp_path / "a.png", "blue")
    assert of(rows) != before
    alone = write(tmp_path / "alone.jsonl", row("data:image/png;base64,iVBORw0KGgo="))
    assert of(alone) == hash_file(alone)  # as earlier versions have it
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    picture(artifact / "b.png", "red")
    inside = write(artifact / "heldout.jsonl", row("b.png"), row("../a.png"))
    seal(artifact, Manifest("messages", "shapes", {}, {}, {}))
    before = of(inside)
    picture(tmp_path / "a.png", "red")
    assert of(inside) != before
    own = [image for one in read_rows(inside) for image in one.images][:1]
    hashes = PictureHashes(None)
    assert fingerprint_rows(inside, own, hashes) == digest([Manifest.load(artifact).fingerprint, "heldout.jsonl"])
    assert fingerprint_rows(inside, own, hashes) == fingerprint_path(inside)
    picture(artifact / "b.png", "blue")
    with pytest.raises(UserError, match=r"artifact/b\.png differs from its manifest"):
        of(inside)
