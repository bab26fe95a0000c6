"""What the pipeline of the embedding stages stores and measures, with an embedder whose numbers are known.

A row is the number of its sample; batches, measures, what is set aside and what is copied follow by hand.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from data.mixture.pictures import UNREADABLE, hash_picture
from data.shards.files import Listing, index_shard, read_member, read_sample
from data.shards.plan import EarlierSamples, PlannedSample, PlannedShard, RowFacts
from nexus_gen.specs.errors import UserError
from train.embed.pipeline import Chunk, Prepared, ShardFiller, require_few, require_unchanged, stacked, to_host
from train.embed.stage import means


def planned(index: int, address: str = "") -> PlannedSample:
    facts = {"id": f"id{index}", "source": "test", "index": index, "address": address or f"address{index}"}
    return PlannedSample("train", RowFacts((), f"rows:{index}", f"id{index}", "test", "", [], ""), facts)


def plan(*indices: int, number: int = 0) -> PlannedShard:
    return PlannedShard("train", number, [planned(index) for index in indices])


class Embedder:
    """Sample i is [[i, 1], [0, 2]]; it is predicted as that plus [[0, 0], [0, i]]. Batches are filled up to three."""

    def __init__(self, bad: Sequence[int] = (), infinite: Sequence[int] = (), with_gap: bool = True) -> None:
        self.bad, self.infinite, self.with_gap = bad, infinite, with_gap
        self.batches: list[list[int]] = []

    def prepare(self, sample: PlannedSample) -> Prepared:
        index = sample.facts["index"]
        if index in self.bad:
            raise UserError(f"picture {index} cannot be read")
        return {"number": torch.tensor([float(index)]), "words": torch.arange(index % 2 + 1)}

    def group(self, prepared: Prepared) -> int:
        return len(prepared["words"])

    def embed(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        numbers = [float(row["number"]) for row in rows]
        self.batches.append([int(number) for number in numbers])
        padded = numbers + [0.0] * (3 - len(numbers))
        true = torch.stack([torch.tensor([[number, 1.0], [0.0, 2.0]]) for number in padded])
        predicted = true + torch.stack([torch.tensor([[0.0, 0.0], [0.0, number]]) for number in padded])
        latents = torch.stack([torch.full((2, 1, 1), number) for number in padded])
        for place, number in enumerate(numbers):
            if number in self.infinite:
                latents[place, 1] = float("inf")
        gap = {"gap.predicted": predicted, "gap.true": true} if self.with_gap else {}
        return {"target_embeds": true, "latents": latents, **gap}


def fill(
    directory: Path,
    embedder: Embedder,
    shards: Sequence[PlannedShard],
    dtype: str = "float32",
    max_bad: float = 9,
    earlier: Sequence[Path] = (),
) -> ShardFiller:
    filler = ShardFiller(
        directory, embedder, EarlierSamples(earlier), {"recipe": 1},
        dtype=dtype, batch_size=2, num_workers=0, max_bad=max_bad,
    )  # fmt: skip
    done: list[int] = []
    assert filler.fill(shards, lambda: False, done.append)
    assert sum(done) == filler.embedded + len({entry["reason"] for entry in filler.quarantined})
    return filler


def facts_of(shard: Path) -> list[dict[str, Any]]:
    listing = Listing.read(shard)
    assert listing is not None
    return listing.samples


def test_every_sample_is_stored_with_its_own_measures(tmp_path: Path) -> None:
    embedder = Embedder()
    filler = fill(tmp_path, embedder, [plan(0, 1, 2, 3, 4), plan(5, number=1)])
    # Even and odd ones are of two lengths; a shard ends its batches.
    assert embedder.batches == [[0, 2], [1, 3], [4], [5]] and filler.embedded == 6 and not filler.quarantined
    shard = tmp_path / "train" / "000000.tar"
    members = index_shard(shard)
    for index, facts in enumerate(facts_of(shard)):
        sample = read_sample(shard, members[index])
        assert sample["target_embeds"].tolist() == [[index, 1.0], [0.0, 2.0]]
        assert sample["latents"].flatten().tolist() == [index, index]
        assert sample.keys() == {"target_embeds", "latents"} and facts["id"] == f"id{index}"
        # Both tokens point the same way and one number of four is off by the index.
        assert facts["measured"]["gap"] == {"cosine": pytest.approx(1.0), "mse": pytest.approx(index**2 / 4)}
        assert facts["measured"]["storage"]["target_embeds"]["relative_rms"] == 0.0
        assert "latents" not in facts["measured"]["storage"]
    assert [facts["index"] for facts in facts_of(tmp_path / "train" / "000001.tar")] == [5]
    assert "gap" not in measured_of(tmp_path / "without", Embedder(with_gap=False))


def measured_of(directory: Path, embedder: Embedder, dtype: str = "float32") -> dict[str, Any]:
    fill(directory, embedder, [plan(1)], dtype)
    return facts_of(directory / "train" / "000000.tar")[0]["measured"]


def test_a_storage_error_is_that_of_the_bytes_that_are_stored(tmp_path: Path) -> None:
    """[[1, 1], [0, 2]] are whole steps of 1/127 and 2/127, so nothing is lost; of 1 beside 3 a bit is."""
    assert measured_of(tmp_path / "whole", Embedder(), "int8")["storage"]["target_embeds"]["relative_rms"] == 0
    fill(tmp_path, Embedder(), [plan(3)], "int8")
    shard = tmp_path / "train" / "000000.tar"
    stored = load(read_member(shard, index_shard(shard)[0]["safetensors"]))
    assert stored["target_embeds"].tolist() == [[127, 42], [0, 127]]  # 1 is 42.33 steps of 3 / 127
    assert stored["target_embeds.scale"].flatten().tolist() == pytest.approx([3 / 127, 2 / 127])
    assert stored["latents"].dtype == torch.bfloat16
    lost = 1 - float(torch.tensor(42 * 3 / 127).bfloat16())
    (facts,) = facts_of(shard)
    assert facts["measured"]["storage"]["target_embeds"]["relative_rms"] == pytest.approx(
        abs(lost) / (9 + 1 + 4) ** 0.5, rel=1e-5
    )


def test_rows_that_cannot_be_embedded_are_named_and_leave_the_others_as_they_are(tmp_path: Path) -> None:
    shard = PlannedShard("train", 0, [planned(0), planned(1), planned(2), planned(3, "address1"), planned(4)])
    filler = fill(tmp_path, Embedder(bad=[1], infinite=[4]), [shard])
    path = tmp_path / "train" / "000000.tar"
    # Two rows share what cannot be read.
    assert [(entry["where"], entry["reason"]) for entry in filler.quarantined] == [
        ("rows:1", "picture 1 cannot be read"),
        ("rows:3", "picture 1 cannot be read"),
    ]
    listing = Listing.read(path)
    assert listing is not None and [facts["index"] for facts in listing.samples] == [0, 2]
    assert [(entry["index"], entry["reason"]) for entry in listing.quarantined] == [
        (1, "picture 1 cannot be read"),
        (3, "picture 1 cannot be read"),
        (4, "its embeddings are not finite"),
    ]
    assert [read_sample(path, member)["target_embeds"][0, 0] for member in index_shard(path)] == [0, 2]
    with pytest.raises(UserError, match="2 rows could not be embedded, more than the 1 that"):
        fill(tmp_path / "strict", Embedder(bad=[1]), [shard], max_bad=1)
    require_few([{}, {}], 2)


def test_what_is_there_is_copied_and_rows_of_one_address_are_embedded_once(tmp_path: Path) -> None:
    fill(tmp_path / "earlier", Embedder(), [plan(0, 1)])
    embedder = Embedder()
    shard = PlannedShard("train", 0, [planned(2), planned(1), planned(5, "address2"), planned(6)])
    filler = fill(tmp_path, embedder, [plan(0, 1, number=1), shard], earlier=[tmp_path / "earlier"])
    assert embedder.batches == [[2, 6]] and filler.embedded == 2
    # A shard of which nothing is to be embedded is written all the same.
    assert [facts["index"] for facts in facts_of(tmp_path / "train" / "000001.tar")] == [0, 1]
    path = tmp_path / "train" / "000000.tar"
    assert [int(read_sample(path, member)["target_embeds"][0, 0]) for member in index_shard(path)] == [2, 1, 2, 6]
    assert [facts["measured"]["gap"]["mse"] for facts in facts_of(path)] == [1.0, 0.25, 1.0, 9.0]
    assert [facts["index"] for facts in facts_of(path)] == [2, 1, 5, 6]


def test_a_stage_that_is_to_stop_writes_no_shard_more(tmp_path: Path) -> None:
    stopping = iter([False, False, True])
    filler = ShardFiller(
        tmp_path, Embedder(), EarlierSamples([]), {}, dtype="float32", batch_size=2, num_workers=0, max_bad=0
    )
    assert not filler.fill([plan(0, 2), plan(4, number=1), plan(6, number=2)], lambda: next(stopping), lambda _: None)
    assert sorted(path.name for path in tmp_path.glob("*/*.tar")) == ["000000.tar", "000001.tar"]


def test_chunks_give_back_their_rows(tmp_path: Path) -> None:
    rows = [
        {"a": torch.arange(6).view(2, 3), "b": torch.tensor([1.5])},
        {"a": torch.arange(4).view(4, 1) + 10, "b": torch.tensor([2.5])},
        {"a": torch.zeros(0, dtype=torch.int64), "c": torch.tensor([True])},
    ]
    chunk = Chunk.pack(rows, {3: "bad"})
    assert chunk.reasons == {3: "bad"} and [tensor.numel() for tensor in chunk.tensors] == [10, 2, 1]
    for row, back in zip(rows, chunk.rows(), strict=True):
        assert row.keys() == back.keys()
        assert all(torch.equal(row[name], back[name]) and row[name].dtype == back[name].dtype for name in row)


def test_rows_that_follow_each_other_are_stacked_where_they_lie() -> None:
    whole = torch.arange(24.0)
    rows = [whole[first : first + 6].view(2, 3) for first in (6, 12, 18)]
    joined = stacked(rows)
    assert joined.data_ptr() == rows[0].data_ptr() and torch.equal(joined, whole[6:].view(3, 2, 3))
    for apart in ([rows[0], rows[2]], [rows[1], rows[0]], [rows[0], rows[1].clone()]):
        assert torch.equal(stacked(apart), torch.cat(apart).view(2, 2, 3))
        assert stacked(apart).data_ptr() != apart[0].data_ptr()


def test_tensors_of_the_host_are_handed_on() -> None:
    tensors = {"a": torch.ones(1)}
    assert to_host(tensors)() is tensors


def test_pictures_are_those_of_the_address(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("RGB", (3, 3)).save(path)
    for pictures in ([hash_picture(path)], [UNREADABLE]):
        sample = planned(0)
        sample.facts["pictures"] = pictures
        require_unchanged([path], sample)
    sample.facts["pictures"] = ["0" * 16]
    with pytest.raises(UserError, match="changed while its stage was running"):
        require_unchanged([path], sample)


def test_measures_of_samples_are_averaged_alike() -> None:
    assert means([{"mse": 1.0, "cosine": 0.25}, {"mse": 2.0, "cosine": 0.75}, {"mse": 6.0, "cosine": 0.5}]) == {
        "mse": 3.0,
        "cosine": 0.5,
    }
    assert means([]) == {}
    assert means([{"mse": value} for value in (1e16, 1.0, -1e16)]) == {"mse": pytest.approx(1 / 3, rel=1e-6)}


def test_what_is_stored_says_where_its_bytes_are(tmp_path: Path) -> None:
    """Read without our reader: a tar of JSON and safetensors."""
    import tarfile

    fill(tmp_path, Embedder(), [plan(7)])
    with tarfile.open(tmp_path / "train" / "000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert json.loads(members["000000007.json"])["address"] == "address7"
    data = members["000000007.safetensors"]
    (length,) = struct.unpack("<Q", data[:8])
    place = json.loads(data[8 : 8 + length])["target_embeds"]["data_offsets"]
    assert struct.unpack("<4f", data[8 + length :][slice(*place)]) == (7.0, 1.0, 0.0, 2.0)
