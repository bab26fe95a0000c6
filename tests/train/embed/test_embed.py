"""Embedding by content: kills, resumes and changes on tiny real models; equal bit for bit to a run from nothing."""

import json
import random
import re
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import embed_runs as runs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.doctor.command import main as check
from data.shards.commands import main
from data.shards.files import index_shard, read_sample
from data.shards.loader import ShardLoader
from nexus_gen.artifacts.artifact import Manifest, verify
from nexus_gen.language.checkpoint import load_autoregressive, save_autoregressive
from nexus_gen.specs.errors import UserError
from train.embed.stage import EmbedEditingStage, EmbedGenerationStage
from train.runs.directory import require_artifact
from train.schemas.embed import EmbedStageConfig
from train.steps.metrics import read_metrics

pytestmark = pytest.mark.slow

NUM_TRAIN, NUM_HELDOUT = 16, 4  # in shards of three


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for task in ("generation", "editing"):
        runs.write_rows(directory / task, "train", NUM_TRAIN, task == "editing")
        runs.write_rows(directory / task, "heldout", NUM_HELDOUT, task == "editing")
    return directory


@pytest.fixture(scope="module", params=["generation", "editing"])
def whole(request: pytest.FixtureRequest, inputs: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stage of a task, run once from nothing on one process, and the seconds that it took."""
    stage = runs.config(inputs, data / request.param, tmp_path_factory.mktemp(request.param), f"embed_{request.param}")
    runs.run(stage)  # the first run of a session also waits for the fork server's imports
    shutil.rmtree(stage.run_dir)
    began = time.monotonic()
    assert to_embed(runs.run(stage)) == (NUM_TRAIN + NUM_HELDOUT, 0, 0)
    return stage, time.monotonic() - began


def to_embed(said: str) -> tuple[int, int, int]:
    """(to embed, kept, removed) of what a stage said at its start."""
    found = re.search(r"(\d+|nothing) to embed.*?(\d+) kept, (\d+) removed", said)
    assert found, said
    return int(found[1]) if found[1] != "nothing" else 0, int(found[2]), int(found[3])


def elsewhere(stage: EmbedStageConfig, runs_dir: Path, **embed: Any) -> EmbedStageConfig:
    """The same stage in another directory of runs, or with other settings."""
    checkpoint, data = Path(stage.embed.autoregressive), Path(stage.data.train).parent
    return runs.config(checkpoint.parent, data, runs_dir, stage.stage, **embed)


def test_kills_at_random_leave_no_trace(whole: Any, tmp_path: Path) -> None:
    """Twelve of each stage, on one to three processes: another number after each kill."""
    reference, seconds = whole
    chance = random.Random(7)
    kills = finished = 0
    stage = elsewhere(reference, tmp_path)
    while kills < 12 or not finished:
        # Before, while and after the first shards of this start are written.
        num_shards = chance.choice((0, 1, 1, 2, 3))
        delay_s = chance.uniform(0, seconds if num_shards == 0 else 0.05)
        if kills < 12 and runs.kill(stage, chance.choice((1, 1, 2, 3)), num_shards, delay_s):
            kills += 1
            continue
        if kills == 12:
            runs.run(stage, chance.choice((1, 2, 3)))
        assert runs.contents(stage) == runs.contents(reference)
        shutil.rmtree(stage.run_dir)
        finished += 1
    keys = [
        f"{split}/{facts['index']}"
        for split in ("train", "heldout")
        for path in sorted((reference.artifact_dir / split).glob("*.json"))
        for facts in json.loads(path.read_text(encoding="utf-8"))["samples"]
    ]
    assert keys == [*(f"train/{i}" for i in range(NUM_TRAIN)), *(f"heldout/{i}" for i in range(NUM_HELDOUT))]


def test_one_killed_state_is_finished_alike_on_one_two_and_three_processes(whole: Any, tmp_path: Path) -> None:
    reference, _ = whole
    killed = elsewhere(reference, tmp_path / "killed")
    assert runs.kill(killed, world_size=1, num_shards=2, delay_s=0)
    for world_size in (1, 2, 3):
        copy = elsewhere(reference, tmp_path / f"on{world_size}")
        shutil.copytree(killed.run_dir, copy.run_dir)
        embedded, kept, _ = to_embed(runs.run(copy, world_size))
        assert embedded > 0 and kept >= 6 and embedded + kept == NUM_TRAIN + NUM_HELDOUT
        assert runs.contents(copy) == runs.contents(reference)


@pytest.fixture
def changed(whole: Any, tmp_path: Path) -> EmbedStageConfig:
    """The stage beside a copy of its data, its models and what it has made."""
    reference, _ = whole
    data, models = Path(reference.data.train).parent, Path(reference.embed.autoregressive).parent
    copy = runs.config(
        shutil.copytree(models, tmp_path / "models"),
        shutil.copytree(data, tmp_path / "data"),
        tmp_path / "runs",
        reference.stage,
    )
    shutil.copytree(reference.run_dir, copy.run_dir)
    return copy


def test_exactly_the_changed_rows_are_embedded_again(changed: EmbedStageConfig, tmp_path: Path) -> None:
    everything = NUM_TRAIN + NUM_HELDOUT
    assert runs.run(changed) == "skipped"
    data = Path(changed.data.train).parent
    runs.write_picture(data / "train5.png", seed=1)
    said = runs.run(changed)
    assert to_embed(said) == (1, everything - 1, 0) and "pictures changed: 1" in said
    # A row less at the front moves all others to other places of other shards.
    rows = runs.read_jsonl(data / "train.jsonl")
    added = {**rows[0], "id": "new", "images": [f"new{name}" for name in rows[0]["images"]]}
    for number, name in enumerate(added["images"]):
        runs.write_picture(data / name, seed=100 + number)
    runs.write_jsonl(data / "train.jsonl", [*rows[1:], added])
    said = runs.run(changed, 2)
    assert to_embed(said) == (1, everything - 1, 1) and "rows new: 1" in said
    from_nothing = elsewhere(changed, tmp_path / "from_nothing")
    assert to_embed(runs.run(from_nothing)) == (everything, 0, 0)
    assert runs.contents(changed) == runs.contents(from_nothing)


def test_decoders_get_their_share_of_rehearsal_behind_unchanged_own_rows(
    whole: Any, tmp_path: Path, changed: EmbedStageConfig
) -> None:
    """A fifth: 4 rows beside 16, of 7 that there are; half asks for 16 and gets 7, of which the 4 are kept."""
    reference, _ = whole
    old = tmp_path / "old"
    rows = runs.read_jsonl(runs.write_rows(old, "train", 7, reference.stage == "embed_editing"))
    runs.write_jsonl(old / "train.jsonl", [{**row, "source": "old"} for row in rows])
    own = samples(reference, "train")

    def rehearsing(share: float) -> EmbedStageConfig:
        rows = str(old / "train.jsonl")
        return elsewhere(changed, Path(changed.runs_dir), rehearsal=share, rehearsal_rows=rows)

    said = runs.run(rehearsing(0.2))
    assert to_embed(said) == (4, NUM_TRAIN + NUM_HELDOUT, 0)
    assert f"train: {NUM_TRAIN} rows + 4 of rehearsal = 20 embedded + 0 quarantined" in said
    details = Manifest.load(changed.artifact_dir).details
    assert details["rows"]["train"] == {"rows": NUM_TRAIN, "embedded": 20, "quarantined": 0, "rehearsal": 4}
    assert details["rows"]["heldout"] == {"rows": NUM_HELDOUT, "embedded": NUM_HELDOUT, "quarantined": 0}
    rehearsed = samples(changed, "train")
    assert rehearsed[:NUM_TRAIN] == own and samples(changed, "heldout") == samples(reference, "heldout")
    # Embedded alone they are the same; their ids are those of the other file.
    alone = runs.config(Path(changed.embed.autoregressive).parent, old, tmp_path / "alone", reference.stage)
    shutil.copyfile(old / "train.jsonl", old / "heldout.jsonl")
    runs.run(alone)
    assert len(set(rehearsed[NUM_TRAIN:])) == 4 and set(rehearsed[NUM_TRAIN:]) < set(samples(alone, "train"))

    said = runs.run(rehearsing(0.5))
    assert to_embed(said) == (3, NUM_TRAIN + NUM_HELDOUT + 4, 0)
    assert "data.rehearsal 0.5 asks for 16 rows of this task, and there are 7" in said
    assert runs.run(rehearsing(0.5)) == "skipped"
    assert to_embed(runs.run(changed)) == (0, NUM_TRAIN + NUM_HELDOUT, 7)  # rehearsed no more
    assert runs.contents(changed)["train/000000.tar"] == runs.contents(reference)["train/000000.tar"]


def samples(stage: EmbedStageConfig, split: str) -> list[tuple[str, str]]:
    """Address and checksum of every sample of a split, in order."""
    listings = [json.loads(path.read_text()) for path in sorted((stage.artifact_dir / split).glob("*.json"))]
    return [(facts["address"], facts["checksum"]) for listing in listings for facts in listing["samples"]]


def test_a_setting_and_the_encoder_say_why_all_is_embedded_again(changed: EmbedStageConfig) -> None:
    everything = NUM_TRAIN + NUM_HELDOUT
    said = runs.run(elsewhere(changed, Path(changed.runs_dir), image_size=32))
    assert to_embed(said) == (everything, 0, 0) and f"image_size changed: {everything}" in said
    said = runs.run(changed)
    assert to_embed(said) == (everything, 0, 0)
    weights = Path(changed.embed.autoregressive) / "model.safetensors"
    tensors = load_file(weights)
    for part, of_generation in (("layers.0.mlp.up_proj", 0), ("visual.blocks.0.mlp.up_proj", everything)):
        name = next(name for name in tensors if part in name)
        tensors[name].flatten()[0] += 1
        save_file(tensors, weights, {"format": "pt"})
        said = runs.run(changed)
        # Generation's embeddings come from the vision tower alone.
        expected = of_generation if changed.stage == "embed_generation" else everything
        assert to_embed(said) == (expected, everything - expected, 0)
        assert ("encoder changed" in said) == bool(expected)


def test_damage_is_found_repaired_and_never_copied(
    whole: Any, changed: EmbedStageConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = changed.artifact_dir
    assert main(["verify", str(artifact)]) == 0
    shard = artifact / "train" / "000001.tar"
    content = bytearray(shard.read_bytes())
    place = index_shard(shard)[1]["safetensors"]
    content[place[0] + place[1] - 9] ^= 1
    shard.write_bytes(content)
    (artifact / "train" / "000002.tar").write_bytes((artifact / "train" / "000002.tar").read_bytes()[:9000])
    capsys.readouterr()
    assert main(["verify", str(artifact)]) == 1
    found = capsys.readouterr().out
    assert "train/000001.tar holds other bytes" in found and "train/000002.tar holds 9000 bytes instead of" in found
    assert main(["repair", str(artifact)]) == 0
    said = capsys.readouterr().out
    assert "train/000001.tar: 2 samples kept, 1 lost" in said and "lost: split train key 000000004 id train-4" in said
    assert main(["verify", str(artifact)]) == 0
    lost = len(Manifest.load(artifact).details["lost"])
    assert to_embed(runs.run(changed)) == (lost, NUM_TRAIN + NUM_HELDOUT - lost, 0)
    assert runs.contents(changed)["details"] == runs.contents(whole[0])["details"]
    assert verify(artifact).files == verify(whole[0].artifact_dir).files


def test_bad_pictures_are_named_counted_and_stop_the_stage_past_the_rate(changed: EmbedStageConfig) -> None:
    data = Path(changed.data.train).parent
    (data / "train3.png").write_bytes(b"no picture")
    shutil.copyfile(data / "train7.png", data / "whole.png")
    (data / "train7.png").write_bytes((data / "whole.png").read_bytes()[:300])
    runs.run(changed)
    details = Manifest.load(changed.artifact_dir).details
    assert details["rows"]["train"] == {"rows": NUM_TRAIN, "embedded": NUM_TRAIN - 2, "quarantined": 2}
    quarantine = runs.read_jsonl(changed.artifact_dir / "quarantine.jsonl")
    assert [(entry["where"], entry["id"]) for entry in quarantine] == [
        ("train.jsonl:4", "train-3"),
        ("train.jsonl:8", "train-7"),
    ]
    assert all("cannot be read" in entry["reason"] for entry in quarantine)
    assert main(["verify", str(changed.artifact_dir)]) == 0
    # The same rows, named by the doctor: nobody comes across them then.
    named = data / "quarantine.jsonl"
    assert check(["check", str(data / "train.jsonl"), "--quarantine", str(named), "--num-workers", "1"]) == 2
    left_out = elsewhere(changed, Path(changed.runs_dir), max_bad_fraction=0.0, quarantine=[str(named)])
    said = runs.run(left_out, 2)
    assert to_embed(said)[0] == 0 and "16 rows = 14 embedded + 2 quarantined" in said
    assert Manifest.load(left_out.artifact_dir).details["rows"] == details["rows"]
    assert [entry["where"] for entry in runs.read_jsonl(left_out.artifact_dir / "quarantine.jsonl")] == [
        entry["where"] for entry in quarantine
    ]
    shutil.copyfile(data / "whole.png", data / "train7.png")
    strict = elsewhere(changed, Path(changed.runs_dir), max_bad_fraction=0.01)
    ranks = runs.start(strict)
    ranks[0].join(120)
    log = (strict.run_dir / "log" / "rank_0").read_text(encoding="utf-8")
    assert ranks[0].exitcode == 1 and "1 rows could not be embedded, more than the 0.2" in log


def test_a_shard_with_other_bytes_of_the_same_size_is_not_taken_over(changed: EmbedStageConfig) -> None:
    everything = NUM_TRAIN + NUM_HELDOUT
    shard = changed.artifact_dir / "train" / "000001.tar"
    content = bytearray(shard.read_bytes())
    place = index_shard(shard)[1]["safetensors"]
    content[place[0] + place[1] - 9] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"000001\.tar differs from its manifest; .*`nexus-gen shards repair"):
        require_artifact(changed)  # so `nexus-gen run` does not skip it
    runs.write_picture(Path(changed.data.train).parent / "train15.png", seed=1)  # of another shard
    assert to_embed(runs.run(changed)) == (1, everything - 1, 0)
    assert main(["verify", str(changed.artifact_dir)]) == 0
    log = (changed.run_dir / "log" / "rank_0").read_text(encoding="utf-8")
    assert "sample 1 of" in log and "is damaged and will be embedded again" in log


def test_a_raised_version_embeds_all_again(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = whole
    kind = EmbedEditingStage if stage.stage == "embed_editing" else EmbedGenerationStage
    before = kind(stage).recipe()
    monkeypatch.setattr(type(stage), "numerics", stage.numerics + 1)
    assert kind(stage).recipe() == {**before, "code": before["code"] + 1}


@pytest.mark.parametrize("task", ["generation", "editing"])
def test_pictures_become_as_many_tokens_as_the_checkpoint_makes(
    task: str, inputs: Path, data: Path, tmp_path: Path
) -> None:
    model = load_autoregressive(inputs / "qwen", dtype=torch.float32, num_target_tokens=25)
    save_autoregressive(model, tmp_path / "qwen", processor_from=inputs / "qwen")
    model.config.save_pretrained(tmp_path / "qwen")  # nested, where the released one is flat
    predicted = {"predicted": True} if task == "generation" else {}
    checkpoint = str(tmp_path / "qwen")
    stage = runs.config(inputs, data / task, tmp_path, f"embed_{task}", autoregressive=checkpoint, **predicted)
    runs.run(stage)
    details = verify(stage.artifact_dir).details
    assert details["spec"]["num_target_tokens"] == details["recipe"]["num_target_tokens"] == 25
    assert details["spec"]["embed_dim"] == model.config.text_config.hidden_size
    path = stage.artifact_dir / "train" / "000000.tar"
    sample = read_sample(path, index_shard(path)[0])
    names = ["target_embeds", "predicted_embeds" if task == "generation" else "source_embeds"]
    assert [sample[name].shape[0] for name in names] == [25, 25 if task == "generation" else 324]


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.02), ("float8_e4m3fn", 0.04)])
def test_eight_bits_and_predicted_embeddings(
    dtype: str, error: float, inputs: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured relative errors: 0.8% (int8) and 2.6% (float8)."""
    exact = runs.config(inputs, data / "generation", tmp_path / "exact", dtype="float32", predicted=True)
    small = runs.config(inputs, data / "generation", tmp_path / "small", dtype=dtype, predicted=True, num_workers=1)
    for stage in (exact, small):
        runs.run(stage)
        assert main(["verify", str(stage.artifact_dir)]) == 0
    details = Manifest.load(small.artifact_dir).details
    true, stored = (
        [
            read_sample(path, member)
            for path in sorted(stage.artifact_dir.glob("*/*.tar"))
            for member in index_shard(path)
        ]
        for stage in (exact, small)
    )
    assert len(true) == len(stored) == NUM_TRAIN + NUM_HELDOUT
    for name in ("target_embeds", "predicted_embeds"):
        both = [(one[name].double(), other[name].double()) for one, other in zip(true, stored, strict=True)]
        relative = [float((other - one).norm() / one.norm()) for one, other in both]
        cosine = [float((one * other).sum(1).div(one.norm(dim=1) * other.norm(dim=1)).mean()) for one, other in both]
        assert 0 < max(relative) < error
        measured = details["storage_error"][name]
        assert measured["relative_rms"] == pytest.approx(sum(relative) / len(relative), rel=1e-5)  # six digits are kept
        assert measured["cosine"] == pytest.approx(sum(cosine) / len(cosine), rel=1e-5)
    gaps: dict[str, list[float]] = {"cosine": [], "mse": []}
    for path in sorted(exact.artifact_dir.glob("*/*.tar")):
        for members in index_shard(path):
            sample = read_sample(path, members)
            pairs = list(zip(sample["predicted_embeds"].double(), sample["target_embeds"].double(), strict=True))
            gaps["mse"].append(sum(float(((one - two) ** 2).mean()) for one, two in pairs) / len(pairs))
            cosines = [float(one @ two / (one @ one).sqrt() / (two @ two).sqrt()) for one, two in pairs]
            gaps["cosine"].append(sum(cosines) / len(pairs))
    (logged,) = read_metrics(exact.run_dir)
    for name, values in gaps.items():
        assert logged[f"gap/{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4), name
        assert details["gap"][name] == pytest.approx(logged[f"gap/{name}"], rel=1e-4), name  # before they are stored
    assert main(["stats", str(small.artifact_dir)]) == 0
    page = tmp_path / "page.html"
    assert main(["show", str(small.artifact_dir), "--rows", str(small.data.train), "--out", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("data:image/jpeg;base64,") >= NUM_TRAIN
    (small.run_dir / "config.yaml").write_text("data: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml does not say what data\.train was; give --rows"):
        main(["show", str(small.artifact_dir), "--out", str(page)])


def test_the_loader_draws_predicted_embeddings_by_seed_epoch_and_sample(
    inputs: Path, data: Path, tmp_path: Path
) -> None:
    stage = runs.config(inputs, data / "generation", tmp_path, dtype="float32", predicted=True)
    runs.run(stage)

    def drawn(fraction: float, world_size: int = 1, seed: int = 3) -> dict[tuple[int, int], torch.Tensor]:
        """(epoch, index) -> target embeddings over three epochs of all ranks."""
        found = {}
        for rank in range(world_size):
            loader = ShardLoader(
                stage.artifact_dir, "train", micro_batch_size=4 // world_size, accumulation=1, rank=rank,
                world_size=world_size, seed=seed, num_workers=0, predicted_fraction=fraction,
            )  # fmt: skip
            for batch in islice(iter(loader), 3 * NUM_TRAIN // 4):
                assert "predicted_embeds" not in batch
                for epoch, index, embeds in zip(batch["epoch"], batch["index"], batch["target_embeds"], strict=True):
                    found[int(epoch), int(index)] = embeds
        return found

    true, predicted, mixed = drawn(0.0), drawn(1.0), drawn(0.5)
    assert len(mixed) == 3 * NUM_TRAIN
    is_predicted = {place: torch.equal(embeds, predicted[place]) for place, embeds in mixed.items()}
    assert all(torch.equal(embeds, (predicted if is_predicted[p] else true)[p]) for p, embeds in mixed.items())
    # Where samples are drawn predicted depends on nothing else, so that it is the same in every version.
    draws = {place: np.random.default_rng((3, *place, 1)).random() < 0.5 for place in mixed}
    assert is_predicted == draws and sum(draws.values()) == 29
    paths = sorted((stage.artifact_dir / "train").glob("*.tar"))
    stored = [read_sample(path, member) for path in paths for member in index_shard(path)]
    assert all(torch.equal(embeds, stored[index]["target_embeds"]) for (_, index), embeds in true.items())
    assert all(torch.equal(embeds, stored[index]["predicted_embeds"]) for (_, index), embeds in predicted.items())
    assert len({tuple(is_predicted[epoch, index] for index in range(NUM_TRAIN)) for epoch in range(3)}) == 3
    again = drawn(0.5, world_size=2)
    assert all(torch.equal(embeds, mixed[place]) for place, embeds in again.items()) and again.keys() == mixed.keys()
