"""What a run's models do with held-out rows, before and after training."""

import dataclasses
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from data.messages.rows import Row
from nexus_gen.inference import NexusGen
from nexus_gen.language.checkpoint import load_autoregressive
from nexus_gen.parts.models import ModelPaths
from nexus_gen.pictures.framing import Frame
from nexus_gen.pictures.images import open_image
from train.decoders.stage import build_initial_decoder
from train.progress import progress_bar
from train.runs.directory import load_config
from train.schemas.decoders import DecoderConfig
from train.schemas.pretrain import PretrainConfig
from train.scores.outcomes import MAX_ANSWER_TOKENS, prompt_of
from train.scores.scoring import is_right

PICTURES = {"generation": 1, "editing": 2}  # of a row, where the page has room for so many


@dataclasses.dataclass
class GenerationSample:
    """reconstruction: the trained decoder on the true picture's embeddings, so the decoder alone."""

    prompt: str
    before: Image.Image | None
    after: Image.Image
    reconstruction: Image.Image
    truth: Image.Image


@dataclasses.dataclass
class EditingSample:
    instruction: str
    source: Image.Image
    before: Image.Image | None
    editing_decoder: Image.Image
    generation_decoder: Image.Image
    truth: Image.Image


@dataclasses.dataclass
class UnderstandingSample:
    question: str
    image: Image.Image
    before: str | None
    after: str
    truth: str

    @property
    def right(self) -> bool:
        """As an evaluation scores it."""
        return is_right(self.after, self.truth)


@dataclasses.dataclass
class Samples:
    """before: nowhere None, or everywhere, where what training started from is not there any more."""

    generation: list[GenerationSample]
    editing: list[EditingSample]
    understanding: list[UnderstandingSample]


def models(run: Path, decoder: str, device: str, with_start: bool) -> tuple[NexusGen | None, NexusGen]:
    """(untrained, trained): the same classes, with the weights that the stages started from and ended with.

    with_start: without it, untrained is None.
    """
    pretrain = cast(PretrainConfig, load_config(run / "pretrain"))
    decoder_config = cast(DecoderConfig, load_config(run / decoder))
    trained = NexusGen(ModelPaths.find(run, decoder=decoder, flux=Path(decoder_config.model.flux)), device)
    if not with_start:
        return None, trained
    untrained = NexusGen(trained.paths, device)
    untrained.autoregressive = load_autoregressive(
        pretrain.model.qwen,
        dtype=untrained.dtype,
        device=untrained.device,
        init_seed=pretrain.seed,
        num_target_tokens=pretrain.model.num_target_tokens,
    )
    initial = build_initial_decoder(decoder_config, trained.details["embed_dim"])
    untrained.decoder = initial.to(untrained.device, untrained.dtype).eval()
    return untrained, trained


def first_rows(rows: list[Row], task: str, count: int) -> list[Row]:
    """Held-out rows of a task, of one exchange about as many pictures as are shown, of its categories in turn."""
    fitting = [
        row
        for row in rows
        if row.task == task and len(row.messages) == 2 and len(row.images) == PICTURES.get(task, len(row.images))
    ]
    turns: dict[str, list[Row]] = {}
    for row in fitting:
        turns.setdefault((row.truth or {}).get("category", ""), []).append(row)
    return [row for turn in zip_longest(*turns.values()) for row in turn if row is not None][:count]


def draw_samples(run: Path, rows: list[Row], num_samples: int, device: str, with_start: bool) -> Samples:
    """Paint and answer held-out rows of each task; noise is the same before and after. with_start: see `models`."""
    shown = {task: first_rows(rows, task, num_samples) for task in ("generation", "understanding", "editing")}
    with progress_bar(sum(map(len, shown.values())), "report", "row") as bar:
        return draw_rows(run, shown, device, with_start, bar.update)


def draw_rows(
    run: Path, shown: dict[str, list[Row]], device: str, with_start: bool, done: Callable[[], object]
) -> Samples:
    """The samples of the rows of each task. done: called behind each row."""
    untrained, trained = models(run, "generation_decoder", device, with_start)
    generation = []
    for row in shown["generation"]:
        user, reply = (message["content"] for message in row.messages)
        truth = open_image(row.images[0])
        generation.append(
            GenerationSample(
                prompt=prompt_of(row),
                before=untrained.paint(untrained.imagine(user, reply, []))[0] if untrained else None,
                after=trained.paint(trained.imagine(user, reply, []))[0],
                reconstruction=trained.paint(trained.target_embeds(truth))[0],
                truth=truth,
            )
        )
        done()
    understanding = []
    for row in shown["understanding"]:
        user, reply = (message["content"] for message in row.messages)
        images = [open_image(path) for path in row.images]
        understanding.append(
            UnderstandingSample(
                question=prompt_of(row),
                image=images[0],
                before=untrained.answer(user, list(images), MAX_ANSWER_TOKENS) if untrained else None,
                after=trained.answer(user, list(images), MAX_ANSWER_TOKENS),
                truth=reply,
            )
        )
        done()
    untrained_editor, editor = models(run, "editing_decoder", device, with_start)
    editing = []
    for row in shown["editing"]:
        user, reply = (message["content"] for message in row.messages)
        source, truth = (open_image(path) for path in row.images)
        frame = Frame.of(source.size, editor.details)
        embeds = editor.imagine(user, reply, [frame.fit(source)])
        before = untrained_editor.edit_all([user], [reply], [[source]])[0] if untrained_editor else None
        editing.append(
            EditingSample(
                instruction=prompt_of(row),
                source=source,
                before=before,
                editing_decoder=editor.repaint(embeds, [frame], [source])[0],
                generation_decoder=trained.repaint(embeds, [frame], [source])[0],
                truth=truth,
            )
        )
        done()
    del untrained, untrained_editor
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Samples(generation, editing, understanding)
