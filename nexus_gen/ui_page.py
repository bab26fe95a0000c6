"""The page of `nexus-gen ui`: three tabs over one set of models, what those are, and the pictures of this session.

Importing this module reads GRADIO_TEMP_DIR, which nexus_gen.ui sets.
"""

import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import gradio as gr
from PIL import Image

from nexus_gen.served import ServedModels, ServedPaths, guided
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.examples import Example, examples_of
from nexus_gen.specs.images import EncodedImage, open_image
from nexus_gen.specs.models import DECODER_KINDS
from nexus_gen.specs.prompts import language_of
from nexus_gen.ui_about import about
from nexus_gen.ui_parts import Picture, save_picture
from nexus_gen.ui_words import ENGLISH, INSTRUCTIONS, PROMPTS, QUESTIONS, SWITCH, WORDS, Words

log = logging.getLogger(__name__)

GENERATION_DECODER, EDITING_DECODER = DECODER_KINDS
MAX_CHARACTERS = 2000  # of a prompt
MAX_ANSWER_TOKENS = 256
MAX_STEPS = 200
MAX_SEED = 2**32 - 1
MAX_WAITING = 16  # requests in the queue; the next one is told to come back
MAX_HISTORY = 48  # pictures of a session
MAX_SESSIONS = 200  # of which the server remembers anything
SECONDS_KEPT = 24 * 3600  # of uploaded and painted files
SOURCES = ["upload", "clipboard"]
SMALL = 256  # pixels: pictures below are shown with their pixels to be seen

History = list[tuple[str, str]]  # (file, caption) of a picture
Report = Callable[[str, int, int], None]  # (what is done, how far, of how many)


class Stopped(Exception):
    """Raised inside a model's work when the person asked to stop it."""


class Page:
    """Builds the page in `blocks`; its methods answer what happens on it."""

    def __init__(self, served: ServedPaths, models: ServedModels) -> None:
        self.served = served
        self.models = models
        self.running: dict[str | None, threading.Event] = {}  # session -> set to stop what it runs
        self.spoken: list[tuple[Any, dict[str, Callable[[Words], Any]]]] = []
        self.examples = examples_of(served.run)
        with gr.Blocks(title="nexus-gen", analytics_enabled=False, delete_cache=(600, SECONDS_KEPT)) as self.blocks:
            self._build()
        self.blocks.state_session_capacity = MAX_SESSIONS
        self.blocks.queue(max_size=MAX_WAITING, api_open=False)

    # What the page does

    def understand(
        self,
        picture: EncodedImage | None,
        question: str,
        language: str,
        history: History,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - Gradio looks for it there
    ) -> tuple[str, History]:
        """Answer a question about a picture. language: of the page's own words and errors, en or zh."""
        words = WORDS[language]
        with self._work(words, request, progress) as report:
            opened, question = self._opened(picture, words), checked(question, words)
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
            picture = self.models.models[GENERATION_DECODER].generate(
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
        language: str,
        history: History,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[str, int, History]:
        """Repaint a picture by an instruction; returns the result and the seed of its noise."""
        words = WORDS[language]
        with self._work(words, request, progress) as report:
            opened, instruction = self._opened(picture, words), checked(instruction, words)
            seed = pick(seed, new_seed)
            report(words.imagining, 0, steps)
            edited = self.models.models[decoder].edit(
                opened,
                instruction,
                language_of(instruction),
                seed=seed,
                num_inference_steps=steps,
                cfg_scale=cfg_scale,
                embedded_guidance=embedded_guidance,
                progress=partial(report, words.painting),
            )
        file = save_picture(edited)
        return file, seed, remember(history, file, f"{instruction} ({words.seed} {seed})")

    def stop(self, request: gr.Request) -> None:
        """End what this session runs, at its next step; Gradio takes what it has waiting out of the queue."""
        if (running := self.running.get(request.session_hash)) is not None:
            running.set()

    def stop_all(self) -> None:
        for running in list(self.running.values()):
            running.set()

    def speak(self, language: str) -> list[dict[str, Any]]:
        """The page's words in a language, as updates of everything in `spoken`."""
        words = WORDS[language]
        return [gr.update(**{name: of(words) for name, of in said.items()}) for _, said in self.spoken]

    def greet(self, request: gr.Request) -> list[Any]:
        """Begin in the language that the browser asks for."""
        language = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
        return [language, *self.speak(language)]

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

    def _opened(self, picture: EncodedImage | None, words: Words) -> Image.Image:
        if picture is None:
            raise UserError(words.no_picture)
        return open_image(picture)

    # How the page looks

    def _build(self) -> None:
        with gr.Row(equal_height=True):
            name, device = self.served.run.name, self.models.reader.device.type
            title = {"value": lambda words: f"# nexus-gen\n{words.intro.format(name=name, device=device)}"}
            self._add(gr.Markdown, title)
            choices = [(name, language) for name, language in SWITCH.items()]
            self.language = self._add(
                gr.Radio, {"label": "language"}, choices=choices, value="en", scale=0, min_width=240
            )
        self.history = gr.State([])
        self.gallery = gr.Gallery(
            show_label=False,
            columns=8,
            fit_columns=False,
            object_fit="contain",
            height="auto",
            buttons=["download", "fullscreen"],
            elem_classes=self._classes(),
            render=False,
        )
        with gr.Tabs() as self.tabs:
            with self._add(gr.Tab, {"label": "understand"}, id="understand"):
                seen = self._understand_tab()
            results = []
            if GENERATION_DECODER in self.models.models:
                with self._add(gr.Tab, {"label": "generate"}, id="generate"):
                    results.append(self._generate_tab())
            if self.served.paths.keys() & set(DECODER_KINDS):
                with self._add(gr.Tab, {"label": "edit"}, id="edit"):
                    source, result = self._edit_tab()
                    results.append(result)
            with self._add(gr.Tab, {"label": "about"}, id="about"):
                self._add(gr.Markdown, {"value": lambda words: about(self.served, self.models, words)})
        with self._add(gr.Accordion, {"label": "history"}):
            self.gallery.render()
        for painted, buttons in results:
            for tab, target, button in zip(("edit", "understand"), (source, seen), buttons, strict=True):
                button.click(partial(send, tab), [painted], [target, self.tabs], queue=False, api_visibility="private")
        everything = [component for component, _ in self.spoken]
        self.language.change(self.speak, self.language, everything, queue=False, api_visibility="private")
        self.blocks.load(self.greet, None, [self.language, *everything], queue=False, api_visibility="private")
        self.blocks.unload(self.stop)

    def _add(self, kind: Callable[..., Any], said: Mapping[str, str | Callable[[Words], Any]], **options: Any) -> Any:
        """A component whose words follow the language. said: its option -> field of Words, or what makes it of them."""
        of = {name: attrgetter(source) if isinstance(source, str) else source for name, source in said.items()}
        component = kind(**{name: get(ENGLISH) for name, get in of.items()}, **options)
        self.spoken.append((component, of))
        return component

    def _understand_tab(self) -> Picture:
        with gr.Row():
            with gr.Column():
                picture = self._picture("picture", sources=SOURCES, height=320)
                question = self._add(gr.Textbox, {"label": "question"}, max_length=MAX_CHARACTERS)
                ask, stop = self._buttons("ask")
            answer = self._add(gr.Textbox, {"label": "answer"}, lines=6, interactive=False)
        self._examples("understanding", QUESTIONS, {"picture": picture, "question": question})
        self._answer("understand", self.understand, [ask.click, question.submit], [picture, question], [answer], stop)
        return picture

    def _generate_tab(self) -> tuple[Picture, list[gr.Button]]:
        with gr.Row():
            with gr.Column():
                prompt = self._add(gr.Textbox, {"label": "prompt"}, lines=2, max_length=MAX_CHARACTERS)
                sampling = self._sampling(GENERATION_DECODER)
                paint, stop = self._buttons("paint")
            result, buttons = self._result()
        self._examples("generation", PROMPTS, {"prompt": prompt})
        triggers = [paint.click, prompt.submit]
        self._answer("generate", self.generate, triggers, [prompt, *sampling], [result, sampling[0]], stop)
        return result, buttons

    def _edit_tab(self) -> tuple[Picture, tuple[Picture, list[gr.Button]]]:
        kinds = [kind for kind in (EDITING_DECODER, GENERATION_DECODER) if kind in self.models.models]
        with gr.Row():
            with gr.Column():
                picture = self._picture("source", sources=SOURCES, height=320)
                instruction = self._add(gr.Textbox, {"label": "instruction"}, max_length=MAX_CHARACTERS)
                decoder = self._add(
                    gr.Radio,
                    {
                        "label": "decoder",
                        "choices": lambda words: [(getattr(words, kind), kind) for kind in kinds],
                    },
                    value=kinds[0],
                )
                sampling = self._sampling(kinds[0])
                repaint, stop = self._buttons("repaint")
            result, buttons = self._result()
        self._examples("editing", INSTRUCTIONS, {"source": picture, "instruction": instruction})
        decoder.change(self._defaults, decoder, sampling[2:], queue=False, api_visibility="private")
        triggers, inputs = [repaint.click, instruction.submit], [picture, instruction, decoder, *sampling]
        self._answer("edit", self.edit, triggers, inputs, [result, sampling[0]], stop)
        return picture, (result, buttons)

    def _classes(self) -> list[str]:
        """CSS classes of what shows a picture."""
        details = next((paths.details for paths in self.served.paths.values()), None)
        return ["picture", "small"] if details is not None and details["image_size"] < SMALL else ["picture"]

    def _picture(self, label: str, **options: Any) -> Picture:
        options = {
            "type": "filepath",
            "buttons": ["download", "fullscreen"],
            "elem_classes": self._classes(),
            **options,
        }
        return self._add(Picture, {"label": label}, **options)

    def _result(self) -> tuple[Picture, list[gr.Button]]:
        """A painted picture, and the buttons that take it to the other tabs."""
        with gr.Column():
            result = self._picture("result", interactive=False, height=400)
            with gr.Row():
                buttons = [
                    self._add(gr.Button, {"value": f"use_in_{tab}"}, size="sm") for tab in ("edit", "understand")
                ]
        return result, buttons

    def _buttons(self, go: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            return self._add(gr.Button, {"value": go}, variant="primary"), self._add(gr.Button, {"value": "stop"})

    def _sampling(self, kind: str) -> list[Any]:
        """Seed, whether to draw a new one, steps and both guidances, beginning with the decoder's own."""
        steps, cfg_scale, embedded_guidance = self._defaults(kind)
        with self._add(gr.Accordion, {"label": "sampling"}, open=False):
            with gr.Row():
                seed = self._add(gr.Number, {"label": "seed"}, value=42, precision=0, minimum=0, maximum=MAX_SEED)
                new_seed = self._add(gr.Checkbox, {"label": "new_seed"}, value=False)
            return [
                seed,
                new_seed,
                self._add(gr.Slider, {"label": "steps"}, minimum=1, maximum=MAX_STEPS, step=1, value=steps),
                self._add(
                    gr.Slider,
                    {"label": "cfg_scale"},
                    minimum=1,
                    maximum=10,
                    step=0.1,
                    value=cfg_scale,
                    visible=guided(self.served.paths[kind]),
                ),
                self._add(
                    gr.Slider,
                    {"label": "embedded_guidance"},
                    minimum=0,
                    maximum=10,
                    step=0.1,
                    value=embedded_guidance,
                ),
            ]

    def _defaults(self, kind: str) -> list[float]:
        """Steps, classifier-free and distilled guidance as the decoder was meant to be sampled."""
        sampling = self.models.models[kind].details["sampling"]
        return [sampling[name] for name in ("num_inference_steps", "cfg_scale", "embedded_guidance")]

    def _examples(self, task: str, fallback: Sequence[str], inputs: dict[str, Any]) -> None:
        """Rows of the run's own dataset, or words alone, in both languages. inputs: by the field of Words on them."""
        examples = self.examples.get(task) or [Example(words, None) for words in fallback]
        fields = list(inputs) if all(example.picture for example in examples) else list(inputs)[-1:]
        targets = [inputs[field] for field in fields]

        def take(index: int) -> Any:
            example = examples[index]
            if example.picture is None or len(fields) == 1:
                return example.words
            return save_picture(open_image(example.picture)), example.words

        # Not gr.Examples, which sets labels back to what they were at first together with the values.
        shown = self._add(
            gr.Dataset,
            {"label": "examples", "headers": lambda words: [getattr(words, field) for field in fields]},
            components=targets,
            samples=[[*([str(example.picture)] if len(fields) > 1 else []), example.words] for example in examples],
            type="index",
        )
        shown.click(take, shown, targets, queue=False, show_progress="hidden", api_visibility="private")

    def _answer(
        self,
        name: str,
        handler: Callable[..., Any],
        triggers: list[Any],
        inputs: list[Any],
        outputs: list[Any],
        stop: gr.Button,
    ) -> None:
        """Run a task, one in the whole server at a time, then show the history; `stop` ends it, or its waiting."""
        event = gr.on(
            triggers,
            handler,
            [*inputs, self.language, self.history],
            [*outputs, self.history],
            api_name=name,
            concurrency_id="models",
            concurrency_limit=1,
        )
        event.success(list, self.history, self.gallery, queue=False, api_visibility="private")
        stop.click(self.stop, queue=False, api_visibility="private")
        stop.click(None, cancels=[event])


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


def send(tab: str, picture: EncodedImage | None) -> tuple[Any, Any]:
    """Take a result to another tab."""
    if picture is None:
        return gr.skip(), gr.skip()
    return save_picture(open_image(picture)), gr.Tabs(selected=tab)
