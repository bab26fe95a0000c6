"""What the stages of a real run log stands in the table of docs/evaluation.md, and is what the table says."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from heldout_by_hand import heldout_by_hand
from runs import STEPS, TRAINED, losses
from safetensors import safe_open

from data.mixture.order import Mixture
from data.shards.files import ShardSpec
from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.decoders.checkpoint import load_decoder
from nexus_gen.language.checkpoint import load_autoregressive, load_processor
from nexus_gen.language.conversation import encode
from nexus_gen.parts.models import DECODER_FILES
from nexus_gen.pictures.images import open_image
from train.decoders.stage import meta_decoder
from train.runs.directory import load_config
from train.schemas.decoders import DecoderConfig
from train.schemas.pretrain import PretrainConfig
from train.steps.average import FILES
from train.steps.metrics import read_metrics

REPOSITORY = Path(__file__).parents[3]
PLACEHOLDERS = {"TASK": "(understanding|generation|editing|text)", "tN": r"t\d+"}
STAGES = {"pretrain": ["pretrain"], "decoders": ["generation_decoder", "editing_decoder"], "all that train": [*TRAINED]}
STAGES["embedding stages"] = ["embed_generation", "embed_editing"]
STAGES["all"] = [*STAGES["all that train"], *STAGES["embedding stages"]]


def table() -> list[list[str]]:
    """What the documentation says of training, without the table's head: the cells of each row."""
    section = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8").split("\n### Training\n")[1]
    lines = section[section.index("\n|") + 1 :].splitlines()
    rows = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def listed(stage: str) -> list[str]:
    """A pattern of every figure that the table gives a stage."""
    patterns = []
    for figures, stages, *_ in table():
        for name in re.findall(r"`([^`]+)`", figures) if stage in STAGES[stages] else []:
            for placeholder, pattern in PLACEHOLDERS.items():
                name = name.replace(placeholder, pattern)
            patterns.append(name)
    return patterns


def test_each_figure_has_a_definition_and_tests_that_exist() -> None:
    rows = table()
    assert len(rows) > 15
    for figures, _, definition, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert len(definition) > 20 and named, figures
        for file, test in named:
            assert f"\ndef {test}(" in (REPOSITORY / file).read_text(encoding="utf-8"), (figures, file, test)
    for stage in STAGES["all"]:
        assert len(set(listed(stage))) == len(listed(stage)), "a figure that is defined twice"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES["all"])
def test_whatever_a_run_logs_is_listed(tiny_run: Path, stage: str) -> None:
    rows = read_metrics(tiny_run / stage)
    assert rows and all({"step", "time"} <= row.keys() for row in rows)
    logged = {name for row in rows for name in row}
    patterns = listed(stage)
    assert {name for name in logged if not any(re.fullmatch(pattern, name) for pattern in patterns)} == set()
    if stage in TRAINED:
        assert {"train/loss", "train/lr", "perf/samples_per_s", "perf/eta_s"} <= logged
        assert any(name.startswith("heldout/") for name in logged)
    (timing,) = map(json.loads, (tiny_run / stage / "timing.jsonl").read_text(encoding="utf-8").splitlines())
    assert timing.keys() == {"seconds", "processes", "status"}
    assert timing["seconds"] > max(row["time"] for row in rows) - min(row["time"] for row in rows)


@pytest.mark.slow
def test_pretraining_follows_its_schedule(tiny_run: Path) -> None:
    """Two steps of warmup from 0, then half a cosine over the other four; what steps 2, 4 and 6 used."""
    rates = {step: value for (step, name), value in losses(tiny_run / "pretrain").items() if name == "train/lr"}
    peak = load_config(tiny_run / "pretrain").optim.learning_rate  # type: ignore[attr-defined]
    after = {step: (1 + math.cos(math.pi * (step - 1 - 2) / (STEPS - 2))) / 2 for step in (4, 6)}
    assert rates == pytest.approx({2: peak / 2, 4: peak * after[4], 6: peak * after[6]})


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES["embedding stages"])
def test_embedding_is_as_fast_as_its_rows_and_seconds_say(tiny_run: Path, stage: str) -> None:
    """Rows over the rate are seconds within those of the whole stage."""
    (row,) = read_metrics(tiny_run / stage)
    (timing,) = map(json.loads, (tiny_run / stage / "timing.jsonl").read_text(encoding="utf-8").splitlines())
    listings = (tiny_run / stage / "artifact").glob("*/*.json")
    embedded = sum(len(json.loads(path.read_text(encoding="utf-8"))["samples"]) for path in listings)
    assert embedded > 5 and 0.05 < embedded / row["perf/samples_per_s"] < timing["seconds"]


@pytest.mark.slow
def test_the_last_heldout_figures_are_those_of_the_exported_weights(tiny_run: Path) -> None:
    """By inference's own reading of the rows, one after the other. The average is exported, which no step has made."""
    stage = tiny_run / "pretrain"
    config = load_config(stage)
    assert isinstance(config, PretrainConfig) and config.average.export == "average"
    processor = load_processor(stage / "artifact")
    model = load_autoregressive(stage / "artifact", dtype=torch.float32).eval()
    (shares,) = (stage / "checkpoints" / f"checkpoint-{STEPS}").glob(FILES)
    with safe_open(shares, "pt") as average:
        parameters = dict(model.named_parameters())
        assert average.keys() and all(
            torch.equal(average.get_tensor(name), parameters[name].detach().flatten())
            for name in average.keys()  # noqa: SIM118
        )
    heldout = Mixture(config.data.heldout, 0)
    errors = []
    for position in range(config.heldout.num_samples):
        row = heldout.row(heldout.draw(position))
        pictures = [open_image(image) for image in row.images]
        inputs = encode(processor, row.messages, pictures, config.data.max_pixels)
        if not (inputs["labels"] != -100).any():
            continue
        batched = {name: inputs[name][None] for name in ("input_ids", "labels")}
        with torch.no_grad():
            made = model(**batched, **{name: inputs[name] for name in ("pixel_values", "image_grid_thw")})
        errors += (made.predicted_embeds - made.target_embeds).square().mean(dim=1).tolist()
    found = losses(stage)
    assert errors and found[STEPS, "heldout/image_mse"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES["decoders"])
def test_the_last_heldout_loss_is_that_of_the_exported_decoder(tiny_run: Path, stage: str) -> None:
    config = load_config(tiny_run / stage)
    assert isinstance(config, DecoderConfig) and config.average.export == "average"
    decoder = meta_decoder(config, ShardSpec.load(Manifest.load(config.shards)).embed_dim)
    load_decoder(decoder, tiny_run / stage / "artifact" / DECODER_FILES[config.kind])
    found = losses(tiny_run / stage)[STEPS, "heldout/loss"]
    assert found == pytest.approx(heldout_by_hand(decoder.eval(), config), rel=1e-4)
