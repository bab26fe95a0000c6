"""Which files count as the inputs of a stage that reads rows, and where the pictures of its rows are."""

from pathlib import Path

from PIL import Image

from train.preflight.inputs import message_inputs
from train.schemas.inputs import TrainRowsConfig


def inputs(train: Path) -> dict[str, Path]:
    return message_inputs(TrainRowsConfig(train=str(train), quarantine=[]))


def test_a_file_or_a_folder_of_captions_counts_itself_and_several_files_each(tmp_path: Path) -> None:
    shards = [tmp_path / "data" / f"train-0000{number}-of-00002.tar" for number in range(2)]
    (tmp_path / "data").mkdir()
    for shard in shards:
        shard.touch()
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (32, 32)).save(photos / "a.png")
    (photos / "a.txt").write_text("a black square")
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("sources:\n  - path: data\n  - path: photos\n")
    numbered = {f"data.train[{number}]": shard for number, shard in enumerate(shards)}
    assert inputs(shards[0]) == {"data.train": shards[0]}
    assert inputs(photos) == {"data.train": photos}
    assert inputs(tmp_path / "data") == numbered
    assert inputs(tmp_path / "data" / "train-*.tar") == numbered
    assert inputs(mixture) == {"data.train": mixture, **numbered, "data.train[2]": photos}
    for gone in ("gone.jsonl", "gone-*.jsonl", "[run]/train.jsonl"):
        assert inputs(tmp_path / gone) == {"data.train": tmp_path / gone}
