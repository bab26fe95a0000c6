"""Every file under configs/ composes into a config that its schema accepts."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launch import ablate
from launch.compose import CONFIGS, Override, compose_stage
from launch.run import compose_pipeline
from train.preflight.inputs import inputs_of
from train.schemas.fields import fingerprint_values
from train.schemas.pretrain import PretrainConfig
from train.schemas.table import SCHEMAS

# what a user gives because nobody else can know it
REQUIRED = {"data": ["data.train=t.jsonl", "data.heldout=h.jsonl"]}
GROUP_STAGE = {"optim": "pretrain", "trainer": "pretrain", "model": "editing_decoder", "data": "pretrain"}


def stage_of_experiment(path: Path) -> str:
    """The stage that an experiment's header runs."""
    header = next(line for line in path.read_text(encoding="utf-8").splitlines() if "nexus-gen run stage=" in line)
    return header.split("stage=")[1].split()[0]


def overrides_for(path: Path) -> list[str]:
    group, name = path.parent.name, path.stem
    if group == "stage":
        return [f"stage={name}"]
    if group == "experiment":
        stage = stage_of_experiment(path)
        return [f"stage={stage}", f"experiment={name}", *(REQUIRED["data"] if stage == "pretrain" else [])]
    if group == "launch":  # standins has no batch to divide among processes
        return ["stage=standins", f"launch={name}"]
    return [
        f"stage={GROUP_STAGE.get(group, 'pretrain')}",
        f"{group}={name}",
        *(REQUIRED["data"] if name == "messages" else []),
    ]


OTHERWISE = (CONFIGS, CONFIGS / "pipeline", CONFIGS / "ablation")
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent not in OTHERWISE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_file_composes_and_validates(path: Path) -> None:
    config = compose_stage([Override.parse(text) for text in overrides_for(path)])
    assert config.stage in SCHEMAS


@pytest.mark.parametrize("path", sorted((CONFIGS / "pipeline").glob("*.yaml")), ids=lambda path: path.stem)
def test_pipeline_composes_and_validates(path: Path) -> None:
    plan: Any = OmegaConf.to_container(OmegaConf.load(path))
    own_data = "data=messages" in plan["overrides"]
    given = [Override.parse(text) for text in (REQUIRED["data"] if own_data else [])]
    configs = compose_pipeline(path.stem, given)
    assert [config.stage for config in configs] == plan["stages"]


@pytest.mark.parametrize("name", ablate.FILES)
def test_arms_compose_validate_and_differ(name: str, tmp_path: Path) -> None:
    arms = ablate.compose_arms(name, tmp_path / "run", tmp_path, [42, 43], [Override.parse("launch.device=cpu")])
    ablation = ablate.load(name, tmp_path)
    assert len({arm.directory for arm in arms}) == len(arms) == 2 * len(ablation.arms)
    assert {metric.rpartition(".")[0] for metric in ablation.metrics} <= {"", *ablation.stages[:-1]}
    first = [[fingerprint_values(config) for config in arm.configs] for arm in arms if arm.seed == 42]
    assert all(one != other for place, one in enumerate(first) for other in first[:place])
    for arm in arms:
        assert [config.launch.device for config in arm.configs] == ["cpu"] * len(arm.configs)
        read = [path for config in arm.configs for path in inputs_of(config).values()]
        assert all(tmp_path / "run" in path.parents or arm.directory in path.parents for path in read)


def test_an_override_reaches_the_stages_that_read_it_and_a_prefixed_one_only_its_own() -> None:
    given = ["trainer.log_every_steps=3", "pretrain.trainer.max_steps=5", "generation_decoder.optim.learning_rate=0.5"]
    configs = {config.stage: config for config in compose_pipeline("tiny", [Override.parse(text) for text in given])}
    trained = [configs[stage] for stage in ("pretrain", "generation_decoder", "editing_decoder")]
    assert [config.trainer.log_every_steps for config in trained] == [3, 3, 3]
    assert configs["pretrain"].trainer.max_steps == 5 != configs["generation_decoder"].trainer.max_steps
    assert configs["generation_decoder"].optim.learning_rate == 0.5 != configs["editing_decoder"].optim.learning_rate


@pytest.mark.parametrize(
    ("pipeline", "alone"), [("demo", {"shapes"}), ("tiny", {"shapes", "standins"}), ("tiny_messages", {"standins"})]
)
def test_two_processes_train_and_embed_and_one_makes_data_and_models(pipeline: str, alone: set[str]) -> None:
    rows = [Override.parse(text) for text in REQUIRED["data"]] if pipeline == "tiny_messages" else []
    counts = {config.stage: config.launch.processes_per_node for config in compose_pipeline(pipeline, rows)}
    assert {stage for stage, count in counts.items() if count == 1} == alone
    assert set(counts.values()) == {1, 2}
    given = compose_pipeline(pipeline, [*rows, Override.parse("launch.processes_per_node=1")])
    assert {config.launch.processes_per_node for config in given} == {1}


def test_a_section_named_like_its_stage_is_a_section() -> None:
    given = [Override.parse(text) for text in ("standins.vae_steps=3", "shapes.num_train=5", "standins.seed=9")]
    configs = {config.stage: config for config in compose_pipeline("tiny", given)}
    assert configs["standins"].standins.vae_steps == 3
    assert configs["shapes"].shapes.num_train == 5
    assert (configs["standins"].seed, configs["shapes"].seed) == (9, 42)


def test_epochs_become_steps_of_whole_batches() -> None:
    given = [
        "data=messages",
        *REQUIRED["data"],
        "data.num_epochs=2",
        "trainer.max_steps=0",
        "trainer.micro_batch_size=1",
    ]
    texts = ["stage=pretrain", *given, "trainer.global_batch_size=4"]
    config = compose_stage([Override.parse(text) for text in texts])
    assert isinstance(config, PretrainConfig)
    assert config.with_steps(epoch_rows=17).trainer.max_steps == 9  # 34 rows in batches of 4
    assert config.trainer.max_steps == 0
