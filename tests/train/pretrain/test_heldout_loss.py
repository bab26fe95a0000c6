"""What pretraining measures on held-out rows, of a fake model whose outputs are written down, against plain loops."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from nexus_gen.language.model import NexusGenOutput
from train.pretrain import callbacks as swift_callbacks
from train.pretrain.callbacks import HeldoutLoss, StepGuard, task_of_rows, text_positions
from train.schemas.common import HeldoutConfig
from train.steps.average import WeightAverage
from train.steps.clock import StepClock

IMAGE = 9  # the id of image tokens
TARGET_TOKENS = 2
WIDTH = 3
IGNORE = -100


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Row:
    """One row of a task: losses of its text tokens and whether each is right, and its target images."""

    def __init__(self, task: str, text: list[float], right: list[bool], num_images: int = 0) -> None:
        self.task, self.text, self.right = task, text, right
        context = [IMAGE] if task in ("understanding", "editing") else []
        images = [9] * (TARGET_TOKENS * num_images)
        self.input_ids = [1, *context, 2, *[3] * len(text), *images]
        self.labels = [IGNORE] * (2 + len(context)) + [3] * len(text) + images
        generator = torch.Generator().manual_seed(round(1000 * sum(text)))
        shape = (TARGET_TOKENS * num_images, WIDTH)
        self.target, self.forced, self.made = (torch.randn(shape, generator=generator) for _ in range(3))


BATCHES = [
    [
        Row("understanding", [1.0, 2.0], [True, True]),
        Row("generation", [4.0], [True], num_images=2),
        Row("editing", [0.375], [True], num_images=1),
    ],
    [Row("understanding", [3.0], [False]), Row("text", [0.5, 0.25], [True, True])],
    [Row("editing", [0.125], [False], num_images=1), Row("understanding", [8.0, 9.0, 7.0], [True, False, True])],
]
ROWS = [row for batch in BATCHES for row in batch]


def batch_of(number: int) -> dict[str, Tensor]:
    rows = BATCHES[number]
    length = max(len(row.labels) for row in rows)
    return {
        "number": torch.tensor(number),
        "input_ids": torch.tensor([row.input_ids + [0] * (length - len(row.labels)) for row in rows]),
        "labels": torch.tensor([row.labels + [IGNORE] * (length - len(row.labels)) for row in rows]),
    }


def image_losses(row: Row) -> list[float]:
    """0.25 MSE + 0.75 (1 - cos) of each token; a mixture that shows which part is which."""
    losses = []
    for predicted, target in zip(row.forced.tolist(), row.target.tolist(), strict=True):
        mse, cosine = errors(predicted, target)
        losses.append(0.25 * mse + 0.75 * cosine)
    return losses


def errors(predicted: list[float], target: list[float]) -> tuple[float, float]:
    mse = sum((a - b) ** 2 for a, b in zip(predicted, target, strict=True)) / WIDTH
    dot = sum(a * b for a, b in zip(predicted, target, strict=True))
    return mse, 1 - dot / math.sqrt(sum(a * a for a in predicted) * sum(b * b for b in target))


class Model(nn.Module):
    """Answers a prepared batch with what its rows say, plus `offset` on the text losses."""

    config = SimpleNamespace(image_token_id=IMAGE)
    device = torch.device("cpu")
    num_target_tokens = TARGET_TOKENS

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(0.0))
        self.seen: list[int] = []

    def forward(self, number: Tensor, input_ids: Tensor, labels: Tensor, prepared: bool) -> NexusGenOutput:
        assert prepared and not self.training and not torch.is_grad_enabled()
        self.seen.append(int(number))
        rows = BATCHES[int(number)]
        return NexusGenOutput(
            text_token_loss=torch.tensor([loss for row in rows for loss in row.text]) + self.offset,
            image_token_loss=torch.tensor([loss for row in rows for loss in image_losses(row)]),
            text_token_right=torch.tensor([right for row in rows for right in row.right]),
            predicted_embeds=torch.cat([row.forced for row in rows]),
            target_embeds=torch.cat([row.target for row in rows]),
        )


def generated(model: Model, batch: dict[str, Any]) -> dict[int, Tensor]:
    """Of each row's first target image, by its place among the targets of the batch."""
    assert batch["prepared"]
    found, place = {}, 0
    for row in BATCHES[int(batch["number"])]:
        if len(row.target):
            found[place] = row.made[:TARGET_TOKENS]
        place += len(row.target) // TARGET_TOKENS
    return found


def heldout(model: Model, batches: list[int] | None = None, **changes: Any) -> HeldoutLoss:
    given: dict[str, Any] = {
        "guard": StepGuard(1, 0, IMAGE),
        "model": model,
        "batches": [batch_of(number) for number in (range(3) if batches is None else batches)],
        "metrics": None,
        "config": HeldoutConfig(every_steps=0, num_samples=6),
        "average": None,
        "prepare": lambda batch: {**batch, "prepared": True},
        "generates": True,
        "clock": StepClock(),
    }
    return HeldoutLoss(**given | changes)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def by_hand(rows: list[Row], offset: float = 0.0) -> dict[str, float]:
    """Loops over rows and tokens; of embeddings, over all target images and over each row's first."""
    found = {"heldout/text_loss": mean([loss + offset for row in rows for loss in row.text])}
    if images := [loss for row in rows for loss in image_losses(row)]:
        found["heldout/image_loss"] = mean(images)
    for name, side, limit in (("image", "forced", None), ("generated", "made", TARGET_TOKENS)):
        pairs = [
            errors(predicted, target)
            for row in rows
            for predicted, target in zip(getattr(row, side)[:limit].tolist(), row.target[:limit].tolist(), strict=True)
        ]
        if pairs:
            found[f"heldout/{name}_mse"] = mean([mse for mse, _ in pairs])
            found[f"heldout/{name}_cosine_distance"] = mean([cosine for _, cosine in pairs])
    for task in ("understanding", "generation", "editing", "text"):
        of_task = [row for row in rows if row.task == task]
        if of_task:
            found[f"heldout/text_loss/{task}"] = mean([loss + offset for row in of_task for loss in row.text])
        if images := [loss for row in of_task for loss in image_losses(row)]:
            found[f"heldout/image_loss/{task}"] = mean(images)
    asked = [row for row in rows if row.task == "understanding"]
    if asked:
        found["heldout/accuracy/understanding"] = mean([float(all(row.right)) for row in asked])
    return found


def test_every_heldout_figure_is_the_mean_over_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift_callbacks, "generated_embeddings", generated)
    model = Model().train()
    found = heldout(model).measure()
    assert found == pytest.approx(by_hand(ROWS), rel=1e-5)
    assert found["heldout/accuracy/understanding"] == 1 / 3
    assert found["heldout/text_loss/understanding"] == 5.0  # (1 + 2 + 3 + 8 + 9 + 7) / 6
    assert len(found) == 13
    assert model.training and model.seen == [0, 1, 2]


def test_text_is_scored_where_it_is_a_label_and_something_predicts_it() -> None:
    labels = torch.tensor([[3, 3, IGNORE, 3, IMAGE], [IGNORE, IGNORE, 3, 3, 3]])
    found = text_positions(labels, labels == IMAGE)
    assert found.int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 1, 1]]


def test_a_row_belongs_to_the_task_of_its_pictures() -> None:
    """understanding, generation, editing, text, by whether it looks at a picture and whether it makes one."""
    rows = [([IMAGE, 1], [IGNORE, 1]), ([1, IMAGE], [1, IMAGE]), ([IMAGE, IMAGE], [IGNORE, IMAGE]), ([1, 1], [1, 1])]
    input_ids, labels = (torch.tensor([row[side] for row in rows]) for side in (0, 1))
    assert task_of_rows(input_ids, labels, IMAGE).tolist() == [0, 1, 2, 3]


def test_what_no_row_has_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift_callbacks, "generated_embeddings", generated)
    found = heldout(Model(), [1]).measure()
    assert found == pytest.approx(by_hand(BATCHES[1]))
    assert set(found) == {
        "heldout/text_loss",
        "heldout/text_loss/understanding",
        "heldout/text_loss/text",
        "heldout/accuracy/understanding",
    }
    without = heldout(Model(), [0], generates=False).measure()
    assert "heldout/image_mse" in without and not any("generated" in name for name in without)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_and_an_idle_one_keeps_pace(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank after rank in one process: each leaves its sums to the last one's reduction."""
    monkeypatch.setattr(swift_callbacks, "generated_embeddings", generated)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)
    sums: list[Tensor] = []

    def all_reduce(facts: Tensor) -> None:
        sums.append(facts.clone())
        facts.copy_(torch.stack(sums).sum(0))

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    seen, found = [], {}
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        model = Model()
        found = heldout(model).measure()
        seen.append(model.seen)
    assert found == pytest.approx(by_hand(ROWS), rel=1e-5)
    assert seen == {2: [[0, 2], [1, 0]], 4: [[0], [1], [2], [0]]}[world_size]  # the last one's batch counts nowhere


@pytest.mark.parametrize("exports_average", [True, False])
def test_the_weights_that_are_exported_are_measured(exports_average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swift_callbacks, "generated_embeddings", generated)
    model = Model()
    average = WeightAverage(model, 0.9, 0, 1)
    average.start()
    model.offset.data.fill_(1.0)
    average.update()  # the first: a tenth of the start, nine tenths of the weights
    found = heldout(model, average=average if exports_average else None).measure()
    assert found == pytest.approx(by_hand(ROWS, 0.9 if exports_average else 1.0), rel=1e-5)
    assert model.offset.item() == 1.0


@pytest.mark.parametrize(("every", "measured"), [(0, [5]), (2, [2, 4, 5]), (5, [5])])
def test_heldout_rows_are_measured_every_few_steps_and_after_the_last(every: int, measured: list[int]) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    metrics: Any = SimpleNamespace(log=lambda step, values: logged.append((step, values)))
    made = heldout(Model(), metrics=metrics, config=HeldoutConfig(every, 6))
    made.measure = lambda: {"heldout/text_loss": 1.0}  # type: ignore[method-assign]
    nothing = heldout(Model(), [], metrics=metrics, config=HeldoutConfig(every, 6))
    for step in range(1, 6):
        state = swift_callbacks.TrainerState(global_step=step, max_steps=5)
        for callback in (made, nothing):
            callback.on_step_end(None, state, swift_callbacks.TrainerControl())
    assert logged == [(step, {"heldout/text_loss": 1.0}) for step in measured]


def test_a_budget_that_is_spent_ends_with_a_measurement(tmp_path: Path) -> None:
    logged: list[int] = []
    metrics: Any = SimpleNamespace(log=lambda step, values: logged.append(step))
    guard = StepGuard(1, 0, IMAGE, token_budget=20)
    made = heldout(Model(), metrics=metrics, guard=guard)
    made.measure = lambda: {}  # type: ignore[method-assign]
    for step, tokens in enumerate((19, 20), start=1):
        guard.tokens_seen = tokens
        made.on_step_end(
            None, swift_callbacks.TrainerState(global_step=step, max_steps=99), swift_callbacks.TrainerControl()
        )
    assert logged == [2]
