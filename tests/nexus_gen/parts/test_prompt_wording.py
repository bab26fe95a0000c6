"""What is sent for a person's words: by hand, and as the tokens that reach the model, held against training rows."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from PIL import Image

import nexus_gen.inference
from nexus_gen.commands.convert import convert
from nexus_gen.commands.models import main as models_main
from nexus_gen.commands.use import main
from nexus_gen.inference import NexusGen
from nexus_gen.language.conversation import encode
from nexus_gen.parts.models import DECODER_KINDS, SHIPPED_RUN, ModelPaths
from nexus_gen.parts.wording import Turn, Wording, Words, check_template
from nexus_gen.specs.errors import UserError
from nexus_gen.ui.served import ServedModels, ServedPaths
from nexus_gen.ui.tasks import Tasks

SENTENCE = "Generate an image according to the following description: "
HERE = "Here is the image: <image>"


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ("{}", " Draw a cat ", " Draw a cat "),
        ("Draw {}.", "a cat", "Draw a cat."),
        ("Draw {}.", "a cat.", "Draw a cat."),
        ("Draw {}.", "a cat!", "Draw a cat!"),
        ("Draw {}.", "Draw a cat.", "Draw a cat."),
        ("Draw {}.", "draw a cat", "Draw a cat."),
        ("Draw {}.", "drawn curtains", "Draw drawn curtains."),
        ("Draw {}.", "Please sketch a cat", "Please sketch a cat"),
        ("Draw {}.", "Could you make me a picture of a cat?", "Could you make me a picture of a cat?"),
        ("Draw {}.", "Please paint a cat", "Please paint a cat, in oil"),  # of the second template of the rows
        ("画{}。", "一只猫", "画一只猫。"),
        ("画{}。", "请生成一只猫", "请生成一只猫"),
        ("Prompt: {}", "Draw a cat", "Prompt: Draw a cat"),
        ("Prompt: {}", "prompt: a cat", "Prompt: a cat"),
        (SENTENCE + "{}", "Draw a cat.", SENTENCE + "Draw a cat."),
        (SENTENCE + "{}", SENTENCE + "a cat", SENTENCE + "a cat"),
        ("Draw {}.", "{it}", "Draw {it}."),
    ],
)
def test_words_stand_in_the_template_once(template: str, words: str, message: str) -> None:
    assert Words(template, shares={template: 0.7, "Please paint {}, in oil": 0.3}).message(words) == message


@pytest.mark.parametrize(
    ("template", "count", "message"),
    [
        ("<image> {}", 2, "<image> <image> Which?"),
        ("<image>\n{}", 1, "<image>\nWhich?"),
        ("{}\n<image>", 2, "Which?\n<image>\n<image>"),
        ("Picture: <image>\nQuestion: {}\nIn one word.", 1, "Picture: <image>\nQuestion: Which?\nIn one word."),
    ],
)
def test_every_picture_has_a_tag(template: str, count: int, message: str) -> None:
    assert Words(template).message("Which?", count) == message
    asked_in_full = "Which?\nIn one word." if "In one word" in template else "Which?"
    assert Words(template).message(asked_in_full, count) == message


def test_templates_that_are_given_win_over_those_of_training() -> None:
    own = Wording({("generation", "en"): Words("Draw {}.", HERE, system="Paint!")})
    assert own.turn("generation", "a cat") == Turn("Draw a cat.", HERE, "Paint!")
    assert own.under("raw").turn("generation", "a cat") == Turn("a cat", HERE, "Paint!")
    released = Turn(f"{SENTENCE}a cat", "Here is an image based on the description: <image>", "")
    assert own.under("released").turn("generation", "a cat") == released
    assert Wording().turn("generation", "a cat") == released
    assert own.under("Sketch {}", "<image>").turn("generation", "a cat") == Turn("Sketch a cat", "<image>", "Paint!")
    assert own.under("Q: {}").turn("understanding", "Which?", 1) == Turn("<image>\nQ: Which?", "", "")
    rows = Wording({("editing", "en"): Words("<image>\nPlease {}.", HERE, examples=("crop it", "dim it"))})
    assert rows.examples("editing") == ["crop it", "dim it"]  # what a person types
    assert rows.under("raw").examples("editing") == ["Please crop it.", "Please dim it."]
    assert own.turn("generation", "一只猫") == Wording().turn("generation", "一只猫")
    assert own.turn("generation", "cat", language="zh").user == "根据以下描述生成一张图像：cat"
    assert Wording({("generation", "en"): Words("{}", HERE, fixed_reply=False)}).turn("generation", "a").reply is None


def test_the_record_is_read_as_it_was_written_and_refused_when_damaged(tmp_path: Path) -> None:
    words = Words("画{}。", HERE, False, "", {"画{}。": 0.75, "{}": 0.25}, ("猫",))
    Wording({("generation", "zh"): words}).save(tmp_path)
    assert Wording.load(tmp_path).words == {("generation", "zh"): words}
    assert Wording.load(tmp_path).recorded() == {"generation, zh": '"画{}。"'}
    assert Wording.load(tmp_path / "none") == Wording()
    file = tmp_path / "wording.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    for damage in ({"user": "no place"}, {"reply": "no picture"}, {"user": 1}, {"unknown": 1}, {"shares": {"{}": "x"}}):
        file.write_text(json.dumps({"generation": {"zh": whole["generation"]["zh"] | damage}}))
        with pytest.raises(UserError, match=r"wording\.json is not a readable record"):
            Wording.load(tmp_path)
    for text in ("{", "[]", '{"generation": 1}', '{"speech": {"en": {"user": "{}"}}}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"wording\.json is not a readable record"):
            Wording.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "reply", "sentence"),
    [
        ("row", None, "--template 'row' is none of trained, released, raw; a template of your own holds {} once"),
        ("{} and {}", None, "--template '{} and {}' is none of"),
        ("raw", "Here it is:", "--reply 'Here it is:' needs <image> once"),
    ],
)
def test_templates_without_a_place_for_words_are_refused(template: str, reply: str | None, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_template(template, reply)
    assert sentence in str(caught.value)


# Training rows of each task, and what a person would type for them.
ROWS: dict[str, tuple[str, list[dict[str, str]]]] = {
    "generation": (
        "Draw a cat.",
        [
            {"role": "system", "content": "You paint."},
            {"role": "user", "content": "Draw a cat."},
            {"role": "assistant", "content": "Here it comes: <image>"},
        ],
    ),
    "editing": (
        "Make it blue.",
        [
            {"role": "user", "content": "<image>Make it blue."},
            {"role": "assistant", "content": "<image>"},
        ],
    ),
    "understanding": (
        "Which colour?",
        [
            {"role": "user", "content": "Which colour?\n<image>"},
            {"role": "assistant", "content": "Red."},
        ],
    ),
}
RAW = Wording(
    {
        ("generation", "en"): Words("{}", "Here it comes: <image>", system="You paint."),
        ("editing", "en"): Words("<image>{}", "<image>"),
        ("understanding", "en"): Words("{}\n<image>"),
    }
)


@pytest.fixture(scope="module")
def raw_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped language model as if it was trained on rows as ROWS."""
    directory = tmp_path_factory.mktemp("checkpoint") / "raw"
    shutil.copytree(SHIPPED_RUN / "pretrain" / "artifact", directory)
    (directory / "manifest.json").unlink()
    RAW.save(directory)
    return directory


def test_the_record_travels_with_conversions_and_is_shown(
    raw_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(raw_checkpoint, tmp_path / "converted", "nexus-gen")
    assert Wording.load(tmp_path / "converted") == RAW
    assert models_main(["inspect", str(tmp_path / "converted")]) == 0
    assert "worded      generation, en: raw" in capsys.readouterr().out
    assert models_main(["inspect", str(SHIPPED_RUN / "pretrain" / "artifact")]) == 0
    assert "worded" not in capsys.readouterr().out


class SentError(Exception):
    """Ends the work when the prompt is known."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Collects the tokens of every prompt that reaches the model, and no more is done with it."""
    prompts: list[list[int]] = []

    def record(model: Any, input_ids: torch.Tensor, **_: Any) -> None:
        prompts.extend(input_ids.tolist())
        raise SentError

    monkeypatch.setattr(nexus_gen.inference, "generate_reply", record)
    return prompts


def tokens(model: NexusGen, messages: list[dict[str, str]], reply: str | None = None) -> list[int]:
    """Of a conversation about a picture of the size that is shown; of a training row unless a reply is begun."""
    picture = Image.new("RGB", (72, 72), "red")
    tags = "".join(message["content"] for message in messages).count("<image>")
    options: dict[str, Any] = {"consistent_edit_scale": model.paths.consistent_edit_scale}
    return encode(model.processor, messages, [picture] * tags, 5184, reply, **options)["input_ids"].tolist()


def ask(model: NexusGen, task: str, words: str, **options: Any) -> None:
    picture = Image.new("RGB", (72, 72), "red")
    with pytest.raises(SentError):
        if task == "generation":
            model.generate(words, **options)
        elif task == "editing":
            model.edit(picture, words, **options)
        else:
            model.understand(picture, words, **options)


@pytest.fixture(scope="module")
def models(raw_checkpoint: Path) -> dict[str, dict[str, NexusGen]]:
    """Checkpoint -> task -> its model; without a decoder for answers."""
    decoders = {"generation": DECODER_KINDS[0], "editing": DECODER_KINDS[1], "understanding": None}
    return {
        name: {
            task: NexusGen(ModelPaths.find(SHIPPED_RUN, decoder=kind, autoregressive=checkpoint), "cpu")
            for task, kind in decoders.items()
        }
        for name, checkpoint in {"raw": raw_checkpoint, "shipped": None}.items()
    }


@pytest.mark.parametrize("task", ROWS)
def test_what_is_sent_is_how_a_training_row_begins(
    task: str, models: dict[str, dict[str, NexusGen]], sent: list[list[int]]
) -> None:
    words, messages = ROWS[task]
    model = models["raw"][task]
    ask(model, task, words)
    in_training = tokens(model, messages)
    (prompt,) = sent
    assert in_training[: len(prompt)] == prompt
    follows = model.processor.tokenizer.decode(in_training[len(prompt) :])
    assert follows.startswith("Red." if task == "understanding" else "<|vision_start|>")


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize(("checkpoint", "options"), [("shipped", {}), ("raw", {"template": "released"})])
def test_a_checkpoint_without_a_record_is_asked_in_the_released_words(
    task: str, checkpoint: str, options: dict[str, str], models: dict[str, dict[str, NexusGen]], sent: list[list[int]]
) -> None:
    model = models[checkpoint][task]
    user, reply = {
        "generation": (f"{SENTENCE}Which one?", "Here is an image based on the description: "),
        "editing": ("<image> Which one?", "Here is the image: "),
        "understanding": ("<image>\nWhich one?", ""),
    }[task]
    ask(model, task, "Which one?", **options)
    assert sent == [tokens(model, [{"role": "user", "content": user}], reply)]


def test_the_command_says_what_it_sends_unless_that_is_released(
    raw_checkpoint: Path, sent: list[list[int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["generate", "--run", str(SHIPPED_RUN), "--device", "cpu", "--result-path", str(tmp_path / "x.png")]
    own = ["--autoregressive", str(raw_checkpoint)]
    for options, line in (
        (
            [*own, "--prompt", "Draw a cat."],
            'sent (--template trained): "Draw a cat."; system message "You paint."; reply "Here it comes: <image>"\n',
        ),
        (
            ["--prompt", "猫", "--template", "raw", "--reply", "<image>"],
            'sent (--template raw): "猫"; reply "<image>"\n',
        ),
        ([*own, "--prompt", "a cat", "--template", "released"], ""),
        (["--prompt", "a cat"], ""),
    ):
        with pytest.raises(SentError):
            main([*command, *options])
        assert capsys.readouterr().err == line


@pytest.mark.parametrize("template", ["trained", "released"])
def test_the_page_words_prompts_as_the_checkpoint_says(
    template: str, raw_checkpoint: Path, sent: list[list[int]], models: dict[str, dict[str, NexusGen]]
) -> None:
    served = ServedPaths.find(SHIPPED_RUN, raw_checkpoint, None, dict.fromkeys(DECODER_KINDS))
    tasks = Tasks(ServedModels(served, "cpu", template))
    request: Any = SimpleNamespace(session_hash="one")
    progress: Any = lambda *_, **__: None  # noqa: E731
    with pytest.raises(gr.Error):
        tasks.generate("Draw a cat.", 1, False, 1, 1.0, 3.5, "en", [], request, progress)
    model = models["shipped"]["generation"]
    system, user, assistant = (message["content"] for message in ROWS["generation"][1])
    expected = {
        "trained": tokens(
            model,
            [{"role": "system", "content": system}, {"role": "user", "content": user}],
            assistant.removesuffix("<image>"),
        ),
        "released": tokens(
            model,
            [{"role": "user", "content": f"{SENTENCE}Draw a cat."}],
            "Here is an image based on the description: ",
        ),
    }
    assert sent == [expected[template]]


def test_replies_of_many_kinds_are_left_to_the_model(models: dict[str, dict[str, NexusGen]]) -> None:
    """The model's own words, up to its picture, and then the picture that follows exactly these."""
    model = models["shipped"]["generation"]
    content = f"{SENTENCE}a red circle on a white background"
    own, at_once, both = (
        model.imagine_all([content] * len(replies), replies, [[]] * len(replies))
        for replies in ([None], [""], [None, "<image>"])
    )
    begun = model.imagine(content, "Here is an image based on the description: ", [])
    torch.testing.assert_close(own, begun, rtol=0, atol=1e-4)  # what it was trained to say
    assert not torch.allclose(own, at_once, atol=1e-2)
    torch.testing.assert_close(both, torch.cat([own, at_once]), rtol=0, atol=1e-4)
