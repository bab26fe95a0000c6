"""Which stage is named as the limit, on scores that are made up for it."""

from typing import Any

import pytest

from train.scores.limits import limits


def score(value: float, chance: float, count: int = 50) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "count": count, "chance": chance}


def chain(task: str, measure: str, true: float, imagined: float, painted: float, chance: float = 0.1) -> dict[str, Any]:
    names = (f"reconstruction/{task}_decoder", f"imagined/{task}", task)
    return {f"{name}/{measure}": score(v, chance) for name, v in zip(names, (true, imagined, painted), strict=True)}


@pytest.mark.parametrize(
    ("true", "imagined", "painted", "stage", "words"),
    [
        (
            0.31,
            0.90,
            0.29,
            "generation_decoder",
            "the generation decoder; 31% of pictures are found again when painted",
        ),
        (0.95, 0.40, 0.38, "pretrain", "the imagined embeddings; 95% of pictures"),
        (0.95, 0.92, 0.40, "generation_decoder", "the generation decoder on imagined embeddings; 95%"),
    ],
)
def test_the_largest_loss_names_the_stage(true: float, imagined: float, painted: float, stage: str, words: str) -> None:
    (limit,) = limits(chain("generation", "retrieval_top1", true, imagined, painted))
    assert (limit.task, limit.stage) == ("generation", stage)
    assert f"what limits generation: {words}" in limit.sentence
    assert limit.sentence.endswith(f"(chance 10%); train longer: {stage}.more=2x")


def test_losses_are_of_what_lies_above_chance() -> None:
    (limit,) = limits(chain("editing", "retrieval_top1", true=0.55, imagined=0.8, painted=0.3))
    assert limit.loss == pytest.approx(1 - (0.55 - 0.1) / 0.9)
    assert limit.stage == "editing_decoder"


def test_nothing_limits_what_is_good() -> None:
    good = chain("generation", "retrieval_top1", 0.95, 0.95, 0.95)
    assert limits({**good, "understanding/exact": score(0.95, 0.1), "understanding/similarity": score(0.97, 0.3)}) == []
    assert limits({}) == []
    assert limits({"understanding/overall": {"value": 0.1, "low": 0, "high": 1, "count": 3}}) == []  # rows with scenes
    assert limits({"generation/retrieval_top1": score(0.1, 0.1)}) == []  # nothing is known of the decoder


def test_answers_are_named_by_the_better_of_their_measures() -> None:
    (limit,) = limits({"understanding/exact": score(0.0, 0.0), "understanding/similarity": score(0.6, 0.2)})
    assert (limit.stage, limit.loss) == ("pretrain", pytest.approx(0.5))
    assert "60% similarity to the true answers, where always the commonest answer gives 20%" in limit.sentence
    (limit,) = limits({"understanding/exact": score(0.51, 0.2), "understanding/similarity": score(0.6, 0.5)})
    assert "51% are right" in limit.sentence


def test_the_worst_task_comes_first() -> None:
    found = limits({"understanding/exact": score(0.8, 0.0), **chain("generation", "retrieval_top1", 0.2, 0.9, 0.2)})
    assert [limit.task for limit in found] == ["generation", "understanding"]


def test_labels_and_prompts_go_before_pictures_where_they_can_be_read() -> None:
    pictures = {**chain("generation", "retrieval_top1", 0.9, 0.1, 0.1), "generation/similarity": score(0.5, 0.1)}
    prompts = chain("generation", "class_top1", 0.3, 0.8, 0.3)
    read = {"generation/true_class_top1": score(0.85, 0.1)}
    (limit,) = limits({**pictures, **prompts, **read})
    assert "30% of prompts are read" in limit.sentence
    assert limit.loss == pytest.approx(1 - (0.3 - 0.1) / (0.85 - 0.1))  # of what is read of the true pictures
    (limit,) = limits({**pictures, **prompts, "generation/true_class_top1": score(0.25, 0.1)})
    assert limit.stage == "pretrain" and "of pictures are found again" in limit.sentence
    few = {name: {**one, "count": 20} for name, one in prompts.items()}  # of 50 rows
    assert "of pictures are found again" in limits({**pictures, **few, **read})[0].sentence
    labels = {**chain("generation", "label_top1", 0.9, 0.2, 0.2), "generation/true_label_top1": score(0.9, 0.1)}
    assert "of labels are read" in limits({**pictures, **prompts, **read, **labels})[0].sentence
