"""The doctor's token lengths, against the template that training encodes with."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from swift.model import get_model_processor
from swift.template import get_template
from tiny_qwen import write_checkpoint

from data.doctor import command as doctor
from data.doctor.checks import RowChecker, inspect_picture, length_problem
from data.messages.rows import Row, read_rows
from data.messages.token_lengths import TokenLengths
from train.pretrain.plugin import NAME, NexusGenTemplate
from train.standins.tokenizers import train_qwen_tokenizer

MAX_PIXELS = 3000
SIZES = {"small.png": (5, 7), "wide.png": (300, 20), "large.png": (170, 90)}
WORDS = "Make the circle blue and the square red.\n\nWhat is this? It is a cat.\n 把圆形变成蓝色。"
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "What is a cat?"), ("assistant", "It is a cat.")],
    [("user", "<image>\nWhat is this?"), ("assistant", "\n\n It is a cat.  ")],
    [("user", "  把圆形变成蓝色 <image> \n"), ("assistant", "  <image>\n")],
    [("system", "Be red."), ("user", "<image><image> and <image>"), ("assistant", "<image>the<image>")],
    [("user", "<video> <bbox> <ref-object> <cot-process>"), ("assistant", "<audio> a cat <start-image> <img>a</img>")],
    [("system", ""), ("user", "What?"), ("assistant", "A cat.\n")],
    [("user", "What?"), ("assistant", "<image>"), ("user", "Make the circle <image>"), ("assistant", "\nblue <image>")],
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer joins letters, spaces and line ends, so that it matters where text is cut."""
    directory = tmp_path_factory.mktemp("models") / "qwen"
    write_checkpoint(directory)
    train_qwen_tokenizer([WORDS] * 20, 400).save_pretrained(directory)
    return directory


def rows(directory: Path) -> list[Row]:
    for name, size in SIZES.items():
        Image.new("RGB", size, "red").save(directory / name)
    with open(directory / "rows.jsonl", "w", encoding="utf-8") as file:
        for conversation in CONVERSATIONS:
            messages: list[dict[str, str]] = [{"role": role, "content": text} for role, text in conversation]
            num_images = sum(message["content"].count("<image>") for message in messages)
            images = [list(SIZES)[number % len(SIZES)] for number in range(num_images)]
            file.write(json.dumps({"images": images, "messages": messages}) + "\n")
    return list(read_rows(directory / "rows.jsonl"))


@pytest.mark.parametrize("dynamic_targets", [False, True])
@pytest.mark.parametrize("consistent_edit_scale", [False, True])
@pytest.mark.parametrize("num_target_tokens", [81, 25])
def test_lengths_are_those_of_training(
    num_target_tokens: int, dynamic_targets: bool, consistent_edit_scale: bool, qwen: Path, tmp_path: Path
) -> None:
    _, processor = get_model_processor(str(qwen), model_type=NAME, load_model=False)
    template: Any = get_template(processor, template_type=NAME, max_length=10_000, max_pixels=MAX_PIXELS)
    assert isinstance(template, NexusGenTemplate)
    template.set_mode("train")
    template.dynamic_targets, template.consistent_edit_scale = dynamic_targets, consistent_edit_scale
    template.num_target_tokens = num_target_tokens
    found = rows(tmp_path)
    options = (dynamic_targets, consistent_edit_scale, num_target_tokens)
    checker = RowChecker("header", lengths=TokenLengths(qwen, MAX_PIXELS, *options))
    lengths = checker.measure(found, [checker.pictures(row) for row in found])
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for row, length in zip(found, lengths, strict=True):
        ids = template.encode({"messages": row.messages, "images": [str(image) for image in row.images]})["input_ids"]
        assert length is not None
        assert length.total == len(ids), row.messages
        places = [place for first, end in length.pictures for place in range(first, end)]
        assert places == [place for place, token in enumerate(ids) if token == image_token], row.messages


def test_a_config_says_how_many_tokens_a_target_has(qwen: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    data = {"train": "t.jsonl", "heldout": "h.jsonl", "max_pixels": MAX_PIXELS}
    config.write_text(yaml.safe_dump({"model": {"qwen": str(qwen), "num_target_tokens": 25}, "data": data}))
    given = doctor.parser().parse_args(["--config", str(config)])
    lengths = doctor.token_lengths(given, doctor.read_config(config))
    row = rows(tmp_path)[2]
    assert lengths is not None and lengths.picture_tokens(row, [(170, 90)] * 2)[-1] == 25
    assert TokenLengths(qwen, MAX_PIXELS).picture_tokens(row, [(170, 90)] * 2)[-1] == 81


def test_a_cut_says_which_pictures_it_would_hit(qwen: Path, tmp_path: Path) -> None:
    lengths = TokenLengths(qwen, MAX_PIXELS)
    row = rows(tmp_path)[3]
    sizes = [inspect_picture(image, "header", False).size for image in row.images]
    (length,) = lengths.measure([row], [[size for size in sizes if size]])
    first, end = length.pictures[3]
    assert end - first == 81
    assert length_problem(length, length.total) is None
    assert (over := length_problem(length, length.total - 1)) and over.kind == "too_long"
    assert (cut := length_problem(length, first + 1)) and cut.kind == "cut_picture"
    assert f"cut picture 4 in two (tokens {first} to {end}) and the 1 behind it of 5" in cut.reason
    assert (lost := length_problem(length, first)) and "lose picture 4 and the 1 behind it" in lost.reason
