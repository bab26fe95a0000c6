"""The training order: every row in every pass, shares as configured, the same for a seed, mistakes named."""

import json
import pickle
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from webdataset import TarWriter

from data.doctor.command import main as data_check
from data.messages.rows import Row
from data.mixture.order import Mixture, check_dataset, load_mixture, read_dataset
from data.mixture.quarantine import LeftOut
from data.records.dataset_files import files_of
from nexus_gen.specs.errors import UserError


def messages(question: str, answer: str = "yes") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_texts(path: Path, num_rows: int, question: str = "{}?") -> Path:
    rows = [{"id": f"{path.stem}{n}", "messages": messages(question.format(n))} for n in range(num_rows)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=8)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_mixture(directory: Path, *sources: dict[str, Any], **options: Any) -> Path:
    path = directory / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": list(sources), **options}))
    return path


def ids(mixture: Mixture, positions: range) -> list[str]:
    return [mixture.row(mixture.draw(position)).id for position in positions]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_texts(tmp_path / "a.jsonl", 10)
    write_texts(tmp_path / "b.jsonl", 7, question="第{}个？")
    write_texts(tmp_path / "c.parquet", 100)
    return tmp_path


def test_every_epoch_of_one_file_has_every_row_in_an_order_of_its_own(files: Path) -> None:
    order = ids(Mixture(files / "a.jsonl", seed=3), range(40))
    epochs = [tuple(order[start : start + 10]) for start in range(0, 40, 10)]
    assert all(sorted(epoch) == [f"a{n}" for n in range(10)] for epoch in epochs)
    assert len(set(epochs)) == 4
    assert order == ids(Mixture(files / "a.jsonl", seed=3), range(40))
    assert order != ids(Mixture(files / "a.jsonl", seed=4), range(40))


def test_what_rank_zero_found_is_the_order_of_all(files: Path) -> None:
    """Also where a file has grown since: a rank that read it itself would have another order."""
    with TarWriter(str(files / "d.tar")) as tar:
        for number in range(9):
            tar.write({"__key__": f"{number}", "json": {"id": f"d{number}", "messages": messages("?")}})
    path = write_mixture(
        files,
        {"path": "a.jsonl", "count": 4},
        {"path": "b.jsonl", "languages": ["zh"]},
        {"path": "c.parquet", "captions": {"short": 1}},
        {"path": "d.tar"},
    )
    mixture = Mixture(path, 0, LeftOut({files / "d.tar": {3: "bad"}}))
    sent = pickle.dumps(mixture)
    write_texts(files / "a.jsonl", 11)
    with tarfile.open(files / "d.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("10.json"))
    received = pickle.loads(sent)
    assert (len(received), received.num_left_out) == (10 + 7 + 100 + 8, 1)
    assert ids(received, range(300)) == ids(mixture, range(300))
    assert len(Mixture(path, 0)) == len(received) + 3


def test_counts_are_rows_of_an_epoch_and_passes_over_a_source_are_whole(files: Path) -> None:
    path = write_mixture(files, {"path": "a.jsonl", "count": 4}, {"path": "b.jsonl"})
    mixture = Mixture(path, seed=0)
    assert (mixture.counts, mixture.epoch_rows, len(mixture)) == ([4, 7], 11, 17)
    drawn = ids(mixture, range(5 * 11))
    for epoch in range(5):
        assert Counter(name[0] for name in drawn[11 * epoch : 11 * epoch + 11]) == {"a": 4, "b": 7}
    assert Counter(name for name in drawn if name[0] == "a") == dict.fromkeys((f"a{n}" for n in range(10)), 2)


@pytest.mark.parametrize(("weights", "expected"), [((3, 1), (75, 25)), ((1, 1), (50, 50)), ((2, 1), (67, 33))])
def test_weights_are_shares_of_the_draws(weights: tuple[int, int], expected: tuple[int, int], files: Path) -> None:
    sources = [{"path": f"{name}.jsonl", "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    mixture = Mixture(write_mixture(files, *sources, epoch_rows=100), seed=0)
    counts = Counter(name[0] for name in ids(mixture, range(100)))
    assert (counts["a"], counts["b"]) == expected


def test_a_source_may_take_tasks_and_languages_only(files: Path) -> None:
    rows = [*read_dataset(files / "a.jsonl"), *read_dataset(files / "b.jsonl")]
    path = write_mixture(files, {"path": "[ab].jsonl", "languages": ["zh"]}, {"path": "a.jsonl", "tasks": ["text"]})
    mixture = Mixture(path, seed=0)
    assert mixture.counts == [7, 10]
    assert sorted(ids(mixture, range(17))) == sorted(row.id for row in rows)
    assert sorted(row.id for row in read_dataset(path)) == sorted(row.id for row in rows)
    with pytest.raises(UserError, match=r"a\.jsonl holds no editing rows"):
        Mixture(write_mixture(files, {"path": "a.jsonl", "tasks": ["editing"]}), seed=0)


def test_a_file_named_twice_is_read_once(files: Path) -> None:
    path = write_mixture(files, {"path": "a.jsonl", "weight": 1}, {"path": "*.jsonl", "weight": 1})
    assert len(list(read_dataset(path))) == 17
    assert check_dataset(path) == {"text": 17}


def test_parquet_is_drawn_within_a_few_row_groups(files: Path) -> None:
    mixture = Mixture(files / "c.parquet", seed=1)
    order = [mixture.draw(position).place for position in range(100)]
    assert sorted(order) == list(range(100))
    groups = np.array(order) // 8
    for start in range(0, 96, 32):  # the last group is short, so windows are of 28 or 32 rows
        assert len(set(groups[start : start + 28])) <= 8
    changes = sum(len(set(groups[start : start + 25])) for start in range(0, 100, 25))
    assert changes <= 24  # spread over all 13 groups it would be about 50


def test_system_messages_and_labels_of_captions(files: Path) -> None:
    captions = {"image": "a.png", "captions": {"long": "a very red square", "short": "red"}}
    (files / "d.jsonl").write_text(json.dumps(captions) + "\n")

    def drawn(**options: Any) -> list[Row]:
        mixture = Mixture(write_mixture(files, {"path": "d.jsonl", **options}), seed=0)
        return [mixture.row(mixture.draw(position)) for position in range(40)]

    rows = drawn(system="You paint.")
    assert all(row.messages[0] == {"role": "system", "content": "You paint."} for row in rows)
    assert {row.messages[1]["content"].rsplit(": ")[1] for row in rows} == {"a very red square", "red"}
    assert {row.messages[0]["content"].rsplit(": ")[1] for row in drawn(captions={"long": 1})} == {"a very red square"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ("{", "cannot be read"),
        ("sources: []", "is no mixture; give a list of sources"),
        ({"sources": ["a.jsonl"]}, "source 1 has no path"),
        ({"sources": [{"paht": "a.jsonl"}]}, "source 1 has no path"),
        ({"sources": [{"path": "no.jsonl"}]}, "no file is called no.jsonl"),
        ({"sources": [{"path": ["a.jsonl", "b.jsonl"]}]}, "path is ['a.jsonl', 'b.jsonl']; give one file or a pattern"),
        ({"sources": [{"path": "a.jsonl", "tasks": [["text"]]}]}, "tasks is [['text']]"),
        ({"sources": [{"path": "a.jsonl", "wieght": 1}]}, "there is no key 'wieght'; did you mean 'weight'?"),
        ({"sources": [{"path": "a.jsonl", "weight": 0}]}, "weight is 0; it must be a number above 0"),
        ({"sources": [{"path": "a.jsonl", "count": 1.5}]}, "count is 1.5"),
        ({"sources": [{"path": "a.jsonl", "count": 1, "weight": 1}]}, "both a weight and a count"),
        ({"sources": [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}]}, "1 of 2 sources have a weight"),
        ({"sources": [{"path": "a.jsonl", "tasks": ["edit"]}]}, "tasks is ['edit']; give a list out of understanding"),
        ({"sources": [{"path": "a.jsonl", "tasks": "editing"}]}, "tasks is 'editing'"),
        ({"sources": [{"path": "a.jsonl", "languages": ["fr"]}]}, "languages is ['fr']"),
        ({"sources": [{"path": "a.jsonl", "format": "lava"}]}, "no format 'lava'; did you mean 'llava'?"),
        ({"sources": [{"path": "a.jsonl", "captions": {"long": "x"}}]}, "captions is {'long': 'x'}"),
        ("sources: [{path: a.jsonl, captions: {long: .nan}}]", "captions is {'long': nan}"),
        ("sources: [{path: a.jsonl, captions: {long: -1e-1}}]", "captions is {'long': '-1e-1'}"),
        ("sources: [{path: a.jsonl, captions: {long: null}}]", "captions is {'long': None}"),
        ("sources: [{path: a.jsonl, weight: .inf}]", "weight is inf; it must be a finite number"),
        ("sources: [{path: a.jsonl, weight: nan}]", "weight is nan; it must be a finite number"),
        ("sources: [{path: a.jsonl, weight: -1e-1}]", "weight is -0.1; it must be a number above 0"),
        ("sources: [{path: a.jsonl, weight: true}]", "weight is True; it must be a number"),
        ("sources: [{path: a.jsonl, weight: many}]", "weight is 'many'; it must be a number"),
        ("sources: [{path: a.jsonl, count: 1e-1}]", "count is 1e-1; it must be a whole number"),
        ("sources: [{path: a.jsonl, weight: 1}]\nepoch_rows: .nan", "epoch_rows is nan; it must be a finite number"),
        ("sources: [{path: 2024_11_27}]", "path is 20241127; give one file or a pattern, in quotes where YAML reads"),
        ({"sources": [{"path": "a.jsonl", "system": 3}]}, "system is 3; give a text"),
        ({"sources": [{"path": "a.jsonl"}], "epoch_rows": 5}, "epoch_rows goes with weights"),
        ({"sources": [{"path": "a.jsonl", "weight": 1}], "epoch_rows": 0}, "epoch_rows is 0"),
        ({"sources": [{"path": "a.jsonl", "weight": 1}], "epochs": 2}, "there is no key 'epochs'"),
    ],
)
def test_mistakes_in_a_mixture_are_named(values: Any, sentence: str, files: Path) -> None:
    path = files / "mixture.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    with pytest.raises(UserError) as caught:
        load_mixture(path)
    assert sentence in str(caught.value) and str(path) in str(caught.value)


def test_a_pattern_is_one_of_the_path_alone(tmp_path: Path) -> None:
    directory = tmp_path / "[ab]"
    directory.mkdir()
    write_texts(directory / "a.jsonl", 3)
    assert len(Mixture(write_mixture(directory, {"path": "*.jsonl"}), seed=0)) == 3
    assert len(Mixture(write_mixture(directory, {"path": str(tmp_path / "[[]ab]" / "a.jsonl")}), seed=0)) == 3


def test_numbers_are_read_as_people_write_them(files: Path) -> None:
    path = files / "mixture.yaml"
    texts = "{path: a.jsonl, weight: 3e-1, captions: {long: 2e0}}, {path: b.jsonl, weight: 1_0, captions: {s: '.5'}}"
    path.write_text(f"epoch_rows: 2e3\nsources: [{texts}]")
    spec = load_mixture(path)
    assert (spec.epoch_rows, [source.weight for source in spec.sources]) == (2000, [0.3, 10])
    assert [source.captions for source in spec.sources] == [{"long": 2}, {"s": 0.5}]
    path.write_text("sources: [{path: a.jsonl, count: 2e1}]")
    assert load_mixture(path).sources[0].count == 20


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("[y]/*.jsonl", ["[y]/1.jsonl", "[y]/2.jsonl"]),
        ("[y]/1.jsonl", ["[y]/1.jsonl"]),
        ("y/*.jsonl", ["y/1.jsonl"]),
        ("[yz]/1.jsonl", ["y/1.jsonl"]),
        ("what?/{z}/[a-b]*.jsonl", ["what?/{z}/[a-b]1.jsonl"]),
        ("what?/*/*1.jsonl", ["what?/{z}/[a-b]1.jsonl"]),
        ("*/1.jsonl", ["[y]/1.jsonl", "y/1.jsonl"]),
        ("~/[y]/2.jsonl", ["[y]/2.jsonl"]),
        ("数据 #1/a=b,c.jsonl", ["数据 #1/a=b,c.jsonl"]),
        ("[x]/*.jsonl", []),
    ],
)
def test_names_with_characters_of_patterns(
    pattern: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("[y]/1.jsonl", "[y]/2.jsonl", "y/1.jsonl", "what?/{z}/[a-b]1.jsonl", "数据 #1/a=b,c.jsonl")
    for path in (tmp_path / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert files_of(tmp_path, pattern) == sorted(tmp_path / name for name in found)


def test_a_weight_that_draws_nothing_is_refused(files: Path) -> None:
    path = write_mixture(files, {"path": "a.jsonl", "weight": 999}, {"path": "b.jsonl", "weight": 1})
    with pytest.raises(UserError, match="source 2 has weight 1 of 1000, less than one of 17 rows"):
        Mixture(path, seed=0)


@pytest.mark.parametrize(
    ("asked", "mistake"),
    [
        (
            {"captions": {"long": 2, "shrt": 1}},
            "captions weighs 'shrt', no label of its texts; did you mean 'short'",
        ),
        ({"tasks": ["editing", "text"]}, r"d\.jsonl holds no editing text rows; take it out"),
    ],
)
def test_what_a_mixture_asks_for_in_vain_is_named(
    asked: dict[str, Any], mistake: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {"image": "a.png", "captions": {"long": "a very red square", "short": "red"}}
    (files / "a.png").touch()
    (files / "d.jsonl").write_text(json.dumps(captions) + "\n")
    path = write_mixture(files, {"path": "a.jsonl", "tasks": ["text"]}, {"path": "d.jsonl", **asked})
    with pytest.raises(UserError, match=rf"mixture\.yaml, source 2: .*{mistake}"):
        check_dataset(path)
    assert data_check(["check", str(path), "--images", "exists", "--num-workers", "1"]) == 2
    said = capsys.readouterr().out
    assert re.search(rf"error    .*mixture\.yaml, source 2: .*{mistake}", said) and "nothing is wrong" not in said
    good = write_mixture(files, {"path": "d.jsonl", "tasks": ["generation"], "captions": {"short": 1}})
    assert check_dataset(good) == {"generation": 1}
    assert data_check(["check", str(good), "--images", "exists", "--num-workers", "1"]) == 0


def test_broken_rows_below_the_rate_are_left_to_the_trainer(files: Path) -> None:
    with open(files / "a.jsonl", "a") as file:
        file.write("{\n{\n")
    path = write_mixture(files, {"path": "a.jsonl"}, {"path": "b.jsonl"})
    with pytest.raises(UserError, match=r"a\.jsonl:11: not JSON .*\(2 of 12 rows are broken; `nexus-gen data check"):
        check_dataset(path, max_bad_fraction=0.1)
    assert check_dataset(path, max_bad_fraction=0.2) == {"text": 17}


def test_rows_are_read_once_whatever_may_be_broken_of_them(tmp_path: Path) -> None:
    """And again where too many were: their pictures may have come since, as they do while an earlier stage runs."""
    looks = [{"images": [f"{n}.png"], "messages": messages("<image>?")} for n in range(10)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in looks))
    for number in range(9):
        (tmp_path / f"{number}.png").touch()
    assert check_dataset(path, max_bad_fraction=0.1) == {"understanding": 9}
    with pytest.raises(UserError, match=r"a\.jsonl:10: picture .*9\.png does not exist"):
        check_dataset(path)
    (tmp_path / "9.png").touch()
    assert check_dataset(path, max_bad_fraction=0.5) == {"understanding": 9}
    assert check_dataset(path) == check_dataset(path, max_bad_fraction=0.5) == {"understanding": 10}
