"""What stage=schedule decided reaches the configs of the other stages, but for what the command line says."""

import json
from pathlib import Path

import pytest

from launch.overrides import Override
from launch.run import compose_pipeline, main
from launch.scheduled import idle_stages, schedule_of, with_schedule
from nexus_gen.artifacts.artifact import Manifest, building, seal
from train.runs.directory import identity
from train.schemas.schedule import SCHEDULE_FILE
from train.schemas.stage import StageConfig

VALUES = {
    "pretrain": {"trainer.max_steps": 321, "optim.learning_rate": 0.0015, "heldout.every_steps": 80},
    "editing_decoder": {"trainer.max_steps": 45, "optim.warmup_steps": 5},
}


def rows(directory: Path, *tasks: str) -> Path:
    contents = {
        "understanding": (["a.png"], "<image> What?", "A dot."),
        "generation": (["a.png"], "A dot.", "<image>"),
        "editing": (["a.png", "a.png"], "<image> Again.", "<image>"),
    }
    (directory / "a.png").write_bytes(b"")  # named, and not opened here
    lines = []
    for number, task in enumerate(tasks * 8):
        images, user, reply = contents[task]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"id": str(number), "source": "own", "images": images, "messages": messages}))
    path = directory / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def composed(directory: Path, data: Path, *given: str) -> tuple[list[StageConfig], list[Override]]:
    place = [f"runs_dir={directory}", "name=own", f"data.train={data}", f"data.heldout={data}"]
    overrides = [Override.parse(text) for text in (*place, *given)]
    return compose_pipeline("finetune", overrides), overrides


def decide(configs: list[StageConfig]) -> None:
    """What the stage leaves, without its measurements."""
    schedule = schedule_of(configs)
    assert schedule is not None
    wanted = identity(schedule)
    with building(schedule.artifact_dir) as artifact:
        (artifact / SCHEDULE_FILE).write_text(json.dumps({"values": VALUES}), encoding="utf-8")
        seal(artifact, Manifest(schedule.kind, schedule.stage, wanted["config"], wanted["inputs"], {}, {}))


def test_values_reach_their_stages_and_explicit_keys_win(tmp_path: Path) -> None:
    data = rows(tmp_path, "understanding", "generation", "editing")
    configs, given = composed(tmp_path, data, "pretrain.optim.learning_rate=4e-4", "heldout.every_steps=7")
    before = {config.stage: config for config in configs}
    assert with_schedule(configs, given) == configs  # nothing is decided yet
    decide(configs)
    after = {config.stage: config for config in with_schedule(configs, given)}
    pretrain, editing = after["pretrain"], after["editing_decoder"]
    assert (pretrain.trainer.max_steps, pretrain.optim.learning_rate, pretrain.heldout.every_steps) == (321, 4e-4, 7)
    assert (editing.trainer.max_steps, editing.optim.warmup_steps) == (45, 5)
    assert editing.optim.learning_rate == before["editing_decoder"].optim.learning_rate
    for stage in ("schedule", "embed_generation", "generation_decoder", "embed_editing"):
        assert after[stage] == before[stage]


def test_what_was_decided_for_other_rows_or_minutes_does_not_count(tmp_path: Path) -> None:
    data = rows(tmp_path, "understanding", "generation", "editing")
    configs, given = composed(tmp_path, data)
    decide(configs)
    shorter, given = composed(tmp_path, data, "budget_minutes=3")
    assert with_schedule(shorter, given) == shorter
    rows(tmp_path, "understanding", "generation", "editing", "editing")
    assert with_schedule(configs, given) == configs


@pytest.mark.parametrize(
    ("tasks", "idle"),
    [
        (("understanding", "generation", "editing"), []),
        (("generation",), ["embed_editing", "editing_decoder"]),
        (("understanding", "editing"), ["embed_generation", "generation_decoder"]),
        (("understanding",), ["embed_generation", "generation_decoder", "embed_editing", "editing_decoder"]),
    ],
)
def test_stages_without_rows_are_left_out(
    tmp_path: Path, tasks: tuple[str, ...], idle: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path, *tasks)
    configs, _ = composed(tmp_path, data)
    names = [config.stage for config in configs]
    assert sorted(idle_stages(names, schedule_of(configs))[0]) == sorted(idle)
    place = [f"runs_dir={tmp_path}", "name=own", f"data.train={data}", f"data.heldout={data}"]
    assert main(["run", "pipeline=finetune", *place, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert [name for name in names if f"stage {name} ->" in said] == [name for name in names if name not in idle]
    assert ("left out are" in said) == bool(idle) and all(name in said for name in idle)
    assert "11 minutes in all" in said


def test_a_budget_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"budget_minutes is 0; it must be above 0, as in budget_minutes=10"):
        composed(tmp_path, rows(tmp_path, "understanding"), "budget_minutes=0")
