"""What the pretrain stage tells swift, exports and schedules, each beside the value that was configured."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn

from launch.compose import Override, compose_stage
from nexus_gen.language.model import LossWeights, NexusGenOutput
from nexus_gen.language.tower_cache import TowerCache
from train.pretrain.callbacks import Averaging, StepGuard
from train.pretrain.stage import PretrainPipeline, schedule_by_tokens, swift_arguments
from train.schemas.common import AverageConfig, OptimConfig
from train.schemas.pretrain import PretrainConfig
from train.steps.average import WeightAverage


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def composed(tmp_path: Path, *overrides: str) -> PretrainConfig:
    rows = tmp_path / "rows.jsonl"
    texts = ["stage=pretrain", f"runs_dir={tmp_path}", f"model.qwen={tmp_path}", f"data.train={rows}"]
    made = compose_stage([Override.parse(text) for text in (*texts, f"data.heldout={rows}", *overrides)])
    assert isinstance(made, PretrainConfig)
    return made


def test_swift_is_told_every_configured_value(tmp_path: Path) -> None:
    made = composed(
        tmp_path,
        *("optim.learning_rate=0.003", "optim.weight_decay=0.07", "optim.betas=[0.8,0.97]", "optim.warmup_steps=11"),
        *("optim.schedule=linear", "optim.max_grad_norm=0.4", "trainer.precision=bfloat16", "trainer.max_steps=77"),
        *("trainer.micro_batch_size=3", "trainer.global_batch_size=30", "trainer.num_workers=6", "seed=123"),
        *("data.max_length=999", "data.max_pixels=8888", "freeze.vision=false", "freeze.merger=true"),
        *("trainer.gradient_checkpointing=true", "trainer.zero_stage=3"),
    )
    given = swift_arguments(made, 5, Path("deepspeed.json"), "cpu")
    values = dict(zip(given[::2], given[1::2], strict=True))
    expected = {
        "learning_rate": "0.003",
        "weight_decay": "0.07",
        "adam_beta1": "0.8",
        "adam_beta2": "0.97",
        "warmup_steps": "11",
        "lr_scheduler_type": "linear",
        "max_grad_norm": "0.4",
        "bf16": "True",
        "fp16": "False",
        "torch_dtype": "bfloat16",
        "max_steps": "77",
        "per_device_train_batch_size": "3",
        "gradient_accumulation_steps": "5",
        "dataloader_num_workers": "6",
        "seed": "123",
        "max_length": "999",
        "max_pixels": "8888",
        "freeze_vit": "False",
        "freeze_aligner": "True",
        "freeze_llm": "False",
        "gradient_checkpointing": "True",
        "vit_gradient_checkpointing": "True",
        "train_dataloader_shuffle": "False",
        "use_cpu": "True",
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    assert {name: values[f"--{name}"] for name in expected} == expected
    frozen = swift_arguments(composed(tmp_path, "trainer.gradient_checkpointing=true"), 1, Path("x"), "cuda")
    values = dict(zip(frozen[::2], frozen[1::2], strict=True))
    assert (values["--freeze_vit"], values["--vit_gradient_checkpointing"]) == ("True", "False")
    assert (values["--torch_dtype"], values["--bf16"], values["--use_cpu"]) == ("float32", "False", "False")
    schedules = [
        dict(zip(given[::2], given[1::2], strict=True))["--lr_scheduler_type"]
        for schedule in ("constant", "cosine")
        for given in [swift_arguments(composed(tmp_path, f"optim.schedule={schedule}"), 1, Path("x"), "cpu")]
    ]
    assert schedules == ["constant_with_warmup", "cosine"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ("linear", [0.0, 0.25 * 0.9, 0.5 * 0.8, 0.75 * 0.7, 0.6, 0.0]),
        (
            "cosine",
            [warmup * (1 + math.cos(math.pi * spent)) / 2 for warmup, spent in zip(
                (0, 0.25, 0.5, 0.75, 1, 1), (0, 0.1, 0.2, 0.3, 0.4, 1), strict=True
            )],
        ),
    ],
)  # fmt: skip
def test_the_learning_rate_follows_the_share_of_the_budget_that_is_spent(schedule: str, expected: list[float]) -> None:
    """Warmed up over four steps; each step takes a tenth of the budget, the last of these what is left and more."""
    guard = StepGuard(1, 0, 9, token_budget=1000)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 7.0)

    trainer = SimpleNamespace(create_scheduler=create_scheduler)
    schedule_by_tokens(trainer, guard, OptimConfig("adamw", 2.0, 0.0, [0.9, 0.95], 4, schedule, 1.0))
    scheduler = trainer.create_scheduler(10**6, optimizer)
    for step, factor in enumerate(expected):
        guard.tokens_seen = 100 * step if step < 5 else 1200
        scheduler.lr_lambdas[0](step)
        assert scheduler.lr_lambdas[0](step) == pytest.approx(factor)
    without = SimpleNamespace(create_scheduler=create_scheduler)
    schedule_by_tokens(without, StepGuard(1, 0, 9, 10), OptimConfig("adamw", 2.0, 0.0, [0.9, 0.95], 0, schedule, 1.0))
    assert without.create_scheduler(5, optimizer).lr_lambdas[0](0) == 1.0


@pytest.mark.parametrize(("decay", "export"), [(0.9, "average"), (0.9, "raw"), (0.0, "raw")])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_weights_of_choice_are_exported(decay: float, export: str, rank: int) -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(3.0)
    average = WeightAverage(model, decay, 0, 1) if decay else None
    if average is not None:
        average.start()
        model.weight.data.fill_(2.0)
        average.update()  # the first: a tenth of the start, nine tenths of the weights
        average.rank = rank
    model.weight.data.fill_(2.0)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()} if rank == 0 else {}
    pipeline: Any = object.__new__(PretrainPipeline)
    pipeline.config = SimpleNamespace(average=AverageConfig(decay, export, 0.0))
    pipeline.average, pipeline.rank = average, rank
    accelerator = SimpleNamespace(get_state_dict=lambda engine: whole)
    pipeline.trainer = SimpleNamespace(accelerator=accelerator, deepspeed=None)
    found = {name: tensor.flatten().tolist() for name, tensor in pipeline.gather_weights().items()}
    weight = 1.9 if export == "average" else 2.0
    assert found == ({"weight": pytest.approx([weight, weight]), "bias": [3.0]} if rank == 0 else {})
    assert pipeline.exported_average is (average if export == "average" else None)


def test_the_average_follows_every_step_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.9, 0, 1)
    averaging: Any = Averaging(average, tmp_path)
    averaging.on_train_begin(None, SimpleNamespace(global_step=0), None)
    model.weight.data.fill_(2.0)
    averaging.on_step_end(None, SimpleNamespace(global_step=1), None)
    (tmp_path / "checkpoint-1").mkdir()
    averaging.on_save(None, SimpleNamespace(global_step=1), None)
    resumed = WeightAverage(model, 0.9, 0, 1)
    averaging = Averaging(resumed, tmp_path)
    averaging.on_train_begin(None, SimpleNamespace(global_step=1), None)
    model.weight.data.fill_(4.0)
    averaging.on_step_end(None, SimpleNamespace(global_step=2), None)
    assert float(resumed.gather()["weight"]) == pytest.approx(1.9 * 2 / 11 + 4 * 9 / 11)


def of_loss(loss: float, text: float, image: float, num_images: int) -> NexusGenOutput:
    return NexusGenOutput(
        loss=torch.tensor(loss),
        text_loss=torch.tensor(text),
        image_loss=torch.tensor(image),
        text_token_loss=torch.tensor([text]),
        image_token_loss=torch.tensor([image] * num_images),
    )


def test_losses_and_tokens_of_a_step_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of two micro-batches: means of losses over four, of image losses over those with an image; tokens add
    up, and padding is none of them."""
    micro_batches = {0: [(1.0, 0.5, 0.25, 1), (2.0, 1.5, 0.0, 0)], 1: [(3.0, 2.5, 1.0, 2), (6.0, 3.5, 0.0, 0)]}
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    sums: list[torch.Tensor] = []

    def all_reduce(facts: torch.Tensor) -> None:
        sums.append(facts.clone())
        facts.copy_(torch.stack(sums).sum(0))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    guard = StepGuard(2, 0, 9)
    for rank, losses in micro_batches.items():
        guard = StepGuard(2, 0, 9)
        guard.interrupted = rank == 0
        for loss, text, image, num_images in losses:
            labels = torch.tensor([[-100] * 4 + [3] + [9] * num_images + [-100] * (3 - num_images)])
            present = torch.tensor([[1] * (5 + num_images) + [0] * (3 - num_images)])
            inputs = {"input_ids": labels.clamp(min=0), "labels": labels, "attention_mask": present}
            guard.on_loss(of_loss(loss, text, image, num_images), inputs)
    assert guard.losses == {"train/loss": 3.0, "train/text_loss": 2.0, "train/image_loss": (0.25 + 1.0) / 2}
    assert guard.num_tokens == guard.tokens_seen == 4 * 5 + 3
    assert guard.stopping
    assert guard.task_sums[4:8] == [0.5 + 2.5, 2.0, 0.25 + 2 * 1.0, 3.0]  # generation


def test_the_objective_is_the_configured_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    from swift.pipelines.train.sft import SwiftSft

    monkeypatch.setattr(SwiftSft, "_prepare_model_tokenizer", lambda self, **kwargs: None)
    pipeline: Any = object.__new__(PretrainPipeline)
    pipeline.args = SimpleNamespace(training_args=SimpleNamespace(hf_deepspeed_config=None, use_cpu=True))
    pipeline.model = SimpleNamespace(num_target_tokens=81, config=SimpleNamespace(), loss_weights=None)
    objective = SimpleNamespace(
        text_loss_weight=2.0, image_loss_weight=5.0, cosine_fraction=0.2, target_inputs="prefill"
    )
    freeze, trainer = SimpleNamespace(vision=True, merger=True), SimpleNamespace(zero_stage=0)
    pipeline.config = SimpleNamespace(
        seed=0, model=SimpleNamespace(num_target_tokens=81), objective=objective, freeze=freeze, trainer=trainer
    )
    monkeypatch.setattr("train.pretrain.stage.set_hf_deepspeed_config", lambda config: None)
    pipeline._prepare_model_tokenizer()
    assert isinstance(pipeline.model.tower_cache, TowerCache)
    for trained in ("vision", "merger"):
        pipeline.model.tower_cache = None
        pipeline.config.freeze = SimpleNamespace(**{"vision": True, "merger": True} | {trained: False})
        pipeline._prepare_model_tokenizer()
        assert pipeline.model.tower_cache is None  # it says something else after each step
    pipeline.config.freeze, trainer.zero_stage = freeze, 3
    pipeline._prepare_model_tokenizer()
    assert pipeline.model.tower_cache is None  # processes have to run the tower together
    assert pipeline.model.loss_weights == LossWeights(text=2.0, image=5.0, mse_share=0.8)
