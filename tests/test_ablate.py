"""Ablations through the console script: arms of a tiny run, their result, plot and table."""

import json
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from runs import STEPS, losses, nexus_gen, started, succeed, wait_for

from nexus_gen.artifacts.artifact import Manifest
from train.report.ablation import run_facts

pytestmark = pytest.mark.slow
SMALLEST = (
    *("model=tiny", "optim=tiny_decoder", "trainer=tiny_decoder", "launch.device=cpu"),
    *("trainer.max_steps=2", "trainer.micro_batch_size=2", "trainer.global_batch_size=4", "optim.warmup_steps=0"),
    *("heldout.every_steps=1", "heldout.num_samples=2", "samples.num_pictures=0"),
)


@dataclass
class Trained:
    """Both arms of an ablation of `run`, side by side, in `output`; what their command printed."""

    run: Path
    output: Path
    command: list[str | Path]
    printed: str


@pytest.fixture(scope="session")  # the tests of this file do not all follow one another
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    output = tmp_path_factory.mktemp("ablations")
    command = ["ablate", "reference", "--run", tiny_run, "--output", output, "--jobs", "2", *SMALLEST]
    return Trained(tiny_run, output, command, succeed(*command))


arms = pytest.mark.xdist_group("arms of an ablation")  # one process trains them


@arms
def test_arms_side_by_side_become_a_result_a_plot_and_a_table(trained: Trained) -> None:
    tmp_path, command, printed = trained.output, trained.command, trained.printed
    result = json.loads((tmp_path / "reference.json").read_text(encoding="utf-8"))
    assert list(result["arms"]) == ["with_reference", "without"]
    for name, arm in result["arms"].items():
        assert arm["differs"] == {"editing_decoder.objective.reference": name == "with_reference"}
        facts = arm["seeds"]["42"]
        assert facts["steps"] == 2 and facts["seconds"] > 0
        assert [step for step, _ in facts["heldout"]["heldout/loss"]] == [1, 2]
        assert facts["final"]["heldout/loss"] == facts["heldout"]["heldout/loss"][-1][1]
        made = Manifest.load(tmp_path / "reference" / name / "seed42" / "editing_decoder" / "artifact")
        assert facts["lineage"]["editing_decoder"]["artifact"] == made.fingerprint
        assert f"| {facts['final']['heldout/loss']:.4g} " in printed
    assert str(tmp_path) not in json.dumps(result)
    logs = [tmp_path / "reference" / name / "seed42.log" for name in result["arms"]]
    assert all("editing_decoder: done" in log.read_text(encoding="utf-8") for log in logs)

    succeed(*command)
    assert all("editing_decoder: unchanged, skipped" in log.read_text(encoding="utf-8") for log in logs)
    assert json.loads((tmp_path / "reference.json").read_text(encoding="utf-8")) == result

    plot = tmp_path / "reference.png"
    before = plot.read_bytes()
    plot.unlink()
    succeed("ablate", "plot", tmp_path / "reference.json")
    assert plot.read_bytes() == before
    with Image.open(plot) as image:
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 16) or []) > 10


@arms
def test_an_arm_that_fails_is_named_and_the_others_are_compared(trained: Trained, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained.output, tmp_path / "ablations"))
    stage = output / "reference" / "with_reference" / "seed42" / "editing_decoder"
    shutil.rmtree(stage / "artifact")
    of_another = {"config": {"seed": 7}, "inputs": {}}
    (stage / "checkpoints" / "identity.json").write_text(json.dumps(of_another), encoding="utf-8")
    ended = nexus_gen("ablate", "reference", "--run", trained.run, "--output", output, *SMALLEST)
    assert ended.returncode == 2, ended.stderr
    assert "belong to an unfinished try with another" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("not finished: reference/with_reference/seed42; the same command")
    result = json.loads((output / "reference.json").read_text(encoding="utf-8"))
    assert list(result["arms"]) == ["without"] and "| without |" in ended.stdout


@pytest.mark.parametrize(("number", "in_training"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
def test_arms_end_with_the_command(number: signal.Signals, in_training: bool, tiny_run: Path, tmp_path: Path) -> None:
    command = ["ablate", "reference", "--run", tiny_run, "--output", tmp_path, *SMALLEST, "trainer.max_steps=1000000"]
    stage = tmp_path / "reference" / "with_reference" / "seed42" / "editing_decoder"
    with started(list(map(str, command)), tmp_path / "output") as ablate:

        def worker_is_there() -> bool:
            for process in ablate.children(recursive=True):
                with suppress(psutil.Error):  # it may have ended meanwhile
                    words = process.cmdline()
                    if "train.worker" in words and "train.torchrun" not in words:
                        return True
            return False

        wait_for((lambda: len(losses(stage)) > 0) if in_training else worker_is_there, ablate, tmp_path / "output")
        processes = ablate.children(recursive=True)
        assert len(processes) >= 3  # the arm, torchrun and its worker
        ablate.send_signal(number)
        _, alive = psutil.wait_procs(processes, timeout=120)
        assert alive == []
        assert ablate.wait() == (-number if number == signal.SIGKILL else 3)
    assert len(list((stage / "checkpoints").glob("step_*"))) == in_training  # it goes on from there
    assert not (tmp_path / "reference" / "without").exists()


def test_what_an_arm_cannot_train_on_is_told_before_any_arm_starts(tiny_run: Path, tmp_path: Path) -> None:
    """The shards of this run hold no predicted embeddings."""
    ended = nexus_gen("ablate", "conditioning", "--run", tiny_run, "--output", tmp_path, *SMALLEST)
    assert ended.returncode == 2
    assert "hold true embeddings only" in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_what_earlier_stages_logged_is_compared_too(tiny_run: Path) -> None:
    facts = run_facts(tiny_run, ["pretrain", "embed_generation", "generation_decoder"])
    assert facts["final"]["pretrain.heldout/text_loss"] > 0 and facts["final"]["heldout/loss"] > 0
    assert [step for step, _ in facts["heldout"]["pretrain.heldout/text_loss"]] == [4, STEPS]
    assert facts["steps"] == STEPS and len(facts["lineage"]) == 3


def test_a_metric_that_an_arm_lacks_is_left_out_and_named(tmp_path: Path) -> None:
    def seed(**final: float) -> dict[str, Any]:
        return {
            "seconds": 1,
            "steps": 4,
            "final": final,
            "heldout": {name: [[4, value]] for name, value in final.items()},
        }

    arms = {
        "one": {"seeds": {"42": seed(loss=1.0, rate=0.5), "43": seed(loss=2.0, rate=0.5)}},
        "two": {"seeds": {"42": seed(loss=4.0)}},
    }
    result = {"ablation": "x", "question": "Which?", "metrics": {"loss": "the loss", "rate": "the rate"}, "arms": arms}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    ended = nexus_gen("ablate", "plot", path)
    assert ended.returncode == 0 and "rate is left out" in ended.stderr
    assert "| one | 1.5 (1 to 2) | 4     | 1       |" in ended.stdout and "the rate" not in ended.stdout
    # What is none, and a plan, whose arms are elsewhere.
    plan = {**result, "stages": [], "arms": {"one": {"seeds": {"42": "one"}}}}
    for text in ("{", "[1]", '{"scores": {}}', *map(json.dumps, (plan, {**result, "arms": {}}, {**result, "arms": 1}))):
        (tmp_path / "no.json").write_text(text, encoding="utf-8")
        ended = nexus_gen("ablate", "plot", tmp_path / "no.json")
        assert ended.returncode == 2 and len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    result["metrics"] = {"rate": "the rate"}
    path.write_text(json.dumps(result), encoding="utf-8")
    assert nexus_gen("ablate", "plot", path).returncode == 2
