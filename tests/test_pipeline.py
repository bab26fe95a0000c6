"""The tiny pipeline through the console script, from nothing to a report and pictures."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from pages import Page
from PIL import Image
from runs import (
    SMALLEST,
    STAGES,
    STEPS,
    TRAINED,
    copy_run,
    interrupt,
    losses,
    nexus_gen,
    run_arguments,
    stage_arguments,
    succeed,
)

from nexus_gen.artifacts.artifact import Manifest, verify
from nexus_gen.specs.errors import UserError

pytestmark = pytest.mark.slow


def run_again(run: Path, *overrides: str) -> tuple[list[str], list[str]]:
    """Run the pipeline once more: the stages that ran, and those that were skipped."""
    printed = succeed(*run_arguments(run, "pipeline=tiny", *SMALLEST, *overrides))
    ran = re.findall(r"^(\w+): done", printed, re.MULTILINE)
    return ran, re.findall(r"^(\w+): unchanged, skipped", printed, re.MULTILINE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_a_verified_artifact_and_a_record(stage: str, tiny_run: Path) -> None:
    manifest = verify(tiny_run / stage / "artifact")
    assert manifest.stage == stage and manifest.files
    config = yaml.safe_load((tiny_run / stage / "config.yaml").read_text(encoding="utf-8"))
    assert config["stage"] == stage and config["name"] == tiny_run.name
    environment = json.loads((tiny_run / stage / "environment.json").read_text(encoding="utf-8"))
    assert manifest.code == environment and environment["packages"]["torch"]
    # Artifacts can be moved: nothing in them says where they were made.
    for path in (tiny_run / stage / "artifact").rglob("*.json*"):
        assert str(tiny_run) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("stage", TRAINED)
def test_losses_are_finite(stage: str, tiny_run: Path) -> None:
    logged = losses(tiny_run / stage)
    assert {step for step, name in logged if name == "train/loss"} == {2, 4, STEPS}
    assert all(map(math.isfinite, logged.values()))


def test_the_same_command_skips_every_stage(tiny_run: Path) -> None:
    assert run_again(tiny_run) == ([], list(STAGES))


def test_a_changed_value_runs_its_stage_and_what_reads_from_it(tiny_run: Path, tmp_path: Path) -> None:
    # The editing decoder starts from the generation decoder's transformer.
    run = copy_run(tiny_run, tmp_path / "run")
    ran, skipped = run_again(run, "generation_decoder.optim.learning_rate=0.01")
    assert ran == ["generation_decoder", "editing_decoder"]
    assert skipped == ["shapes", "standins", "pretrain", "embed_generation", "embed_editing"]


def test_from_makes_an_artifact_again_also_after_an_interruption(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run")
    stage = run / "editing_decoder"
    before = Manifest.load(stage / "artifact")
    (stage / "environment.json").unlink()  # it is written when the stage starts
    arguments = run_arguments(run, "pipeline=tiny", *SMALLEST, "from=editing_decoder")
    started = (stage / "environment.json").is_file
    interrupt(arguments, started, signal.SIGKILL, tmp_path / "output")
    assert Manifest.load(stage / "artifact").created_at == before.created_at
    assert run_again(run) == (["editing_decoder"], list(STAGES[:-1]))
    after = Manifest.load(stage / "artifact")
    assert after.created_at > before.created_at
    assert after.fingerprint == before.fingerprint
    assert run_again(run) == ([], list(STAGES))


def test_shards_of_the_other_decoder_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    shards = tiny_run / "embed_generation" / "artifact"
    run = copy_run(tiny_run, tmp_path / "run", "editing_decoder")
    ended = nexus_gen(*stage_arguments(run, "editing_decoder", f"shards={shards}"))
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines() == [
        f"error: the shards in {shards} have num_reference_tokens 0 where this stage needs 324; "
        "give the shards of the embedding stage that belongs to it"
    ]


def test_fewer_samples_than_a_global_batch_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path / "run", "generation_decoder")
    ended = nexus_gen(*stage_arguments(run, "generation_decoder", "trainer.global_batch_size=512"))
    assert ended.returncode == 2
    shards = run / "embed_generation" / "artifact"
    num_samples = sum(shard["samples"] for shard in Manifest.load(shards).details["splits"]["train"])
    assert ended.stderr.strip().splitlines() == [
        f"error: {shards} holds {num_samples} train samples, fewer than one global batch of 512; "
        "lower trainer.global_batch_size or embed more rows"
    ]
    assert not (run / "generation_decoder").exists()


def test_a_flipped_bit_is_found(tiny_run: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(tiny_run / "embed_editing" / "artifact", tmp_path / "artifact")
    shard = artifact / "train" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train/000000.tar differs from its manifest"):
        verify(artifact)


def test_the_report_of_a_moved_run_is_one_page_with_everything_in_it(tiny_run: Path, tmp_path: Path) -> None:
    moved = copy_run(tiny_run, tmp_path / "moved")
    for config in moved.glob("*/config.yaml"):  # as if nothing were left where the run was made
        config.write_text(config.read_text(encoding="utf-8").replace(str(tiny_run.parent), "/nowhere"))
    with open(moved / "generation_decoder" / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        for number, loss in enumerate([3.0, 1.2, 0.8, 0.62, 0.58, 0.54, 0.52, 0.51], start=1):
            metrics.write(json.dumps({"step": 100 * number, "heldout/loss": loss}) + "\n")
    output = tmp_path / "report.html"
    assert str(output) in succeed("report", moved, "--output", output, "--num-samples", "1", "--device", "cpu")
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    # Fragments are the curves' own: matplotlib draws markers and letters once and refers to them.
    assert [url[:60] for url in page.fetched if not url.startswith(("data:", "#"))] == []
    assert "url(http" not in text and "@import" not in text
    assert page.tags["svg"] == 4  # two losses of pretraining, one of each decoder
    assert page.tags["img"] >= 4 + 5 + 1
    for stage in STAGES:
        assert stage in text
    assert "generation_decoder: held-out loss still fell by 18% over the second half (0.62 -&gt; 0.51): more=2x" in text


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_pictures_are_generated_from_a_run_wherever_it_is(tiny_run: Path, tmp_path: Path) -> None:
    generate = ["generate", "--prompt", "a red circle on a white background", "--device", "cpu", "--result-path"]
    succeed(*generate, tmp_path / "one.png", "--run", tiny_run, "--seed", "1")
    moved = copy_run(tiny_run, tmp_path / "copied").rename(tmp_path / "moved")
    succeed(*generate, tmp_path / "again.png", "--run", moved, "--seed", "1")
    succeed(*generate, tmp_path / "other.png", "--run", moved, "--seed", "2")
    one, again, other = (picture(tmp_path / f"{name}.png") for name in ("one", "again", "other"))
    assert one.size == (64, 64)
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_pictures_are_generated_from_chinese_in_other_sizes(tiny_run: Path, tmp_path: Path) -> None:
    result = tmp_path / "new folder" / "圆.jpg"
    sampling = ["--width", "40", "--height", "72", "--num-inference-steps", "1", "--cfg-scale", "2"]
    prompt = ["--prompt", "一个红色的圆", "--language", "zh"]
    succeed("generate", "--run", tiny_run, *prompt, *sampling, "--result-path", result)
    assert picture(result).size == (40, 72)


def test_pictures_of_odd_sizes_are_edited_by_either_decoder(tiny_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    Image.linear_gradient("L").resize((51, 37)).convert("RGBA").save(source)
    edit = ["edit", "--run", tiny_run, "--input-image", source, "--instruction", "make it blue", "--result-path"]
    said = succeed(*edit, tmp_path / "editing.png")
    succeed(*edit, tmp_path / "generation.png", "--use-generation-decoder")
    editing, generation = picture(tmp_path / "editing.png"), picture(tmp_path / "generation.png")
    assert editing.size == generation.size == (76, 55)  # the aspect of 51 x 37 in about 64 * 64 pixels
    assert editing.tobytes() != generation.tobytes()
    assert (
        f"{source}: 51 x 37 is squashed and seen at " in said and "painted at 64 x 64 and stretched to 76 x 55" in said
    )
    wide = tmp_path / "wide.png"
    Image.new("RGB", (90, 40)).save(wide)
    said = succeed(*edit, tmp_path / "two.png", "--input-image", wide, "--size", "input", "--aspect", "pad")
    assert picture(tmp_path / "two.png").size == (90, 40)  # the last picture is the one that is edited
    assert f"{source}: 51 x 37 is seen at " in said and f"{wide}: 90 x 40 is padded to a square" in said


def test_pictures_of_fewer_tokens_are_learned_and_edited(tiny_run: Path, tmp_path: Path) -> None:
    """The generation decoder that is still there paints from more: that is said before anything is loaded."""
    run = copy_run(tiny_run, tmp_path / "run", "pretrain", "embed_editing", "editing_decoder")
    succeed(*stage_arguments(run, "pretrain", "model.num_target_tokens=25", "trainer.max_steps=2"))
    succeed(*stage_arguments(run, "embed_editing"))
    succeed(*stage_arguments(run, "editing_decoder", "trainer.max_steps=1", "samples.num_pictures=0"))
    manifests = {stage: Manifest.load(run / stage / "artifact").details for stage in STAGES[2:]}
    assert manifests["embed_editing"]["spec"]["num_target_tokens"] == 25
    assert [manifests[stage]["num_target_tokens"] for stage in TRAINED[1:]] == [81, 25]
    source, result = tmp_path / "source.png", tmp_path / "result.png"
    Image.linear_gradient("L").save(source)
    succeed("edit", "--run", run, "--input-image", source, "--instruction", "make it blue", "--result-path", result)
    assert picture(result).size == (64, 64)
    refused = nexus_gen("generate", "--run", run, "--prompt", "a red circle")
    assert refused.returncode == 2 and "pretrain/artifact makes pictures of 25 tokens and" in refused.stderr
    assert "paints from 81; give the language model and the decoder of one run" in refused.stderr


def test_questions_about_pictures_are_answered_alike_every_time(tiny_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.png"
    Image.linear_gradient("L").resize((37, 51)).save(source)
    ask = ["understand", "--run", tiny_run, "--input-image", source, "--prompt", "What colour is the circle?"]
    answers = [nexus_gen(*ask, "--max-new-tokens", "8", "--device", "cpu") for _ in range(2)]
    assert [answer.returncode for answer in answers] == [0, 0]
    assert answers[0].stdout == answers[1].stdout
