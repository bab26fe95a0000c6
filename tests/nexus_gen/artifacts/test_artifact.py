"""Fingerprints are of what files hold; what an artifact's manifest says of its files has to hold."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_gen.artifacts.artifact import (
    Manifest,
    Seals,
    digest,
    fingerprint_inside,
    fingerprint_path,
    hash_file,
    remember_sealed,
    seal,
    verify,
)
from nexus_gen.artifacts.content import Contents
from nexus_gen.parts.models import SHIPPED_RUN, memory_of
from nexus_gen.specs.errors import UserError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "standins" / "artifact"
    for name in ("FLUX.1-dev/ae.safetensors", "FLUX.1-dev/tokenizer/vocab.json", "Qwen/config.json", "train.jsonl"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    seal(directory, Manifest("base_models", "standins", {}, {}, {}))
    return directory


def in_place(path: Path) -> None:
    """Other bytes, with size, time and inode as they were."""
    facts = path.stat()
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (in_place, "differs from its manifest"),
        (lambda path: path.write_bytes(b"longer than it was by far"), "differs from its manifest"),
        (Path.unlink, "is missing"),
        (lambda path: (path.parent / "added.safetensors").touch(), "is not in its manifest"),
    ],
)
def test_an_artifact_that_was_changed_is_refused_by_name(
    artifact: Path, change: Callable[[Path], None], problem: str
) -> None:
    flux = artifact / "FLUX.1-dev"
    before = fingerprint_path(flux)
    assert before == fingerprint_inside(flux) == digest([Manifest.load(artifact).fingerprint, "FLUX.1-dev"])
    change(flux / "ae.safetensors")
    for where in (flux, artifact):
        with pytest.raises(UserError, match=rf"FLUX\.1-dev/a\S+ {problem}") as error:
            fingerprint_path(where)
        assert "run stage=standins again" in str(error.value) and "copy it out of the artifact" in str(error.value)
    fingerprint_path(artifact / "Qwen")  # what is read from elsewhere in it is as it was
    fingerprint_path(artifact / "train.jsonl")
    shutil.copytree(flux, artifact.parent / "mine")
    assert fingerprint_path(artifact.parent / "mine") != before  # accepted where no manifest speaks for it


def test_a_large_file_that_was_cut_is_named_with_both_sizes(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus_gen.artifacts.artifact.LARGE", 1)
    monkeypatch.setattr(Contents, "sha256", lambda *_: pytest.fail("a file was read before sizes were asked"))
    (artifact / "train.jsonl").write_text("cut")
    with pytest.raises(UserError, match=r"train\.jsonl differs from its manifest \(3 bytes where that has 11\)"):
        fingerprint_path(artifact)


def test_files_beside_those_of_the_manifest_are_no_input(artifact: Path) -> None:
    (artifact / "mine.jsonl").touch()
    (artifact / ".DS_Store").touch()
    with pytest.raises(UserError, match=r"mine\.jsonl is not in its manifest"):
        fingerprint_path(artifact / "mine.jsonl")
    with pytest.raises(UserError, match=r"\.DS_Store is not in its manifest"):
        fingerprint_path(artifact / ".DS_Store")
    (artifact / "mine.jsonl").unlink()
    fingerprint_path(artifact)
    seals = Seals()
    seals.require(str(artifact / "train.jsonl"), hash_file(artifact / "train.jsonl"))
    seals.require(str(artifact / ".." / "outside.png"), "anything")
    for name in (".DS_Store", "train.jsonl", "gone.png"):
        with pytest.raises(UserError, match=name):
            seals.require(str(artifact / name), "")


def test_the_way_to_a_file_does_not_count(artifact: Path, tmp_path: Path) -> None:
    outside = tmp_path / "standins" / "rows.jsonl"
    outside.write_text("one")
    around = artifact / ".." / "rows.jsonl"  # no part of the artifact, though its path begins like one
    assert fingerprint_path(around) == fingerprint_path(outside) == hash_file(outside)
    (tmp_path / "link").symlink_to(artifact, target_is_directory=True)
    assert fingerprint_path(tmp_path / "link" / "Qwen") == fingerprint_path(artifact / "Qwen")
    (artifact / "train.jsonl").unlink()
    (artifact / "train.jsonl").symlink_to(outside)
    with pytest.raises(UserError, match="differs from its manifest"):
        fingerprint_path(tmp_path / "link" / "train.jsonl")


def test_every_byte_of_every_file_counts(tmp_path: Path) -> None:
    """Links to directories and files of any size included; loops end."""
    model, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for directory in (model / "sub", elsewhere):
        directory.mkdir(parents=True)
    (model / "weights").write_bytes(bytes(5 << 20))
    (model / "sub" / "config.json").write_text("{}")
    names = ["sub/config.json", "weights"]
    assert fingerprint_path(model) == digest([[name, hash_file(model / name)] for name in names])
    found = [fingerprint_path(model)]
    with open(model / "weights", "r+b") as file:
        file.seek(5 << 19)
        file.write(b"x")
    found.append(fingerprint_path(model))
    (model / "tokenizer").symlink_to(elsewhere)
    (elsewhere / "vocab.json").write_text("one")
    found.append(fingerprint_path(model))
    (elsewhere / "vocab.json").write_text("two")
    found.append(fingerprint_path(model))
    (model / "tokenizer" / "loop").symlink_to(model)
    (model / "sub" / "hanging").symlink_to(model / "nowhere")
    found.append(fingerprint_path(model))
    assert len(set(found)) == 4 and found[3] == found[4]


def test_a_manifest_of_another_program_makes_no_artifact(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("one")
    for text in ('{"version": 3, "files": []}', "[]"):
        (tmp_path / "manifest.json").write_text(text)
        assert fingerprint_inside(rows) is None and fingerprint_path(rows) == hash_file(rows)
    (tmp_path / "manifest.json").write_text('{"kind": "messages", "stage"')
    with pytest.raises(UserError, match="is not a readable manifest"):
        fingerprint_path(rows)


def test_the_version_of_numerics_enters_from_the_second_on(artifact: Path) -> None:
    """Manifests of the first one are as earlier versions wrote them."""
    manifest = Manifest.load(artifact)
    assert "numerics" not in json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    first = digest([manifest.kind, manifest.config, manifest.inputs, manifest.details, manifest.files])
    assert (manifest.numerics, manifest.fingerprint) == (1, first)
    manifest.numerics = 2
    seal(artifact, manifest)
    assert Manifest.load(artifact).numerics == 2 and Manifest.load(artifact).fingerprint != first


def test_what_was_just_sealed_is_not_read_again(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus_gen.artifacts.content.SETTLED_NS", 0)
    contents = Contents(artifact.parent / "contents.jsonl")
    remember_sealed(artifact, contents)
    monkeypatch.setattr("nexus_gen.artifacts.content.hash_file", lambda _: pytest.fail("a file was read"))
    fingerprint_path(artifact, Contents(artifact.parent / "contents.jsonl"))


def test_verifying_reads_everything_whatever_is_remembered(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails changes bytes and no time."""
    monkeypatch.setattr("nexus_gen.artifacts.content.SETTLED_NS", 0)
    remember_sealed(artifact, Contents(artifact.parent.parent / "contents.jsonl"))
    monkeypatch.setattr("nexus_gen.artifacts.content.hash_file", lambda _: "of a broken disk")
    fingerprint_path(artifact, Contents(artifact.parent / "contents.jsonl"))
    with pytest.raises(UserError, match="differs from its manifest"):
        verify(artifact)


def test_weights_that_ship_are_as_their_manifests_say() -> None:
    for stage in ("standins", "pretrain", "generation_decoder", "editing_decoder", "shapes"):
        where = SHIPPED_RUN / stage / "artifact"
        assert fingerprint_path(where) == digest([verify(where).fingerprint, "."])


def test_commands_on_a_run_that_ships_leave_nothing_in_it(tmp_path: Path) -> None:
    assert memory_of(tmp_path) == tmp_path / "contents.jsonl"
    shipped = shutil.copytree(SHIPPED_RUN, tmp_path / "shipped")
    assert memory_of(shipped) is None
    (shipped / "evaluation" / "mine").mkdir()
    (shipped / "evaluation" / "mine" / "scores.json").write_text("{}")
    verify(shipped)
    (shipped / "generation_decoder" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        verify(shipped)
