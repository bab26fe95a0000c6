"""Shards and their loader: nothing lost or doubled, the same order everywhere, exact resume, damage found."""

import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from itertools import chain, combinations, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from webdataset import TarWriter, WebDataset, split_by_node

from data.shards.files import ShardSpec, index_shard, read_sample, save_samples, scan_shard, write_shard
from data.shards.loader import ShardDataset, ShardLoader
from data.shards.quantize import quantize
from nexus_gen.artifacts.artifact import Manifest, hash_file, seal
from nexus_gen.specs.errors import UserError

SIZES = (5, 7, 7, 3, 6)  # uneven on purpose
NUM_SAMPLES = sum(SIZES)
SPEC = ShardSpec(81, 0, 8, [16, 4, 4], "float32", "encoder")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    (directory / "train").mkdir()
    shards, first = [], 0
    for number, size in enumerate(SIZES):
        file = f"train/{number:06d}.tar"
        samples = [
            (f"{i:09d}", {"value": torch.tensor([float(i)])}, {"id": str(i)}) for i in range(first, first + size)
        ]
        assert len(write_shard(directory / file, samples).samples) == size
        shards.append({"file": file, "samples": size})
        first += size
    details = {"spec": SPEC.__dict__, "splits": {"train": shards}}
    seal(directory, Manifest("embedding_shards", "embed_generation", {}, {}, {}, details))
    return directory


def loader(artifact: Path, **changes: Any) -> ShardLoader:
    settings = {"micro_batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 7, "num_workers": 0}
    return ShardLoader(artifact, "train", **{**settings, **changes})


def values(batches: Any, count: int) -> list[list[int]]:
    return [batch["value"].flatten().int().tolist() for batch in islice(iter(batches), count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_sample_once_an_epoch_and_the_same_global_batches(artifact: Path, world_size: int, workers: int) -> None:
    micro = 4 * 3 // world_size // 2  # a global batch of 6 whatever the world
    steps = NUM_SAMPLES // 6
    ranks = [
        values(
            loader(artifact, micro_batch_size=micro, rank=rank, world_size=world_size, num_workers=workers), 2 * steps
        )
        for rank in range(world_size)
    ]
    global_batches = [sorted(chain(*step)) for step in zip(*ranks, strict=True)]
    reference = [sorted(batch) for batch in values(loader(artifact, micro_batch_size=6), 2 * steps)]
    assert global_batches == reference
    first_epoch = list(chain(*global_batches[:steps]))
    assert len(set(first_epoch)) == len(first_epoch) == steps * 6
    assert global_batches[:steps] != global_batches[steps:]


def test_accumulation_cuts_the_same_global_batch(artifact: Path) -> None:
    whole = values(loader(artifact, micro_batch_size=6), 4)
    cut = values(loader(artifact, micro_batch_size=2, accumulation=3), 12)
    assert [list(chain(*cut[3 * step : 3 * step + 3])) for step in range(4)] == whole
    ranks = [values(loader(artifact, micro_batch_size=1, accumulation=3, rank=r, world_size=2), 12) for r in (0, 1)]
    both = [one + other for one, other in zip(*ranks, strict=True)]  # of two processes, micro-batch after micro-batch
    assert [list(chain(*both[3 * step : 3 * step + 3])) for step in range(4)] == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 14, 15, 23])
def test_resume_goes_on_behind_what_was_handed_out(artifact: Path, done: int, workers: int) -> None:
    whole = values(loader(artifact), 30)
    interrupted = loader(artifact, num_workers=workers)
    assert values(interrupted, done) == whole[:done]
    resumed = loader(artifact, num_workers=workers)
    resumed.load_state_dict(interrupted.state_dict())
    assert values(resumed, 30 - done) == whole[done:]


def test_resume_within_a_global_batch_under_another_cut(artifact: Path) -> None:
    whole = list(chain(*values(loader(artifact, micro_batch_size=1, accumulation=6), 24)))
    interrupted = loader(artifact, micro_batch_size=1, accumulation=6)
    values(interrupted, 9)
    resumed = loader(artifact, micro_batch_size=3, accumulation=2)
    resumed.load_state_dict(interrupted.state_dict())
    assert list(chain(*values(resumed, 5))) == whole[9:]
    ranks = [loader(artifact, micro_batch_size=3, rank=rank, world_size=2) for rank in (0, 1)]
    with pytest.raises(UserError, match="9 samples, no multiple of micro batch 3 x 2 processes"):
        ranks[0].load_state_dict(interrupted.state_dict())
    values(interrupted, 3)
    for rank in ranks:
        rank.load_state_dict(interrupted.state_dict())
    assert list(chain(*values(ranks[0], 1), *values(ranks[1], 1))) == whole[12:18]


def test_order_depends_on_the_seed_and_batches_say_where_they_come_from(artifact: Path) -> None:
    assert values(loader(artifact), 10) == values(loader(artifact), 10) != values(loader(artifact, seed=8), 10)
    batches = list(islice(iter(loader(artifact)), 15))
    assert all(torch.equal(batch["index"].float(), batch["value"].flatten()) for batch in batches)
    assert [int(batch["epoch"][0]) for batch in batches] == [0] * 14 + [1]


@pytest.fixture(scope="module")
def imagined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty train samples in ten shards, and two held-out ones: true embeddings are i, predicted ones -1 - i."""
    directory = tmp_path_factory.mktemp("imagined")
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for number in range(11):
        split = "train" if number < 10 else "heldout"
        file = f"{split}/{number:06d}.tar"
        (directory / split).mkdir(exist_ok=True)
        numbers = (2 * number, 2 * number + 1)
        write_shard(
            directory / file,
            [
                (
                    f"{i:09d}",
                    {"target_embeds": torch.tensor([float(i)]), "predicted_embeds": torch.tensor([-1.0 - i])},
                    {},
                )
                for i in numbers
            ],
        )
        splits[split].append({"file": file, "samples": 2})
    details = {"spec": SPEC.__dict__, "splits": splits}
    seal(directory, Manifest("embedding_shards", "embed_generation", {}, {}, {}, details))
    return directory


def embeds(artifact: Path, fraction: float, epoch: int = 0, seed: int = 7) -> list[int]:
    dataset = ShardDataset(artifact, "train", seed, fraction)
    samples = [dataset[(epoch, index)] for index in range(len(dataset))]
    assert all("predicted_embeds" not in sample for sample in samples)
    return [int(sample["target_embeds"]) for sample in samples]


def test_as_many_embeddings_are_predicted_ones_as_are_asked_for(imagined: Path) -> None:
    assert embeds(imagined, 0.0) == list(range(20))
    assert embeds(imagined, 1.0) == [-1 - index for index in range(20)]
    for fraction, epoch, seed in ((0.3, 0, 7), (0.3, 1, 7), (0.3, 0, 8), (0.9, 0, 7)):
        draws = [np.random.default_rng((seed, epoch, index, 1)).random() for index in range(20)]
        expected = [-1 - index if draw < fraction else index for index, draw in enumerate(draws)]
        assert embeds(imagined, fraction, epoch, seed) == expected
    counts = [sum(index < 0 for index in embeds(imagined, 0.3, epoch)) for epoch in range(40)]
    assert abs(sum(counts) / 800 - 0.3) < 0.05  # 3 standard errors


def test_a_loader_draws_the_fraction_that_it_was_given_from_its_split(imagined: Path) -> None:
    settings: dict[str, Any] = {"micro_batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "seed": 7}
    for split, numbers in (("train", set(range(20))), ("heldout", {20, 21})):
        for fraction in (0.0, 1.0):
            made = ShardLoader(imagined, split, num_workers=0, predicted_fraction=fraction, **settings)
            batches = islice(iter(made), made.steps_per_epoch)
            found = {int(value) for batch in batches for value in batch["target_embeds"]}
            assert found == ({-1 - number for number in numbers} if fraction else numbers)


def test_shards_are_shuffled_and_samples_within_eight_of_them(imagined: Path) -> None:
    """So reads stay within a few files at a time, and no two samples stay neighbours as they were stored."""
    dataset = ShardDataset(imagined, "train")
    orders = {(seed, epoch): dataset.order(seed, epoch).tolist() for seed in (7, 8) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    for one, two in combinations(orders.values(), 2):
        assert one != two and {index // 2 for index in one[:16]} != {index // 2 for index in two[:16]}
    for order in orders.values():
        shards = [index // 2 for index in order]
        assert len(set(shards[:16])) == 8 and set(shards[16:]).isdisjoint(shards[:16])
        assert sum(one == two for one, two in pairwise(shards)) < 5  # pairs of a shard; all ten, were it not mixed
    # The order must never change: a run resumes in the order in which it started.
    generator = np.random.default_rng((7, 1))
    shuffled = generator.permutation(10).tolist()
    first = generator.permutation([index for shard in shuffled[:8] for index in (2 * shard, 2 * shard + 1)])
    second = generator.permutation([index for shard in shuffled[8:] for index in (2 * shard, 2 * shard + 1)])
    assert orders[7, 1] == [*first.tolist(), *second.tolist()]


def test_a_split_smaller_than_a_global_batch_and_another_batch_size_are_refused(artifact: Path) -> None:
    with pytest.raises(UserError, match="28 train samples, fewer than one global batch of 30"):
        loader(artifact, micro_batch_size=30)
    with pytest.raises(UserError, match="global_batch_size 2 and now it is 4"):
        loader(artifact, micro_batch_size=4).load_state_dict(loader(artifact).state_dict())


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [("0", {"x": torch.arange(3)}, {"id": "é"})])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert torch.equal(read_sample(tmp_path / "a.tar", index_shard(tmp_path / "a.tar")[0])["x"], torch.arange(3))


def test_a_failing_source_leaves_no_shard(tmp_path: Path) -> None:
    def samples() -> Any:
        yield "0", {"x": torch.arange(3)}, {}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", samples())
    assert not (tmp_path / "a.tar").exists()


def test_a_kill_while_writing_leaves_no_shard_and_the_next_try_writes_the_same_bytes(tmp_path: Path) -> None:
    def samples(kill_at: int | None) -> Any:
        for index in range(40):
            if index == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield f"{index:09d}", {"x": torch.full((1000,), index)}, {"index": index}

    child = multiprocessing.get_context("fork").Process(target=lambda: write_shard(tmp_path / "a.tar", samples(30)))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".a.tar.tmp"]
    for name in ("a.tar", "b.tar"):
        assert len(write_shard(tmp_path / name, samples(None)).samples) == 40
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.tar", "b.json", "b.tar"]


def test_webdataset_itself_reads_a_shard(artifact: Path) -> None:
    dataset = WebDataset(str(artifact / "train" / "000001.tar"), shardshuffle=False, nodesplitter=split_by_node)
    found = [(sample["__key__"], load(sample["safetensors"])["value"].item()) for sample in dataset]
    assert found == [(f"{index:09d}", float(index)) for index in range(5, 12)]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (["0.json"], "sample 0 of shard {path} has json where it needs json, safetensors"),
        (["0.json", "0.safetensors", "0.json"], "{path} holds 0.json twice"),
    ],
)
def test_a_sample_in_part_or_twice_is_refused(members: list[str], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(tarfile.TarInfo(member))
    with pytest.raises(UserError) as caught:
        index_shard(path)
    assert sentence.format(path=path) in str(caught.value)


def test_a_shard_of_another_length_than_its_manifest_says_is_refused(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    write_shard(copy / "train" / "000003.tar", [("0", {"value": torch.zeros(1)}, {})])
    with pytest.raises(UserError, match=r"000003\.tar holds 1 samples and its manifest says 3"):
        values(loader(copy), NUM_SAMPLES // 2)


def test_damage_is_found(artifact: Path, tmp_path: Path) -> None:
    whole = (artifact / "train" / "000001.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(UserError, match=r"cut\.tar"):
        for members in index_shard(tmp_path / "cut.tar"):
            read_sample(tmp_path / "cut.tar", members)
    (tmp_path / "noise.tar").write_bytes(b"\x01" * 4096)
    with pytest.raises(UserError, match="cannot be read"):
        index_shard(tmp_path / "noise.tar")


def test_a_shard_cut_anywhere_before_its_end_is_cut_short(tmp_path: Path) -> None:
    """Inside headers and their extensions, data, padding, the two blocks of the end, and between all of them."""
    samples = [(f"{index:09d}", {"x": torch.arange(150) + index}, {"index": index}) for index in range(2)]
    write_shard(tmp_path / "whole.tar", samples)
    whole = (tmp_path / "whole.tar").read_bytes()
    places = index_shard(tmp_path / "whole.tar")
    last = max(offset + size for members in places for offset, size in members.values())
    end = last + -last % 512 + 1024
    assert end < len(whole) and not any(whole[last:])  # tar fills up its record behind the end
    cut, edges = tmp_path / "cut.tar", range(0, end, 512)
    for length in sorted({*range(0, end, 97), *edges, *(edge + 1 for edge in edges), *(edge + 511 for edge in edges)}):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar cannot be read \(.*`nexus-gen shards repair"):
            index_shard(cut)
        salvaged = scan_shard(cut, salvage=True)
        assert all(places[n].items() >= members.items() for n, members in enumerate(salvaged.values()))
    cut.write_bytes(whole[:end])
    assert index_shard(cut) == places


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"num_reference_tokens": 324}, "num_reference_tokens 0 where this stage needs 324"),
        ({"latent_shape": [16, 64, 64]}, "latent_shape [16, 4, 4] where this stage needs [16, 64, 64]"),
    ],
)
def test_shards_of_another_grid_are_refused(artifact: Path, wanted: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        ShardSpec.load(Manifest.load(artifact)).require(artifact, **wanted)
    assert sentence in str(caught.value)


def test_samples_and_tars_are_byte_for_byte_those_of_the_libraries(tmp_path: Path) -> None:
    """For every storage: 8-bit embeddings with scales, bfloat16 and float32 beside each other."""
    values = torch.randn(5, 7, 8)
    batch = {
        **quantize("target_embeds", values, "int8"),
        **quantize("source_embeds", values, "float8_e4m3fn"),
        "predicted_embeds": values.bfloat16(),
        "latents": values,
    }
    alone = [save({name: tensor[number].contiguous() for name, tensor in batch.items()}) for number in range(5)]
    saved = save_samples(batch)
    assert saved == alone
    listing = write_shard(tmp_path / "ours.tar", [(f"{n:09d}", data, {"id": str(n)}) for n, data in enumerate(saved)])
    with TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0.0) as writer:
        for number, facts in enumerate(listing.samples):
            text = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
            writer.write({"__key__": f"{number:09d}", "safetensors": saved[number], "json": text})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert (listing.bytes, listing.sha256) == ((tmp_path / "ours.tar").stat().st_size, hash_file(tmp_path / "ours.tar"))


def test_a_loader_follows_the_order_of_its_seed_through_the_epochs(artifact: Path) -> None:
    made = loader(artifact, micro_batch_size=4)
    dataset = ShardDataset(artifact, "train")
    batches = list(islice(iter(made), 2 * made.steps_per_epoch))
    found = [batch["index"].tolist() for batch in batches]
    assert list(chain(*found[: made.steps_per_epoch])) == dataset.order(7, 0)[:28].tolist()
    assert list(chain(*found[made.steps_per_epoch :])) == dataset.order(7, 1)[:28].tolist()


def test_true_embeddings_are_read_unless_a_fraction_is_given(imagined: Path) -> None:
    made = ShardLoader(
        imagined, "train", micro_batch_size=2, accumulation=1, rank=0, world_size=1, seed=7, num_workers=0
    )
    assert all(float(value) >= 0 for batch in islice(iter(made), 10) for value in batch["target_embeds"])
    drawn = [
        int(ShardDataset(imagined, "train", predicted_fraction=0.5)[(0, index)]["target_embeds"]) for index in range(20)
    ]
    draws = [np.random.default_rng((0, 0, index, 1)).random() for index in range(20)]  # of seed 0
    assert drawn == [-1 - index if draw < 0.5 else index for index, draw in enumerate(draws)]


def test_batches_are_prepared_where_they_are_loaded(artifact: Path) -> None:
    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "process": os.getpid()}

    for num_workers in (0, 1):
        (batch,) = islice(iter(loader(artifact, num_workers=num_workers, prepare=prepare)), 1)
        assert (batch["process"] == os.getpid()) is (num_workers == 0)
