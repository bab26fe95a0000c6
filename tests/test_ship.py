"""`nexus-gen models ship`: what is cut from a run, what is not, and what can be done with the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pages import Page
from runs import STEPS, TRAINED, copy_run, losses, nexus_gen, stage_arguments, succeed
from runs import weights as weights_of
from safetensors.torch import save_file

from nexus_gen.artifacts.artifact import Manifest, verify
from nexus_gen.specs.errors import UserError
from train.runs.directory import load_config
from train.ship import in_half_precision

pytestmark = pytest.mark.slow
SAID = ("--made-by", "nexus-gen run pipeline=tiny", "--hardware", "two cores")
NUM_ROWS = 2


@pytest.fixture(scope="module")
def shipped(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared run as it ships."""
    output = tmp_path_factory.mktemp("weights") / "tiny"
    succeed("models", "ship", tiny_run, "--output", output, "--num-rows", str(NUM_ROWS), *SAID)
    return output


def test_what_ships_is_a_run_whose_checksums_hold(shipped: Path, tiny_run: Path) -> None:
    whole = verify(shipped)
    assert (whole.kind, whole.details["made_by"], whole.details["hardware"]) == ("shipped_run", SAID[1], SAID[3])
    for stage in ("shapes", "standins", *TRAINED):
        made, left = Manifest.load(tiny_run / stage / "artifact"), verify(shipped / stage / "artifact")
        assert (left.kind, left.config, left.inputs, left.code) == (made.kind, made.config, made.inputs, made.code)
        assert left.details["shipped"]["of"] == made.fingerprint == whole.inputs[stage]
        assert whole.details["stages"][stage]["seconds"] > 0
    # Stages that left nothing are told of, too.
    assert whole.details["stages"]["embed_editing"]["inputs"]["embed.autoregressive"]
    for path in shipped.rglob("*"):
        assert path.is_dir() or str(tiny_run.parent) not in path.read_text(encoding="utf-8", errors="ignore"), path


def test_no_tensor_ships_twice_and_none_is_wider_than_two_bytes(shipped: Path, tiny_run: Path) -> None:
    files = {str(path.relative_to(shipped)) for path in shipped.rglob("*.safetensors")}
    flux = "standins/artifact/FLUX.1-dev"
    assert files == {
        *(f"{flux}/{name}" for name in ("ae.safetensors", "text_encoder/model.safetensors")),
        f"{flux}/text_encoder_2/model.safetensors",
        "pretrain/artifact/model.safetensors",
        "generation_decoder/artifact/generation_decoder.safetensors",
        "editing_decoder/artifact/edit_decoder.safetensors",
    }
    for stage in TRAINED:
        made, left = weights_of(tiny_run / stage), weights_of(shipped / stage)
        assert made.keys() == left.keys()
        for name, tensor in left.items():
            assert tensor.dtype == torch.float16
            # Rounding to 11 bits; below 6e-5 float16 has fewer.
            torch.testing.assert_close(tensor.float(), made[name].float(), rtol=2**-11, atol=2**-25)


def test_rows_ship_with_their_pictures(shipped: Path, tiny_run: Path) -> None:
    for split in ("heldout", "compositional"):
        lines = (shipped / "shapes" / "artifact" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        tasks = [row["truth"]["task"] for row in rows]
        assert all(tasks.count(task) <= NUM_ROWS for task in tasks) and len(set(tasks)) >= 2
        assert all(image.startswith("data:image/png;base64,") for row in rows for image in row["images"])


def test_a_shipped_run_is_evaluated_and_reported_on_and_ships_with_its_scores(shipped: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored" / "heldout"
    succeed("evaluate", shipped, "--output", output, "--num", "1", "--num-inference-steps", "1", "--device", "cpu")
    page = tmp_path / "report.html"
    succeed("report", shipped, "--output", page, "--num-samples", "1", "--device", "cpu")
    text = page.read_text(encoding="utf-8")
    assert "What training began with is not there any more" in text
    assert Page(text).tags["img"] == 3 + 4 + 1  # generation, editing, understanding: none of before
    # From what was shipped it ships again; other weights refuse the scores.
    again = ("models", "ship", shipped, "--num-rows", str(NUM_ROWS), *SAID)
    ended = nexus_gen(*again, "--output", tmp_path / "other", "--scores", output)
    assert ended.returncode == 2 and "are of other weights than these" in ended.stderr
    assert not (tmp_path / "other").exists()


def test_the_same_run_ships_to_the_same_weights_which_its_scores_are_of(
    shipped: Path, tiny_run: Path, tmp_path: Path
) -> None:
    evaluation = tmp_path / "scored"
    succeed("evaluate", shipped, "--output", evaluation, "--tasks", "understanding", "--num", "1", "--device", "cpu")
    output = tmp_path / "again"
    succeed("models", "ship", tiny_run, "--output", output, "--scores", evaluation, "--num-rows", "1", *SAID)
    scores = json.loads((output / "evaluation" / "heldout" / "scores.json").read_text(encoding="utf-8"))
    assert scores == verify(evaluation).details["scores"]
    for stage in TRAINED:
        same = [Manifest.load(run / stage / "artifact").fingerprint for run in (shipped, output)]
        assert same[0] == same[1]


def test_too_large_a_run_is_refused_and_nothing_is_replaced(shipped: Path, tiny_run: Path, tmp_path: Path) -> None:
    output = shutil.copytree(shipped, tmp_path / "tiny")
    ended = nexus_gen("models", "ship", tiny_run, "--output", output, "--max-mb", "1", *SAID)
    assert ended.returncode == 2 and "are more than --max-mb 1" in ended.stderr
    assert verify(output).created_at == verify(shipped).created_at
    taken = nexus_gen("models", "ship", shipped, "--output", tiny_run, *SAID)
    assert taken.returncode == 2 and "holds other files" in taken.stderr


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    save_file({"small": torch.ones(2), "large": torch.tensor([1.0, 7e4])}, tmp_path / "in.safetensors")
    with pytest.raises(UserError, match=r"large reaches 7e\+04, which float16 cannot hold"):
        in_half_precision(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "float16")
    lost = in_half_precision(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "bfloat16")
    assert lost["bfloat16"].tensor == "large" and 0 < lost["bfloat16"].error < 2**-8


def test_configs_of_earlier_versions_are_read(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run")
    path = run / "pretrain" / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    del values["data"]["token_budget"]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert load_config(run / "pretrain") == load_config(run / "pretrain").with_steps(0)


def test_every_stage_goes_on_from_what_ships(shipped: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run", "standins", *TRAINED)
    flux = f"model.flux={shipped / 'standins' / 'artifact' / 'FLUX.1-dev'}"
    qwen = f"model.qwen={shipped / 'pretrain' / 'artifact'}"
    starts = {
        "pretrain": (qwen,),
        "generation_decoder": (flux, f"init.decoder={shipped / 'generation_decoder' / 'artifact'}"),
        "editing_decoder": (
            flux,
            qwen,
            f"init.decoder={shipped / 'editing_decoder' / 'artifact'}",
            "init.transformer=",
        ),
    }
    for stage, overrides in starts.items():
        succeed(*stage_arguments(run, stage, *overrides))
        assert {step for step, name in losses(run / stage) if name == "train/loss"} == {2, 4, STEPS}
    # The finetuned run finds FLUX's autoencoder where its decoders found it.
    one_step = ("--num-inference-steps", "1", "--device", "cpu")
    succeed("generate", "--run", run, "--prompt", "x", "--result-path", tmp_path / "x.png", *one_step)
