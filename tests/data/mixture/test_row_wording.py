"""How rows are worded: sets of rows against templates written by hand, and what the doctor says of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.doctor.command import main as data_check
from data.mixture.order import Mixture
from data.mixture.wording import NUM_ROWS, learn, sample, trained_wording
from nexus_gen.parts.models import SHIPPED_RUN
from nexus_gen.parts.wording import Wording, Words
from nexus_gen.specs.prompts import EDITING_REPLY, GENERATION_REPLY

HERE = "Here is the image: <image>"
RELEASED = "Generate an image according to the following description: {}"
RELEASED_ZH = "根据以下描述生成一张图像：{}"
THINGS = ("a cat", "a dog", "a cow", "an owl", "the sun", "a red bus", "two cups", "a tree", "a fox", "rain")


def row(user: Any, reply: str = HERE, system: str = "", *more: str) -> dict[str, Any]:
    turns = [user, reply, *more]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    num_tags = json.dumps(messages).count("<image>")
    system_turn = [{"role": "system", "content": system}] if system else []
    return {"images": ["a.png", "b.png", "a.png"][:num_tags], "messages": [*system_turn, *messages]}


def write(directory: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    for picture, colour in (("a.png", "red"), ("b.png", "blue")):
        image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
        Image.blend(image, Image.new("RGB", image.size, colour), 0.3).save(directory / picture)
    (directory / name).write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return directory / name


def learned(directory: Path, rows: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    return learn(sample(Mixture(write(directory, rows), seed=0)))


def each(template: str, *arguments: Any) -> list[dict[str, Any]]:
    return [row(template.replace("{}", thing), *arguments) for thing in THINGS]


@pytest.mark.parametrize(
    ("rows", "task", "language", "user", "reply"),
    [
        (each("Draw {}."), "generation", "en", "Draw {}.", HERE),
        (each("{}"), "generation", "en", "{}", HERE),
        (each("Please paint a picture of {}!"), "generation", "en", "Please paint a picture of {}!", HERE),
        (each("Prompt: {}"), "generation", "en", "Prompt: {}", HERE),
        (each("Zeichne {}."), "generation", "en", "{}", HERE),  # a request in a language that is not known is raw
        (each(RELEASED), "generation", "en", RELEASED, HERE),
        (each(RELEASED_ZH), "generation", "zh", RELEASED_ZH, HERE),
        ([row(f"画{one}。") for one in ("一只猫", "一只狗", "红色的圆")], "generation", "zh", "画{}。", HERE),
        ([row("Draw a cat.")] * 9, "generation", "en", "{}", HERE),  # one constant prompt has no place for words
        # A request in half of the rows alone is a way of typing, no template.
        ([*each("Draw {}."), *each("{}")], "generation", "en", "{}", HERE),
        ([row("A red circle"), row("A red square"), row("A red star")], "generation", "en", "{}", HERE),
        (each("Draw {}.", "<image>"), "generation", "en", "Draw {}.", "<image>"),
        (each("<image> Add {}."), "editing", "en", "<image> {}", HERE),
        (each("<image>\nAdd {}."), "editing", "en", "<image>\n{}", HERE),
        ([row(f"<image> <image>\nPut in {one}.") for one in THINGS], "editing", "en", "<image>\n{}", HERE),
        (each("Instruction: add {} <image>"), "editing", "en", "Instruction: {} <image>", HERE),
        (each("<image>\nWhere is {}?", "Left."), "understanding", "en", "<image>\n{}", ""),
        (each("{}?\n<image>", "Left."), "understanding", "en", "{}\n<image>", ""),
        (
            each("<image>\nWhere is {}?\nAnswer in one word.", "Left."),
            "understanding",
            "en",
            "<image>\n{}\nAnswer in one word.",
            "",
        ),
        (each("Picture: <image>\nQuestion: where is {}?", "Left."), "understanding", "en", None, ""),
        # Only the first of several exchanges counts.
        ([row(f"Draw {one}.", HERE, "", "Why?", "So.") for one in THINGS], "generation", "en", "Draw {}.", HERE),
    ],
)
def test_what_rows_share_is_their_template(
    rows: list[dict[str, Any]], task: str, language: str, user: str | None, reply: str, tmp_path: Path
) -> None:
    found = learned(tmp_path, rows)
    assert list(found) == [(task, language)]
    words = found[task, language].words
    assert words.user == (user or "Picture: <image>\nQuestion: {}")
    assert (words.reply, words.fixed_reply, words.system) == (reply, True, "")
    assert found[task, language].kinds[next(iter(found[task, language].kinds))] == 1


def test_the_most_frequent_of_several_requests_is_recorded_with_all_their_shares(tmp_path: Path) -> None:
    found = learned(tmp_path, [*each("Draw {}."), *each("Draw {}."), *each("Please paint {}")])
    words = found["generation", "en"].words
    assert words.user == "Draw {}." and words.shares == {"Draw {}.": 0.6667, "Please paint {}": 0.3333}
    assert set(words.examples) <= set(THINGS) and len(words.examples) == 3


def test_mixed_rows_go_by_the_most_and_say_how_many_are_otherwise(tmp_path: Path) -> None:
    rows = [row(RELEASED.replace("{}", f"{n} cats"), GENERATION_REPLY["en"]) for n in range(7)]
    found = learned(tmp_path, [*rows, *each("{}")[:3]])["generation", "en"]
    assert found.kinds == {"released": 0.7, "raw": 0.3}
    assert (found.words.user, found.words.reply, found.words.fixed_reply) == (RELEASED, GENERATION_REPLY["en"], True)
    assert found.unlike["raw"][0] == "{}" and found.unlike["raw"][1] in THINGS


def test_replies_that_follow_the_prompt_are_the_models_own(tmp_path: Path) -> None:
    found = learned(tmp_path, [row(f"Draw {one}.", f"This is {one}: <image>") for one in THINGS])
    assert not found["generation", "en"].words.fixed_reply


def test_a_system_message_of_nearly_all_rows_is_recorded(tmp_path: Path) -> None:
    rows = [row(f"Draw {one}.", HERE, "You are a painter.") for one in THINGS]
    found = learned(tmp_path, rows[:8] + each("Draw {}.")[8:])["generation", "en"]
    assert found.words.system == "You are a painter." and found.system_share == 0.8


def test_pictures_among_the_words_cannot_be_asked_for(tmp_path: Path) -> None:
    rows = [row(f"Put <image> beside <image>, not {one}.") for one in THINGS]
    assert learned(tmp_path, rows)["editing", "en"].words is None
    found = learned(tmp_path, [*rows[:4], *each("<image> Add {}.")[:6]])["editing", "en"]
    assert found.words.user == "<image> {}" and found.kinds == {"raw": 0.6, "pictures among the words": 0.4}


def test_captions_and_edits_without_words_are_worded_as_released(tmp_path: Path) -> None:
    captions: list[dict[str, Any]] = [{"image": "a.png", "caption": text} for text in ("a cat", "a dog", "一只猫")]
    edits = [
        {"source_image": "a.png", "target_image": "b.png", "instruction": text} for text in ("Crop it.", "Dim it.")
    ]
    found = learned(tmp_path, [*captions, *edits])
    assert {key: (of.words.user, of.words.reply) for key, of in found.items()} == {
        ("generation", "en"): (RELEASED, GENERATION_REPLY["en"]),
        ("generation", "zh"): (RELEASED_ZH, GENERATION_REPLY["zh"]),
        ("editing", "en"): ("<image> {}", EDITING_REPLY["en"]),
    }


def test_broken_rows_and_text_are_passed_over_and_many_rows_are_sampled(tmp_path: Path) -> None:
    path = write(tmp_path, [row(f"Draw thing {n}.") for n in range(NUM_ROWS + 1000)])
    with open(path, "a", encoding="utf-8") as file:
        file.write("{\n" * 2000 + json.dumps({"messages": row("Hi", "Hello")["messages"]}) + "\n")
    mixture = Mixture(path, seed=3)
    exchanges = list(sample(mixture))
    assert 2000 < len(exchanges) < NUM_ROWS  # about 72% of the rows are good
    assert sum(count for _, count in exchanges) == pytest.approx(NUM_ROWS + 1000, rel=0.03)
    assert exchanges == list(sample(Mixture(path, seed=3)))
    assert learn(exchanges)["generation", "en"].words.user == "Draw {}."  # type: ignore[union-attr]


def test_a_mixture_counts_rows_as_often_as_it_draws_them(tmp_path: Path) -> None:
    write(tmp_path, each("{}"), "raw.jsonl")
    write(tmp_path, [row(RELEASED.replace("{}", one)) for one in THINGS], "released.jsonl")
    mixture = tmp_path / "mixture.yaml"
    sources = [{"path": "raw.jsonl", "weight": 1}, {"path": "released.jsonl", "weight": 3}]
    mixture.write_text(json.dumps({"sources": sources, "epoch_rows": 40}))
    assert learn(sample(Mixture(mixture, seed=0)))["generation", "en"].kinds == {"released": 0.75, "raw": 0.25}


def test_texts_to_choose_from_count_as_they_are_drawn(tmp_path: Path) -> None:
    texts = {"short": [RELEASED.replace("{}", "a cat")], "long": ["a cat on a sofa", "a sofa below a cat"]}
    write(tmp_path, [row(texts)])
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(json.dumps({"sources": [{"path": "rows.jsonl", "count": 400, "captions": {"long": 1}}]}))
    found = learn(sample(Mixture(mixture, seed=0)))["generation", "en"]
    assert found.kinds == {"raw": 1} and 0 < len(found.words.examples) <= 2  # type: ignore[union-attr]


def test_a_checkpoint_records_its_rows_and_keeps_what_it_was_before(tmp_path: Path) -> None:
    mixture = Mixture(write(tmp_path, each("Draw {}.")), seed=0)
    drawn = ("Draw {}.", HERE)

    def recorded(start: Path) -> dict[tuple[str, str], tuple[str, str]]:
        return {key: (words.user, words.reply) for key, words in trained_wording(mixture, start).words.items()}

    shipped = SHIPPED_RUN / "pretrain" / "artifact"
    assert recorded(shipped) == {("generation", "en"): drawn}  # and the released words for everything else
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for file in shipped.iterdir():
        (earlier / file.name).symlink_to(file)
    Wording({("generation", "en"): Words("Paint {}", HERE), ("editing", "zh"): Words("<image>{}", HERE)}).save(earlier)
    assert recorded(earlier) == {("generation", "en"): drawn, ("editing", "zh"): ("<image>{}", HERE)}
    plain_qwen = tmp_path / "qwen"  # whose weights have no embeddings to begin a picture with
    assert recorded(plain_qwen) == {("generation", "en"): drawn, ("generation", "zh"): drawn}


def checked(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = data_check(["check", str(path), "--images", "exists", "--num-workers", "1", *options])
    return status, capsys.readouterr().out


def test_the_doctor_shows_the_wording_and_the_option_that_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = checked(write(tmp_path, [*each("Draw {}."), *each("<image> Add {}.")]), capsys, "--strict")
    assert status == 0 and "nothing is wrong" in said
    assert re.search(
        r'generation, en +100% "Draw \{\}\.", such as "Draw .*\."; reply "Here is the image: <image>"', said
    )
    assert f"--template 'Draw {{}}.' --reply '{HERE}'" in said
    assert re.search(r"editing, en +100% released, such as", said)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([*each(RELEASED), *each("{}")[:5]], "generation, en: 33% of the rows are worded otherwise than generate will"),
        ([*each(RELEASED), *each("Draw {}.")[:5]], "or give it --template 'Draw {}.' for prompts like that"),
        ([*each("{}"), *each(RELEASED)[:5]], "or give it --template released for prompts like that"),
        (
            [*each("Draw {}.")[:5], *[row(f"Draw {one}.", HERE, "Paint!") for one in THINGS]],
            "generation, en: 33% of the rows have a system message of their own, and generate will send no other",
        ),
        (
            [*each("<image> Add {}.", HERE), *[row(f"Put <image> on <image>, {one}.") for one in THINGS]],
            "editing, en: 50% of the rows have pictures among the words",
        ),
    ],
)
def test_rows_that_inference_would_word_otherwise_are_a_warning(
    rows: list[dict[str, Any]], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, rows)
    status, said = checked(path, capsys, "--report", str(tmp_path / "page.html"))
    assert (status == 0 and f"warning  wording: {sentence}" in said) or sentence in said
    assert "nothing is wrong" not in said
    assert checked(path, capsys, "--strict")[0] == 1
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>Wording</h2>" in page and "Nothing is wrong" not in page
    assert "of the rows" in page


def test_one_row_in_a_hundred_is_no_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(f"{RELEASED.replace('{}', one)} {n}") for n in range(10) for one in THINGS]
    assert "wording:" not in checked(write(tmp_path, [*rows, row("a cat")]), capsys)[1]
