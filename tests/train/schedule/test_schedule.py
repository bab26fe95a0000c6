"""What stage=schedule decides, against arithmetic by hand."""

from dataclasses import replace

import pytest

from train.schedule.decide import (
    EDITING,
    GENERATION,
    KNOWN_RATE,
    NEW_RATE,
    PRETRAIN,
    STEP_OVERHEAD,
    DecoderFacts,
    Facts,
    decide,
    wanted_steps,
)

NEW = DecoderFacts(rows=500, loss=4.2, known_loss=0.1, blank_loss=2.6, step_s=0.1)
KNOWN = DecoderFacts(rows=500, loss=0.12, known_loss=0.1, blank_loss=2.6, step_s=0.1)
FACTS = Facts(
    rows=1500,
    batch_size=8,
    step_s=0.2,
    psnr=32.0,
    spread=0.6,
    fixed_s=100.0,
    decoders={GENERATION: NEW, EDITING: replace(NEW, step_s=0.3)},
)


def test_novelty_is_the_way_from_known_to_blank() -> None:
    assert NEW.novelty == 1.0  # worse than knowing nothing
    assert KNOWN.novelty == pytest.approx(0.02 / 2.5)
    assert replace(KNOWN, loss=1.35).novelty == pytest.approx(0.5)
    assert replace(KNOWN, loss=0.05).novelty == 0.0


def test_new_pictures_ask_for_long_training_at_the_high_rate() -> None:
    schedule = decide(FACTS, budget_minutes=600)
    # 6 epochs of 1500 rows, 8,000 and 1,600 samples, in batches of 8
    steps = {stage: values["trainer.max_steps"] for stage, values in schedule.values.items()}
    assert steps == {PRETRAIN: 1125, GENERATION: 1000, EDITING: 200}
    assert all(schedule.values[stage]["optim.learning_rate"] == NEW_RATE["muon"][stage] for stage in steps)
    assert all(schedule.values[stage]["optim.name"] == "muon" for stage in steps)
    by_adamw = decide(replace(FACTS, optimizer="adamw"), budget_minutes=600).values
    assert all(
        values["optim.name"] == "adamw" and values["optim.learning_rate"] == 1.5e-3 for values in by_adamw.values()
    )
    assert not schedule.unreached


def test_known_pictures_ask_for_little_at_the_low_rate() -> None:
    schedule = decide(replace(FACTS, decoders={GENERATION: KNOWN, EDITING: KNOWN}), budget_minutes=600)
    assert schedule.values[GENERATION]["trainer.max_steps"] == 60
    assert schedule.values[EDITING]["trainer.max_steps"] == 40
    assert all(values["optim.learning_rate"] == KNOWN_RATE[stage] for stage, values in schedule.values.items())
    assert all(values["optim.name"] == "adamw" for values in schedule.values.values())


def test_a_budget_cuts_every_stage_by_the_same_share_and_says_so() -> None:
    schedule = decide(FACTS, budget_minutes=5)
    needed = sum(
        wanted * step_s * STEP_OVERHEAD[stage]
        for stage, wanted, step_s in ((PRETRAIN, 1125, 0.2), (GENERATION, 1000, 0.1), (EDITING, 200, 0.3))
    )
    share = (5 * 60 - 100) / needed
    assert schedule.values[PRETRAIN]["trainer.max_steps"] == int(1125 * share)
    assert schedule.values[EDITING]["trainer.max_steps"] == int(200 * share)
    assert sum(schedule.seconds.values()) == pytest.approx(200, rel=0.01)
    assert schedule.unreached[0] == f"pretrain gets {int(1125 * share)} of the 1125 steps that it asks for"
    assert len(schedule.unreached) == 3


def test_more_rows_ask_for_more_steps() -> None:
    more = replace(FACTS, rows=15_000, decoders={GENERATION: replace(NEW, rows=5_000)})
    assert wanted_steps(more) == {PRETRAIN: 11_250, GENERATION: 2_500}
    few = replace(FACTS, rows=100, decoders={})
    assert wanted_steps(few) == {PRETRAIN: 500}


def test_a_poor_autoencoder_is_named() -> None:
    assert "as sharp as anything will be painted" in decide(replace(FACTS, psnr=21.0), 10).reasons[0]
    assert "as sharp" not in decide(FACTS, 10).reasons[0]
