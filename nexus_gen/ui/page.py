"""The page of `nexus-gen ui`: three tabs over one set of models, what those are, and the pictures of this session.

Importing this module reads GRADIO_TEMP_DIR, which nexus_gen.ui.server sets.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import gradio as gr

from nexus_gen.parts.examples import Example, examples_of
from nexus_gen.parts.models import DECODER_KINDS
from nexus_gen.pictures.framing import ASPECTS
from nexus_gen.pictures.images import EncodedImage, open_image
from nexus_gen.ui.about import about
from nexus_gen.ui.parts import Number, Picture, Slider, save_picture
from nexus_gen.ui.served import ServedModels, ServedPaths, guided
from nexus_gen.ui.tasks import MAX_CHARACTERS, MAX_SEED, Tasks
from nexus_gen.ui.words import ENGLISH, INSTRUCTIONS, PROMPTS, QUESTIONS, SWITCH, WORDS, Words

GENERATION_DECODER, EDITING_DECODER = DECODER_KINDS
MAX_STEPS = 200
MAX_WAITING = 16  # requests in the queue; the next one is told to come back
MAX_SESSIONS = 200  # of which the server remembers anything
SECONDS_KEPT = 24 * 3600  # of uploaded and painted files
SOURCES = ["upload", "clipboard"]
SMALL = 256  # pixels: pictures below are shown with their pixels to be seen


class Page:
    """Builds the page in `blocks`."""

    def __init__(self, served: ServedPaths, models: ServedModels) -> None:
        self.served = served
        self.models = models
        self.tasks = Tasks(models)
        self.spoken: list[tuple[Any, dict[str, Callable[[Words], Any]]]] = []
        self.examples = examples_of(served.run)
        with gr.Blocks(title="nexus-gen", analytics_enabled=False, delete_cache=(600, SECONDS_KEPT)) as self.blocks:
            self._build()
        self.blocks.state_session_capacity = MAX_SESSIONS
        self.blocks.queue(max_size=MAX_WAITING, api_open=False)

    def speak(self, language: str) -> list[dict[str, Any]]:
        """The page's words in a language, as updates of everything in `spoken`."""
        words = WORDS[language]
        return [gr.update(**{name: of(words) for name, of in said.items()}) for _, said in self.spoken]

    def greet(self, request: gr.Request) -> list[Any]:
        """Begin in the language that the browser asks for."""
        language = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
        return [language, *self.speak(language)]

    def _build(self) -> None:
        with gr.Row(equal_height=True):
            name, device = self.served.run.name, self.models.reader.device.type
            title = {"value": lambda words: f"# nexus-gen\n{words.intro.format(name=name, device=device)}"}
            with gr.Column(min_width=280):  # on a phone, above the switch
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
        self.blocks.unload(self.tasks.stop)

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
                self._note(gr.Markdown(), self.tasks.looked_at, [picture])
                question = self._add(gr.Textbox, {"label": "question"}, max_length=MAX_CHARACTERS)
                ask, stop = self._buttons("ask")
            answer = self._add(gr.Textbox, {"label": "answer"}, lines=6, interactive=False)
        self._examples("understanding", QUESTIONS, {"picture": picture, "question": question})
        self._answer(
            "understand", self.tasks.understand, [ask.click, question.submit], [picture, question], [answer], stop
        )
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
        self._answer("generate", self.tasks.generate, triggers, [prompt, *sampling], [result, sampling[0]], stop)
        return result, buttons

    def _edit_tab(self) -> tuple[Picture, tuple[Picture, list[gr.Button]]]:
        kinds = [kind for kind in (EDITING_DECODER, GENERATION_DECODER) if kind in self.models.models]
        with gr.Row():
            with gr.Column():
                picture = self._picture("source", sources=SOURCES, height=320)
                note = gr.Markdown()
                instruction = self._add(gr.Textbox, {"label": "instruction"}, max_length=MAX_CHARACTERS)
                decoder = self._add(
                    gr.Radio,
                    {
                        "label": "decoder",
                        "choices": lambda words: [(getattr(words, kind), kind) for kind in kinds],
                    },
                    value=kinds[0],
                )
                shape = self._add(
                    gr.Dropdown,
                    {
                        "label": "shape",
                        "choices": lambda words: [(getattr(words, aspect), aspect) for aspect in ASPECTS],
                    },
                    value=self._aspect(kinds[0]),
                    filterable=False,
                )
                input_size = self._add(gr.Checkbox, {"label": "input_size"}, value=False)
                sampling = self._sampling(kinds[0])
                repaint, stop = self._buttons("repaint")
            result, buttons = self._result()
        self._examples("editing", INSTRUCTIONS, {"source": picture, "instruction": instruction})
        decoder.change(self._defaults, decoder, sampling[2:], queue=False, api_visibility="private")
        decoder.change(self._aspect, decoder, shape, queue=False, api_visibility="private")
        self._note(note, self.tasks.framed, [picture, decoder, shape, input_size])
        triggers = [repaint.click, instruction.submit]
        inputs = [picture, instruction, decoder, *sampling, shape, input_size]
        self._answer("edit", self.tasks.edit, triggers, inputs, [result, sampling[0]], stop)
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
                seed = self._add(Number, {"label": "seed"}, value=42, precision=0, minimum=0, maximum=MAX_SEED)
                new_seed = self._add(gr.Checkbox, {"label": "new_seed"}, value=False)
            return [
                seed,
                new_seed,
                self._add(Slider, {"label": "steps"}, minimum=1, maximum=MAX_STEPS, step=1, value=steps),
                self._add(
                    Slider,
                    {"label": "cfg_scale"},
                    minimum=1,
                    maximum=10,
                    step=0.1,
                    value=cfg_scale,
                    visible=guided(self.served.paths[kind]),
                ),
                self._add(
                    Slider,
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

    def _aspect(self, kind: str) -> str:
        """How a decoder was trained to see what is not square."""
        return self.models.models[kind].details.get("aspect", ASPECTS[0])

    def _note(self, note: gr.Markdown, sentence: Callable[..., str], inputs: list[Any]) -> None:
        """Keep a line under a picture that says in which sizes it is seen and painted, before anything runs."""
        inputs = [*inputs, self.language]
        changes = [component.change for component in inputs]
        gr.on(changes, sentence, inputs, note, queue=False, show_progress="hidden", api_visibility="private")

    def _examples(self, task: str, fallback: Sequence[str], inputs: dict[str, Any]) -> None:
        """Rows of the run's own dataset, or words alone: of training rows, or others in both languages.

        inputs: by the field of Words on them.
        """
        words_alone = self.models.reader.wording.examples(task) or fallback
        examples = self.examples.get(task) or [Example(words, None) for words in words_alone]
        fields = list(inputs) if all(example.picture for example in examples) else list(inputs)[-1:]
        targets = [inputs[field] for field in fields]

        samples = [
            [
                *([save_picture(open_image(example.picture))] if example.picture and len(fields) > 1 else []),
                example.words,
            ]
            for example in examples
        ]

        def take(index: int) -> Any:
            return samples[index] if len(fields) > 1 else samples[index][0]

        # Not gr.Examples, which sets labels back to what they were at first together with the values.
        shown = self._add(
            gr.Dataset,
            {"label": "examples", "headers": lambda words: [getattr(words, field) for field in fields]},
            components=targets,
            samples=samples,
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
        stop.click(self.tasks.stop, queue=False, api_visibility="private")
        stop.click(None, cancels=[event])


def send(tab: str, picture: EncodedImage | None) -> tuple[Any, Any]:
    """Take a result to another tab."""
    if picture is None:
        return gr.skip(), gr.skip()
    return save_picture(open_image(picture)), gr.Tabs(selected=tab)
