"""Damage to a checkpoint is found before it is loaded, and the whole one before it is taken."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nexus_gen.specs.errors import UserError
from train.pretrain.callbacks import remove_incomplete_checkpoints
from train.runs.checkpoints import checkpoint_step, complete_checkpoints
from train.steps.retention import LISTING, damage_of, forget_damaged, set_damaged_aside, write_listing

MODEL = "global_step/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def write(directory: Path, step: int, listed: bool = True) -> Path:
    """A checkpoint with a file of every kind that the engines write."""
    path = directory / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    torch.save({"weights": torch.full((1000,), float(step))}, path / MODEL)
    torch.save({"rng": torch.arange(8)}, path / "rng_state.pth")
    save_file({"average": torch.ones(100)}, path / "average.safetensors")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (path / "latest").write_text("global_step")
    if listed:
        write_listing(path)
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garble(path: Path) -> None:
    path.write_bytes(b"\x93garbage" * (path.stat().st_size // 8 + 1))


def flip(path: Path) -> None:
    """One bit of the data."""
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 5] ^= 4
    path.write_bytes(data)


Damage = Callable[[Path], None]
FILES = (MODEL, "rng_state.pth", "average.safetensors", "trainer_state.json", "latest")


@pytest.mark.parametrize("damage", [cut, empty, garble, flip, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, LISTING])
def test_damage_to_any_file_is_found(damage: Damage, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert damage_of(path) is None
    damage(path / name)
    found = damage_of(path)
    if name == LISTING and damage is Path.unlink:
        assert found is None  # as of an earlier version: its files are whole
    elif name == LISTING and damage is flip:
        assert found is not None
    else:
        assert found is not None and name in found


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        *((damage, name) for damage in (cut, empty, garble) for name in FILES),
        (flip, MODEL),
        (Path.unlink, MODEL),
        (Path.unlink, "latest"),
    ],
)
def test_damage_without_a_list_is_found_where_files_tell_it(damage: Damage, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 7, listed=False)
    assert damage_of(path) is None
    damage(path / name)
    assert damage_of(path) is not None


def test_the_whole_checkpoint_before_damaged_ones_is_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write(tmp_path, step) for step in (10, 20, 30, 40)]
    cut(paths[3] / MODEL)
    (paths[2] / "latest").unlink()
    set_damaged_aside(paths, checkpoint_step)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
    assert f"checkpoint {paths[3]} is damaged" in caplog.text and f"checkpoint {paths[2]} is damaged" in caplog.text
    assert "checkpoint-20 and repeats 20 steps" in caplog.text
    set_damaged_aside(paths[:2], checkpoint_step)
    assert len(list(tmp_path.iterdir())) == 4
    forget_damaged(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20"]


def test_a_list_that_is_gone_is_damage_where_an_earlier_checkpoint_has_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write(tmp_path, 10, listed=False), write(tmp_path, 20), write(tmp_path, 21)]
    (paths[2] / LISTING).unlink()
    set_damaged_aside(paths, checkpoint_step)
    assert f"checkpoint {paths[2]} is damaged ({LISTING} is missing)" in caplog.text
    assert caplog.text.rstrip().endswith("checkpoint-20 and repeats 1 step")


def test_without_a_list_a_rank_whose_state_is_gone_is_missed(tmp_path: Path) -> None:
    path = write(tmp_path, 7, listed=False)
    for rank in range(3):
        torch.save({}, path / "global_step" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    assert damage_of(path) is None
    (path / "global_step" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert damage_of(path) == "global_step/zero_pp_rank_1_mp_rank_00_optim_states.pt is missing"
    (path / MODEL).unlink()
    assert damage_of(path) == f"{MODEL} is missing"


@pytest.mark.parametrize("name", ["checkpoint-20-copy", "checkpoint-20 (copy)", "checkpoint-old", "checkpoint-20.bak"])
def test_what_people_call_like_a_checkpoint_stays_and_is_none(name: str, tmp_path: Path) -> None:
    newest = write(tmp_path, 20)
    shutil.copytree(newest, tmp_path / name)
    (tmp_path / name / LISTING).unlink()
    assert complete_checkpoints(tmp_path) == [newest]
    remove_incomplete_checkpoints(tmp_path)
    assert (tmp_path / name).is_dir()


def test_an_older_damaged_checkpoint_is_left_alone(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (10, 20)]
    cut(paths[0] / MODEL)
    set_damaged_aside(paths, checkpoint_step)
    assert all(path.is_dir() for path in paths)


def test_without_a_whole_checkpoint_the_damaged_one_is_named_with_the_remedy(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (10, 20)]
    for path in paths:
        flip(path / MODEL)
    with pytest.raises(
        UserError, match=r"checkpoint-20 is damaged .*remove checkpoint-20, checkpoint-10, .*resume=false"
    ):
        set_damaged_aside(paths, checkpoint_step)
    assert all(path.is_dir() for path in paths)
    set_damaged_aside([], checkpoint_step)
