"""How long, how fast and what a run trains, decided from what was measured of its rows, its pictures and this machine.

Pure arithmetic over `Facts`, which `train.schedule.stage` measures. docs/schedules.md says where the numbers come from.
"""

import math
from dataclasses import dataclass, field
from typing import Any

PRETRAIN, GENERATION, EDITING = "pretrain", "generation_decoder", "editing_decoder"
TITLES = {PRETRAIN: "the language model", GENERATION: "the generation decoder", EDITING: "the editing decoder"}

# Samples that training needs to converge on something new: so many at least, and so many of each row.
PRETRAIN_SAMPLES, PRETRAIN_EPOCHS = 4_000, 6.0
DECODER_SAMPLES = {GENERATION: 8_000, EDITING: 1_600}
DECODER_EPOCHS = {GENERATION: 4.0, EDITING: 2.0}
# ... and to adapt a decoder, which paints such pictures already, to what a finetuned language model imagines.
ADAPTING_SAMPLES = {GENERATION: 480, EDITING: 320}
NEW_RATE = {
    "muon": {PRETRAIN: 1.5e-3, GENERATION: 3.0e-3, EDITING: 3.0e-3},
    "adamw": {PRETRAIN: 1.5e-3, GENERATION: 1.5e-3, EDITING: 1.5e-3},
}
KNOWN_RATE = {PRETRAIN: 7.0e-4, GENERATION: 2.0e-4, EDITING: 1.0e-5}
IS_NEW = 0.15  # share of the way from what the decoder shipped with to knowing nothing
# What a step costs beyond its passes: optimizer, exchange between processes, loader. Measured on two cores.
STEP_OVERHEAD = {PRETRAIN: 1.5, GENERATION: 1.35, EDITING: 1.3}
STAGE_START_S = 9.0  # imports, loading and writing of a stage, while the one before it runs for a part
POOR_PSNR = 25.0  # dB; below it a reconstruction is visibly blurred


@dataclass(frozen=True)
class DecoderFacts:
    """What was measured of a decoder on the run's own pictures.

    rows: training rows of its task. loss: held-out-like loss on the true embeddings; known_loss: what its manifest says
    of the pictures that it was trained on; blank_loss: that of painting the mean, whatever the condition. All are mean
    squared errors of the velocity over eight noise levels. Without weights to start from, loss is blank_loss.
    step_s: seconds of the passes and the optimizer of a step.
    """

    rows: int
    loss: float
    known_loss: float
    blank_loss: float
    step_s: float

    @property
    def novelty(self) -> float:
        """0 where the pictures are as well known as those that the decoder was trained on, 1 where nothing is known."""
        span = max(self.blank_loss - self.known_loss, 1e-6)
        return min(1.0, max(0.0, (self.loss - self.known_loss) / span))


@dataclass(frozen=True)
class Facts:
    """rows: of training, all tasks. batch_size: rows of a step. step_s: of pretraining. psnr: of the autoencoder on the
    run's pictures, in dB. spread: mean cosine distance of different pictures' tower embeddings. fixed_s: what the run
    takes beside training. optimizer: of what is new, adamw or muon."""

    rows: int
    batch_size: int
    step_s: float
    psnr: float
    spread: float
    fixed_s: float
    decoders: dict[str, DecoderFacts] = field(default_factory=dict)
    optimizer: str = "muon"

    @property
    def novelty(self) -> float:
        """Of the pictures: to the decoder that knows them least; 1 where there is none to ask."""
        return max((decoder.novelty for decoder in self.decoders.values()), default=1.0)


@dataclass
class Schedule:
    """values: stage -> config key -> value. reasons: a sentence for each choice. unreached: what the budget cut."""

    values: dict[str, dict[str, Any]]
    reasons: list[str]
    unreached: list[str]
    seconds: dict[str, float]


def decide(facts: Facts, budget_minutes: float) -> Schedule:
    """Steps, learning rates and what follows from them, for every training stage that has rows."""
    step_s = {PRETRAIN: facts.step_s, **{kind: decoder.step_s for kind, decoder in facts.decoders.items()}}
    step_s = {stage: seconds * STEP_OVERHEAD[stage] for stage, seconds in step_s.items()}
    wanted = wanted_steps(facts)
    needed_s = sum(steps * step_s[stage] for stage, steps in wanted.items())
    budget_s = max(budget_minutes * 60 - facts.fixed_s, 0.1 * budget_minutes * 60)
    share = min(1.0, budget_s / needed_s)
    steps = {stage: max(10, math.floor(share * number)) for stage, number in wanted.items()}
    seconds = {stage: number * step_s[stage] for stage, number in steps.items()}
    return Schedule(
        values={stage: stage_values(facts, stage, number) for stage, number in steps.items()},
        reasons=[picture_sentence(facts), *(sentence(facts, s, steps[s], seconds[s]) for s in steps)],
        unreached=[
            f"{stage} gets {steps[stage]} of the {wanted[stage]} steps that it asks for"
            for stage in steps
            if steps[stage] < wanted[stage]
        ],
        seconds=seconds,
    )


def wanted_steps(facts: Facts) -> dict[str, int]:
    """Steps to convergence, whatever they cost."""
    samples = {PRETRAIN: max(PRETRAIN_SAMPLES, PRETRAIN_EPOCHS * facts.rows)}
    for kind, decoder in facts.decoders.items():
        new = max(DECODER_SAMPLES[kind], DECODER_EPOCHS[kind] * decoder.rows)
        few = ADAPTING_SAMPLES[kind]
        samples[kind] = few + decoder.novelty * (new - few) if decoder.novelty >= IS_NEW else few
    return {stage: math.ceil(number / facts.batch_size) for stage, number in samples.items()}


def is_new(facts: Facts, stage: str) -> bool:
    return (facts.novelty if stage == PRETRAIN else facts.decoders[stage].novelty) >= IS_NEW


def rate_of(facts: Facts, stage: str) -> float:
    return (NEW_RATE[facts.optimizer] if is_new(facts, stage) else KNOWN_RATE)[stage]


def optimizer_of(facts: Facts, stage: str) -> str:
    return facts.optimizer if is_new(facts, stage) else "adamw"


def stage_values(facts: Facts, stage: str, steps: int) -> dict[str, Any]:
    """The keys of a stage's config that follow from its steps and what it begins with."""
    rate = rate_of(facts, stage)
    return {
        "optim.name": optimizer_of(facts, stage),
        "trainer.max_steps": steps,
        "optim.learning_rate": rate,
        "optim.warmup_steps": max(5, min(30, steps // 20)),
        "heldout.every_steps": max(10, math.ceil(steps / 4)),  # four points show a slope; each costs seconds
    }


def picture_sentence(facts: Facts) -> str:
    poor = (
        ": that is as sharp as anything will be painted, and the autoencoder is not trained here"
        if facts.psnr < POOR_PSNR
        else ""
    )
    return (
        f"the autoencoder gives the pictures back at {facts.psnr:.1f} dB{poor}; the vision tower sees them "
        f"{facts.spread:.2f} apart (mean cosine distance)"
    )


def sentence(facts: Facts, stage: str, steps: int, seconds: float) -> str:
    """Why a stage trains as it does."""
    rate = rate_of(facts, stage)
    if stage == PRETRAIN:
        rows, why = facts.rows, "new pictures" if facts.novelty >= IS_NEW else "pictures as known ones"
    else:
        decoder = facts.decoders[stage]
        rows = decoder.rows
        if decoder.novelty >= IS_NEW:
            why = f"the pictures are new to it, loss {decoder.loss:.2f} where {decoder.known_loss:.2f} is usual"
        else:
            why = f"it paints such pictures already, loss {decoder.loss:.2f} where {decoder.known_loss:.2f} is usual"
    epochs = steps * facts.batch_size / rows
    return (
        f"{stage}: {steps} steps at {rate:g}, {epochs:.1f} epochs of {rows} rows, about {seconds / 60:.1f} min ({why})"
    )
