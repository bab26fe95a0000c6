"""What the page of `nexus-gen ui` asks of the models: one request at a time, with progress, stopped on demand."""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import gradio as gr
from PIL import Image

from nexus_gen.parts.models import DECODER_KINDS
from nexus_gen.pictures.framing import SIZES, Frame, seen_sentence
from nexus_gen.pictures.images import EncodedImage, open_image, open_size
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import language_of
from nexus_gen.ui.parts import save_picture
from nexus_gen.ui.served import ServedModels
from nexus_gen.ui.words import WORDS, Words

log = logging.getLogger(__name__)

MAX_CHARACTERS = 2000  # of a prompt
MAX_ANSWER_TOKENS = 256
MAX_SEED = 2**32 - 1
MAX_HISTORY = 48  # pictures of a session

History = list[tuple[str, str]]  # (file, caption) of a picture
Report = Callable[[str, int, int], None]  # (what is done, how far, of how many)


class Stopped(Exception):
    """Raised inside a model's work when the person asked to stop it."""


class Tasks:
    """Handlers of the three tabs; `language` is that of the page's words and errors, en or zh."""

    def __init__(self, models: ServedModels) -> None:
        self.models = models
        self.running: dict[str | None, threading.Event] = {}  # session -> set to stop what it runs

    def understand(
        self,
        picture: EncodedImage | None,
        question: str,
        language: str,
        history: History,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it there
    ) -> tuple[str, History]:
        """Answer a question about a picture."""
        words = WORDS[language]
        with self._work(words, request, progress) as report:
            opened, question = opened_picture(picture, words), checked(question, words)
            report(words.looking, 0, MAX_ANSWER_TOKENS)
            answer = self.models.reader.understand(
                opened, question, MAX_ANSWER_TOKENS, partial(report, words.answering)
            )
        shown = save_picture(opened)
        return answer, remember(history, shown, f"{question} {answer}")

    def generate(
        self,
        prompt: str,
        seed: int | None,
        new_seed: bool,
        steps: int,
        cfg_scale: float,
        embedded_guidance: float,
        language: str,
        history: History,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, int, History]:
        """Paint a picture from a prompt; returns it and the seed of its noise."""
        words = WORDS[language]
        with self._work(words, request, progress) as report:
            prompt = checked(prompt, words)
            seed = pick(seed, new_seed)
            report(words.imagining, 0, steps)
            picture = self.models.models[DECODER_KINDS[0]].generate(
                prompt,
                language_of(prompt),
                seed=seed,
                num_inference_steps=steps,
                cfg_scale=cfg_scale,
                embedded_guidance=embedded_guidance,
                progress=partial(report, words.painting),
            )
        file = save_picture(picture)
        return file, seed, remember(history, file, f"{prompt} ({words.seed} {seed})")

    def edit(
        self,
        picture: EncodedImage | None,
        instruction: str,
        decoder: str,
        seed: int | None,
        new_seed: bool,
        steps: int,
        cfg_scale: float,
        embedded_guidance: float,
        shape: str,
        input_size: bool,
        language: str,
        history: History,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, int, History]:
        """Repaint a picture by an instruction; returns the result and the seed of its noise."""
        words = WORDS[language]
        with self._work(words, request, progress) as report:
            opened, instruction = opened_picture(picture, words), checked(instruction, words)
            seed = pick(seed, new_seed)
            report(words.imagining, 0, steps)
            edited = self.models.models[decoder].edit(
                opened,
                instruction,
                language_of(instruction),
                aspect=shape,
                size=SIZES[input_size],
                seed=seed,
                num_inference_steps=steps,
                cfg_scale=cfg_scale,
                embedded_guidance=embedded_guidance,
                progress=partial(report, words.painting),
            )
        file = save_picture(edited)
        return file, seed, remember(history, file, f"{instruction} ({words.seed} {seed})")

    def looked_at(self, picture: EncodedImage | None, language: str) -> str:
        """In which size a question's picture is seen; or why it cannot be; empty where it is seen as it is."""
        if picture is None:
            return ""
        try:
            size = open_size(picture)
            return seen_sentence(language, size, *self.models.reader.seen_sizes([size]))
        except UserError as error:
            return str(error)

    def framed(self, picture: EncodedImage | None, decoder: str, shape: str, input_size: bool, language: str) -> str:
        """In which sizes a picture is edited, as `looked_at`."""
        if picture is None:
            return ""
        model = self.models.models[decoder]
        try:
            frame = Frame.of(open_size(picture), model.details, aspect=shape, size=SIZES[input_size])
            return frame.sentence(language, *model.seen_sizes([frame.shown], edits=True))
        except UserError as error:
            return str(error)

    def stop(self, request: gr.Request) -> None:
        """End what this session runs, at its next step; Gradio takes what it has waiting out of the queue."""
        if (running := self.running.get(request.session_hash)) is not None:
            running.set()

    def stop_all(self) -> None:
        for running in list(self.running.values()):
            running.set()

    @contextmanager
    def _work(self, words: Words, request: gr.Request, progress: gr.Progress) -> Iterator[Report]:
        """One request at the models: told how far it is, ended by `stop`, and whose errors are sentences."""
        stop = self.running[request.session_hash] = threading.Event()

        def report(what: str, done: int, total: int) -> None:
            if stop.is_set():
                raise Stopped
            progress((done, total), desc=what)

        try:
            with self.models.lock:
                yield report
        except Stopped:
            raise gr.Error(words.stopped, print_exception=False) from None
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            log.exception("a request failed")
            raise gr.Error(words.failed, print_exception=False) from error
        finally:
            self.running.pop(request.session_hash, None)


def opened_picture(picture: EncodedImage | None, words: Words) -> Image.Image:
    if picture is None:
        raise UserError(words.no_picture)
    return open_image(picture)


def checked(text: str, words: Words) -> str:
    """A prompt without space around it; UserError when there is nothing or too much of it."""
    text = text.strip()
    if not text:
        raise UserError(words.no_words)
    if len(text) > MAX_CHARACTERS:
        raise UserError(words.too_long.format(length=len(text), limit=MAX_CHARACTERS))
    return text


def pick(seed: int | None, new: bool) -> int:
    return random.randint(0, MAX_SEED) if new or seed is None else seed


def remember(history: History, file: str, caption: str) -> History:
    """The session's pictures with one more in front; the oldest go."""
    return [(file, caption), *history][:MAX_HISTORY]
