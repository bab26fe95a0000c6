"""The weights in weights/shapes: whole, small, and as good as their scores say, on this machine."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from runs import losses, run_arguments, succeed

from data.messages.rows import read_rows
from data.shapes.contents import ShapesConfig
from data.shapes.dataset import draw_rows
from launch.compose import Override
from launch.run import compose_pipeline
from nexus_gen.artifacts.artifact import Manifest, verify
from nexus_gen.parts.lineage import evaluations_of, parts_of
from nexus_gen.parts.models import DECODER_KINDS, SHIPPED_RUN, ModelPaths
from nexus_gen.pictures.images import open_image
from nexus_gen.tensors.headers import read_header
from train.decoders.stage import build_initial_decoder
from train.runs.directory import load_config
from train.schemas.decoders import DecoderConfig
from train.schemas.standins import ShapesStageConfig

pytestmark = pytest.mark.slow
STAGES = ("shapes", "standins", "pretrain", *DECODER_KINDS)
MAX_BYTES = 24_000_000
NUM_SCORED = 16  # rows of each task
NUM_DRAWN = 40


def test_checksums_hold_and_all_is_small() -> None:
    whole = verify(SHIPPED_RUN)
    for stage in STAGES:
        assert verify(SHIPPED_RUN / stage / "artifact").details["shipped"]["of"] == whole.inputs[stage]
    lineage = whole.details["stages"]
    assert {*STAGES} <= lineage.keys()
    assert all(facts["seconds"] > 0 and facts["code"]["commit"] for facts in lineage.values())
    assert whole.details["made_by"].startswith("nexus-gen run pipeline=shapes") and whole.details["hardware"]
    files = [SHIPPED_RUN / name for name in whole.files]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert {header.dtype for file in weights for header in read_header(file).values()} <= {"F16", "BF16", "I64"}


def test_its_rows_are_the_first_of_the_recipe(tmp_path: Path) -> None:
    config = load_config(SHIPPED_RUN / "shapes")
    assert isinstance(config, ShapesStageConfig)
    recipe = dataclasses.replace(config.shapes, num_train=1, num_heldout=NUM_DRAWN, num_compositional=NUM_DRAWN)
    assert isinstance(recipe, ShapesConfig)
    draw_rows(tmp_path, recipe, config.seed, num_workers=1)
    for split in ("heldout", "compositional"):
        drawn = {row.id: row for row in read_rows(tmp_path / f"{split}.jsonl")}
        shipped = {row.id: row for row in read_rows(SHIPPED_RUN / "shapes" / "artifact" / f"{split}.jsonl")}
        assert len(drawn.keys() & shipped.keys()) > NUM_DRAWN / 2
        for name in drawn.keys() & shipped.keys():
            assert (drawn[name].messages, drawn[name].truth) == (shipped[name].messages, shipped[name].truth)
            for one, other in zip(drawn[name].images, shipped[name].images, strict=True):
                assert np.array_equal(open_image(one), open_image(other))


def test_a_sample_scores_what_is_stated(tmp_path: Path) -> None:
    parts = parts_of({kind: ModelPaths.find(SHIPPED_RUN, decoder=kind) for kind in DECODER_KINDS})
    current, stale = evaluations_of(SHIPPED_RUN, parts)
    assert {evaluation.split for evaluation in current} >= {"heldout", "compositional"} and not stale
    stated = next(evaluation.scores for evaluation in current if evaluation.split == "heldout")
    tasks = ("understanding", "generation", "editing")
    arguments = ("--num", str(NUM_SCORED), "--tasks", *tasks, "--device", "cpu")
    succeed("evaluate", SHIPPED_RUN, *arguments, "--output", tmp_path / "sample")
    scores = json.loads((tmp_path / "sample" / "scores.json").read_text(encoding="utf-8"))
    for name in (*(f"{task}/overall" for task in tasks), "editing/outside_psnr"):
        # Two intervals of 95% that do not meet are no chance.
        assert scores[name]["low"] <= stated[name]["high"], name
        assert scores[name]["high"] >= stated[name]["low"], name


def test_training_goes_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHIPPED_RUN.parents[1])  # configs name the weights from the checkout
    configs = {config.stage: config for config in compose_pipeline("demo", [Override.parse("name=demo")])}
    for kind in DECODER_KINDS:
        config = configs[kind]
        assert isinstance(config, DecoderConfig)
        details = Manifest.load(SHIPPED_RUN / kind / "artifact").details
        assert dataclasses.asdict(config.model.transformer) == details["transformer"]
        build_initial_decoder(config, details["embed_dim"])  # strictly
    run = tmp_path / "run"
    rows = SHIPPED_RUN / "shapes" / "artifact"
    small = ["trainer.max_steps=2", "trainer.log_every_steps=1", "heldout.num_samples=2", "data=messages"]
    data = [f"data.train={rows / 'heldout.jsonl'}", f"data.heldout={rows / 'compositional.jsonl'}"]
    size = ["data.max_pixels=5184", "data.max_length=1024", "launch.device=cpu"]
    arguments = run_arguments(run, "stage=pretrain", "experiment=finetune_pretrain", *small, *data, *size)
    said = succeed(*arguments, "data.rehearsal=0.25")
    # 300 own rows and a third of their number on top, out of the 600 that ship.
    assert "rehearsal: 100 of 400 rows of an epoch are of what the initial checkpoint was trained on" in said
    details = Manifest.load(run / "pretrain" / "artifact").details
    assert details["rows"]["train"] == {"rows": 300, "used": 300, "quarantined": 0, "rehearsal": 600}
    logged = losses(run / "pretrain")
    # It knows these rows: random weights start above 3.
    assert logged[1, "train/text_loss"] < 0.5
