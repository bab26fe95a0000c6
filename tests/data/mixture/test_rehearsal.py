"""Rehearsal: the share of what a model knew, counted over epochs; the rows that ship; which rows are embedded."""

import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data.doctor.command import main as data_check
from data.mixture.order import Mixture, RowsByPlace, check_dataset, read_dataset, read_places
from data.mixture.quarantine import LeftOut
from data.mixture.rehearsal import SHIPPED_ROWS, chosen, num_rehearsed, with_rehearsal
from data.mixture.spec import MixtureSpec, load_mixture
from data.shapes.contents import ShapesConfig
from data.shapes.dataset import content_of, messages_of
from data.shapes.scenes import draw
from nexus_gen.parts.models import SHIPPED_RUN
from nexus_gen.pictures.images import read_image_bytes


def write_texts(path: Path, num_rows: int) -> Path:
    answer = {"role": "assistant", "content": "This one."}
    ids = [f"{path.stem}{number}" for number in range(num_rows)]
    rows = [{"id": name, "messages": [{"role": "user", "content": f"Which is {name}?"}, answer]} for name in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_mixture(path: Path, *sources: dict[str, Any], **options: Any) -> Path:
    path.write_text(yaml.safe_dump({"sources": list(sources), **options}))
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, num_rows in (("own", 10), ("more", 30), ("old", 7), ("older", 50)):
        write_texts(tmp_path / f"{name}.jsonl", num_rows)
    return tmp_path


def rehearsing(own: Path, old: Path, share: float) -> MixtureSpec:
    return with_rehearsal(load_mixture(own), load_mixture(old), share)


def drawn(mixture: Mixture, positions: range) -> list[str]:
    return [mixture.row(mixture.draw(position)).id for position in positions]


def of(name: str, ids: list[str]) -> list[str]:
    return [row for row in ids if row.rstrip("0123456789") == name]


def test_an_epoch_has_every_own_row_once_and_the_share_on_top(files: Path) -> None:
    """A quarter: 3 rows beside 10. In 7 epochs 21 draws, every one of the 7 old rows three times."""
    mixture = Mixture(rehearsing(files / "own.jsonl", files / "old.jsonl", 0.25), seed=5)
    assert (mixture.epoch_rows, mixture.epoch_rehearsal, mixture.own_rows, mixture.rehearsal_rows) == (13, 3, 10, 7)
    ids = drawn(mixture, range(7 * 13))
    for start in range(0, len(ids), 13):
        epoch = ids[start : start + 13]
        assert sorted(of("own", epoch)) == sorted(f"own{number}" for number in range(10))
        assert len(of("old", epoch)) == 3
    assert Counter(of("old", ids)) == {f"old{number}": 3 for number in range(7)}


def test_the_order_follows_from_seed_and_position_alone(files: Path) -> None:
    spec = rehearsing(files / "own.jsonl", files / "old.jsonl", 0.4)
    order = drawn(Mixture(spec, seed=5), range(60))
    assert drawn(pickle.loads(pickle.dumps(Mixture(spec, seed=5))), range(23, 60)) == order[23:]
    assert drawn(Mixture(spec, seed=6), range(60)) != order


def test_mixtures_on_either_side_keep_their_proportions(files: Path) -> None:
    """Own: 30 and 10 of 40 by weight. A fifth of all: 10 of 50, of which counts of 3 and 1 make 8 and 2 (7.5, 2.5)."""
    own = write_mixture(
        files / "own.yaml", {"path": "own.jsonl", "weight": 3}, {"path": "more.jsonl", "weight": 1}, epoch_rows=40
    )
    old = write_mixture(files / "old.yaml", {"path": "old.jsonl", "count": 3}, {"path": "older.jsonl", "count": 1})
    mixture = Mixture(rehearsing(own, old, 0.2), seed=0)
    assert mixture.counts == [30, 10, 8, 2]
    counts = Counter(row.rstrip("0123456789") for row in drawn(mixture, range(50)))
    assert counts == {"own": 30, "more": 10, "old": 8, "older": 2}


def test_without_a_share_nothing_is_rehearsed(files: Path) -> None:
    assert num_rehearsed(1000, 0.0) == 0
    own = Mixture(files / "own.jsonl", seed=3)
    assert (own.epoch_rows, own.epoch_rehearsal, own.rehearsal_rows) == (10, 0, 0)


def test_rows_that_are_left_out_are_counted_of_the_own_ones_alone(files: Path) -> None:
    left_out = LeftOut({files / "own.jsonl": {2: "bad"}, files / "old.jsonl": {0: "bad", 6: "bad"}})
    mixture = Mixture(rehearsing(files / "own.jsonl", files / "old.jsonl", 0.5), 0, left_out)
    assert (mixture.own_rows, mixture.num_left_out, mixture.rehearsal_rows, mixture.epoch_rows) == (9, 1, 5, 18)
    assert not {"own2", "old0", "old6"} & set(drawn(mixture, range(180)))


def test_rows_are_found_again_by_their_places(files: Path) -> None:
    spec = rehearsing(files / "own.jsonl", files / "old.jsonl", 0.5)
    places = {row.id: place for place, row, _ in read_places(spec) if not isinstance(row, Exception)}
    assert len(places) == 17 and places["old4"] == (1, 0, 4)
    assert RowsByPlace(spec)[places["old4"]].id == "old4"


def test_a_longer_choice_of_rows_holds_a_shorter_one() -> None:
    assert chosen(5, 9) == [0, 1, 2, 3, 4]
    few, many = chosen(200, 30), chosen(200, 70)
    assert len(set(few)) == 30 and set(few) < set(many) and few == sorted(few)
    assert max(few) >= 100  # of the whole file, which may be sorted by what is asked


def test_the_rows_that_ship_are_those_that_the_shipped_weights_were_trained_on() -> None:
    """Drawn again by the recipe that the weights record, words and pixels."""
    recorded = yaml.safe_load((SHIPPED_RUN / "shapes" / "config.yaml").read_text())
    config = ShapesConfig(**recorded["shapes"])
    rows = list(read_dataset(SHIPPED_ROWS))
    assert len(rows) == 600 and {row.source for row in rows} == {"rehearsal"}
    assert check_dataset(SHIPPED_ROWS) == {"understanding": 303, "generation": 152, "editing": 145}
    for index in range(0, 600, 40):
        content = content_of(config, recorded["seed"], "train", index)
        assert rows[index].id == f"train-{index:07d}"
        assert rows[index].messages == messages_of(content)
        for picture, scene in zip(rows[index].images, content.scenes, strict=True):
            shown = Image.open(io.BytesIO(read_image_bytes(picture))).convert("RGB")
            assert np.array_equal(np.asarray(shown), np.asarray(draw(scene, config.image_size)))


def test_the_rows_that_ship_are_few_enough_to_ship() -> None:
    assert SHIPPED_ROWS.stat().st_size < 700_000


def test_the_check_of_a_config_finds_heldout_rows_among_those_rehearsed(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # of the table that it prints
    data = {"train": "own.jsonl", "heldout": "heldout.jsonl", "rehearsal": 0.2, "rehearsal_rows": "old.jsonl"}
    (files / "heldout.jsonl").write_text((files / "old.jsonl").read_text().splitlines()[3] + "\n")
    paths = {key: str(files / of) if key in ("train", "heldout", "rehearsal_rows") else of for key, of in data.items()}
    for share, leaks in ((0.2, True), (0.0, False)):
        config = {"model": {"qwen": str(files)}, "data": {**paths, "rehearsal": share}}
        (files / "config.yaml").write_text(yaml.safe_dump(config))
        assert data_check(["check", "--config", str(files / "config.yaml"), "--images", "none"]) == (2 if leaks else 0)
        assert ("old.jsonl:4: the same as the held-out heldout.jsonl:1" in capsys.readouterr().out) == leaks
