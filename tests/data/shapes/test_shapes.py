"""The procedural dataset: reproducible bytes, truth that its pictures show, and splits that share no scene."""

import dataclasses
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from data.messages.rows import count_rows, read_rows
from data.shapes import dataset as shapes
from data.shapes.contents import (
    CAPTIONS,
    EDITS,
    NUMBERS,
    QUESTIONS,
    Imagination,
    ShapesConfig,
    is_new_pair,
    is_new_place,
)
from data.shapes.scenes import CELLS, CHINESE, COLOURS, GROUNDS, NEW_NAMES, SHAPES, Scene, Thing, draw, name, renamed
from nexus_gen.artifacts.artifact import verify
from nexus_gen.pictures.images import open_image
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import LANGUAGES

CONFIG = ShapesConfig(
    num_train=700,
    num_heldout=150,
    num_compositional=150,
    image_size=64,
    understanding=1.0,
    generation=1.0,
    editing=1.0,
    max_objects=4,
    num_colours=8,
    num_shapes=6,
    textured_fraction=0.3,
    chinese_fraction=0.4,
    num_questions=1,
    new_names=0.0,
)
SMALL = dataclasses.replace(CONFIG, num_train=90, num_heldout=10, num_compositional=10)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("shapes")
    return directory, shapes.draw_rows(directory, CONFIG, seed=7, num_workers=1)


def rows_of(directory: Path) -> Iterator[Any]:
    for split in shapes.SPLITS:
        yield from read_rows(directory / f"{split}.jsonl")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_bytes_depend_on_the_seed_and_not_on_the_workers(tmp_path):
    for copy, seed, num_workers in (("one", 1, 1), ("two", 1, 2), ("other", 2, 1)):
        shapes.draw_rows(tmp_path / copy, SMALL, seed, num_workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")["train.jsonl"] != contents(tmp_path / "other")["train.jsonl"]


def test_a_larger_dataset_starts_with_the_smaller_one(tmp_path):
    shapes.draw_rows(tmp_path / "small", SMALL, 1, 1)
    shapes.draw_rows(tmp_path / "large", dataclasses.replace(SMALL, num_train=100), 1, 1)
    small, large = ((tmp_path / name / "train.jsonl").read_text(encoding="utf-8") for name in ("small", "large"))
    assert large.startswith(small)


def test_rows_are_messages_of_the_task_that_their_truth_names(dataset):
    directory, counts = dataset
    tasks: Counter[str] = Counter()
    for split in shapes.SPLITS:
        tasks += count_rows(directory / f"{split}.jsonl", check_images="open").check().tasks
    assert tasks == counts["task"]
    assert counts["split"] == {split: getattr(CONFIG, f"num_{split}") for split in shapes.SPLITS}
    for row in rows_of(directory):
        assert row.task == row.truth["task"]
        assert len(row.images) == len(row.truth["scenes"])


def test_every_category_appears_in_both_languages_and_splits(dataset):
    directory, counts = dataset
    kinds = {("understanding", kind) for kind in QUESTIONS}
    kinds |= {("generation", kind) for kind in CAPTIONS} | {("editing", kind) for kind in EDITS}
    assert set(counts["category"]) == {f"{task}/{kind}" for task, kind in kinds}
    truths = [row.truth for row in rows_of(directory)]
    for facet in ("split", "language"):
        seen = {(truth["task"], truth["category"], truth[facet]) for truth in truths}
        expected = {(*kind, value) for kind in kinds for value in counts[facet]}
        assert seen == expected - {("generation", "single_object", "compositional")}
    chinese = counts["language"]["zh"] / len(truths)
    assert abs(chinese - CONFIG.chinese_fraction) < 0.08


def test_pictures_show_the_colours_of_their_truth(dataset):
    size = CONFIG.image_size
    for row in rows_of(dataset[0]):
        for path, scene in zip(row.images, row.truth["scenes"], strict=True):
            pixels = np.asarray(open_image(path)).astype(int)
            assert pixels.shape == (size, size, 3)
            for thing in scene["objects"]:
                x, y = (int(value * size) for value in thing["centre"])
                assert (tuple(pixels[y, x]) == COLOURS[thing["colour"]]) == (thing["shape"] != "ring")
            if scene["texture"] == "plain":
                taken = {thing["cell"] for thing in scene["objects"]}
                free = next(cell for cell in range(len(CELLS)) if cell not in taken)
                x, y = (int((value + 0.5) / 3 * size) for value in (free % 3, free // 3))
                assert tuple(pixels[y, x]) == GROUNDS[scene["ground"]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_objects_fill_their_bounding_boxes(shape, size):
    thing, pixels = Thing(shape, "red", size, 5), 300
    picture = np.asarray(draw(Scene((thing,), "white", "plain", 0), pixels)).astype(int)
    rows, columns = np.nonzero(np.abs(picture - GROUNDS["white"]).sum(axis=-1) > 100)
    drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(drawn, np.array(thing.truth()["bbox"]) * pixels, atol=1.5)


def test_a_larger_picture_shows_the_same_scene():
    thing = Thing("star", "blue", "large", 0)
    for texture in ("plain", "striped", "checked", "noisy", "gradient"):
        scene = Scene((thing,), "beige", texture, 3)
        small, large = (np.asarray(draw(scene, size)).astype(float) for size in (96, 480))
        shrunk = large.reshape(96, 5, 96, 5, 3).mean(axis=(1, 3))
        assert np.abs(shrunk - small).mean() < 1.5  # of 255; only edges differ


def test_splits_share_no_scene_of_a_task(dataset):
    scenes: dict[str, set[str]] = {split: set() for split in shapes.SPLITS}
    for row in rows_of(dataset[0]):
        truth = row.truth
        ordered = [
            (sorted(json.dumps(thing) for thing in scene["objects"]), scene["ground"], scene["texture"])
            for scene in truth["scenes"]
        ]
        scenes[truth["split"]].add(json.dumps([truth["task"], ordered]))
        assert row.id.startswith(truth["split"])
    assert all(scenes.values())
    for one, other in itertools.combinations(shapes.SPLITS, 2):
        assert not scenes[one] & scenes[other]


def combinations(row: Any) -> set[tuple[str, ...]]:
    """(colour, shape) and (colour, shape, position) of the objects of a row's pictures."""
    things = [thing for scene in row.truth["scenes"] for thing in scene["objects"]]
    return {(thing["colour"], thing["shape"]) for thing in things} | {
        (thing["colour"], thing["shape"], thing["position"]) for thing in things
    }


def test_every_compositional_row_combines_what_training_never_does(dataset):
    rows = list(rows_of(dataset[0]))
    seen = set().union(*(combinations(row) for row in rows if row.truth["split"] != "compositional"))
    things = [Thing(shape, colour, "large", cell) for shape in SHAPES for colour in COLOURS for cell in range(9)]
    new = {(thing.colour, thing.shape) for thing in things if is_new_pair(thing)}
    new |= {(thing.colour, thing.shape, CELLS[thing.cell]) for thing in things if is_new_place(thing)}
    assert not seen & new
    # Whatever is reserved, its parts are trained on.
    assert {shape for _, shape, *_ in seen} == set(SHAPES) and {colour for colour, *_ in seen} == set(COLOURS)
    pairs = [pair for pair in new if len(pair) == 2]
    assert sorted(shape for _, shape in pairs) == sorted(SHAPES)
    for row in rows:
        named = any(spoken in row.messages[0]["content"] for pair in pairs for spoken in spellings(*pair))
        if row.truth["split"] == "compositional":
            assert combinations(row) & new or named, row.id
        else:
            assert not named, row.id


def spellings(colour: str, shape: str) -> tuple[str, str]:
    """A colour and a shape as the words of a row name them."""
    return f"{colour} {shape}", CHINESE[colour] + CHINESE[shape]


def test_the_usual_colours_of_shapes_are_trained_on():
    for num_colours in range(3, len(COLOURS) + 1):
        config = dataclasses.replace(CONFIG, num_colours=num_colours)
        imagination = Imagination(config, np.random.default_rng(0))
        for shape in SHAPES:
            thing = imagination.usual(Thing(shape, "red", "large", 4))
            assert not is_new_pair(thing) and not is_new_place(thing)


def english(dataset: tuple[Path, Any], task: str, category: str) -> list[tuple[str, str, list[Any], list[Any]]]:
    """(The user's words, the reply, the objects of the first scene, those of the last one) of English rows."""
    return [
        (
            row.messages[0]["content"],
            row.messages[1]["content"],
            row.truth["scenes"][0]["objects"],
            row.truth["scenes"][-1]["objects"],
        )
        for row in rows_of(dataset[0])
        if (row.truth["task"], row.truth["category"], row.truth["language"]) == (task, category, "en")
    ]


def called(words: str, objects: list[Any]) -> Any:
    """The one object whose colour and shape the words name."""
    (found,) = [thing for thing in objects if f"{thing['colour']} {thing['shape']}" in words]
    return found


def test_answers_follow_from_the_truth(dataset):
    for words, answer, objects, _ in english(dataset, "understanding", "count"):
        assert answer == str(len(objects)), words
    for words, answer, objects, _ in english(dataset, "understanding", "colour"):
        assert [thing["colour"] for thing in objects if f"the {thing['shape']}" in words] == [answer]
    for words, answer, objects, _ in english(dataset, "understanding", "shape"):
        assert [thing["shape"] for thing in objects if thing["colour"] in words] == [answer]
    for words, answer, objects, _ in english(dataset, "understanding", "position"):
        assert called(words, objects)["position"] == answer
    for words, answer, objects, _ in english(dataset, "understanding", "relation"):
        one, other = (thing["centre"] for thing in sorted(objects, key=lambda thing: words.index(thing["colour"])))
        holds = {"left": one[0] < other[0], "right": one[0] > other[0]}
        holds |= {"above": one[1] < other[1], "below": one[1] > other[1]}
        assert holds[answer], words
    answers = Counter()
    for words, answer, objects, _ in english(dataset, "understanding", "yes_no"):
        there = any(f"{thing['colour']} {thing['shape']}" in words for thing in objects)
        assert answer == ("yes" if there else "no"), words
        answers[answer] += 1
    assert min(answers.values()) > 0.25 * answers.total()


def test_training_conversations_ask_several_questions_of_one_picture(tmp_path):
    config = dataclasses.replace(SMALL, generation=0.0, editing=0.0, num_questions=5, chinese_fraction=0.0)
    shapes.draw_rows(tmp_path, config, seed=3, num_workers=1)
    assert count_rows(tmp_path / "train.jsonl", check_images="open").check().rows == SMALL.num_train
    answers: Counter[str] = Counter()
    lengths: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for row in rows_of(tmp_path):
        pairs = list(zip(row.messages[::2], row.messages[1::2], strict=True))
        objects = row.truth["scenes"][0]["objects"]
        lengths[row.truth["split"], len(objects)].add(len(pairs))
        assert pairs[0][1]["content"] == row.truth["answer"]
        assert [question["content"].count("<image>") for question, _ in pairs] == [1, 0, 0, 0, 0][: len(pairs)]
        named = {f"{thing['colour']} {thing['shape']}" for thing in objects}
        for question, answer in pairs:
            words, said = question["content"], answer["content"]
            if words.startswith("How many"):
                assert said == str(len(objects))
            if said in ("yes", "no"):
                assert (said == "yes") == any(name in words for name in named), words
            if "colour" in words:
                assert any(thing["colour"] == said and thing["shape"] in words for thing in objects), words
            if "or below" in words:
                high, low = sorted((thing for thing in objects if thing_in(thing, words)), key=height)
                first = min((high, low), key=lambda thing: words.index(f"{thing['colour']} {thing['shape']}"))
                assert said == ("above" if first is high else "below")
            answers[said] += 1
    assert {"yes", "no", "above", "below", "left", "right", "1", "red"} <= set(answers)
    assert all(asked == {1} for (split, _), asked in lengths.items() if split != "train")
    assert lengths["train", 3] == {5} and max(lengths["train", 1]) <= 5


def test_what_was_said_is_not_asked_again() -> None:
    """Neither in the same words nor in others: once "the red cross" was named, nobody asks for its colour."""
    config = dataclasses.replace(SMALL, generation=0.0, editing=0.0, num_questions=8, chinese_fraction=0.0)
    later: Counter[str] = Counter()
    for index in range(400):
        content = shapes.content_of(config, 5, "train", index)
        asked, said = [content, *content.later], ""
        assert len({question.words for question in asked}) == len(asked)
        for question in asked:
            if question.category in ("colour", "shape", "yes_no"):
                (thing,) = question.about
                assert f"{thing.colour} {thing.shape}" not in said, question.words
                said += f" {thing.colour} {thing.shape}" if question.category != "yes_no" else ""
            said += question.words
        later.update(question.category for question in content.later)
    assert set(later) == set(QUESTIONS) and min(later.values()) > 100, later


def thing_in(thing: Any, words: str) -> bool:
    return f"{thing['colour']} {thing['shape']}" in words


def height(thing: Any) -> float:
    return thing["centre"][1]


def test_new_names_change_words_and_nothing_else(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, new_names=0.5, num_questions=2)
    directories = {share: tmp_path / str(share) for share in (0.0, 0.5)}
    for share, directory in directories.items():
        shapes.draw_rows(directory, dataclasses.replace(config, new_names=share), seed=7, num_workers=1)
    new = {word for names in NEW_NAMES.values() for word in names.values()}
    old = {name(word, language) for word in (*COLOURS, *SHAPES) for language in LANGUAGES}

    def names_in(text: str) -> tuple[bool, bool]:
        return any(word in text for word in old), any(word in text for word in new)

    num_changed = 0
    for usual, changed in zip(*map(rows_of, directories.values()), strict=True):
        assert changed.truth["scenes"] == usual.truth["scenes"] and changed.task == usual.task
        pairs = zip(usual.messages, changed.messages, strict=True)
        texts = [(message["content"], other["content"]) for message, other in pairs]
        num_changed += texts != [(text, text) for text, _ in texts]
        for text, other in texts:
            assert not names_in(text)[1]
            assert names_in(other) == (names_in(text) if text == other else (False, True))
        if changed.truth["split"] != "train":
            assert not any(names_in(other)[0] for _, other in texts)
    assert num_changed > 30
    assert renamed("three crosses and an orange square", "en") == "three pluses and a tangerine tile"


def test_captions_name_what_is_drawn(dataset):
    for words, _, objects, _ in english(dataset, "generation", "counting"):
        assert f"{NUMBERS['en'][len(objects) - 1]} {objects[0]['colour']} {objects[0]['shape']}" in words
    for category in ("colours", "colour_attribution", "position"):
        for words, _, objects, _ in english(dataset, "generation", category):
            assert all(f"{thing['colour']} {thing['shape']}" in words for thing in objects), words
    for words, _, objects, _ in english(dataset, "generation", "position"):
        assert len(objects) == 2 or f"the {objects[0]['position']} " in words.replace(",", " ")


def test_the_same_caption_draws_the_same_scene(dataset):
    drawn: dict[str, str] = {}
    for row in rows_of(dataset[0]):
        if row.task == "generation":
            scene = json.dumps([sorted(map(json.dumps, row.truth["scenes"][0]["objects"])), row.truth["language"]])
            assert drawn.setdefault(row.messages[0]["content"], scene) == scene


def test_edits_change_what_they_name_and_nothing_else(dataset):
    for words, _, source, target in english(dataset, "editing", "add"):
        (new,) = [thing for thing in target if thing not in source]
        assert called(words, target) == new and new["position"] in words
        assert len(target) == len(source) + 1 <= CONFIG.max_objects
    for words, _, source, target in english(dataset, "editing", "remove"):
        assert target == [thing for thing in source if thing != called(words, source)]
    for category, key in (("recolour", "colour"), ("move", "position"), ("replace", "shape")):
        for words, _, source, target in english(dataset, "editing", category):
            ((old, new),) = [pair for pair in zip(source, target, strict=True) if pair[0] != pair[1]]
            assert f"{old['colour']} {old['shape']}" in words and new[key] in words and old[key] != new[key]
            assert all(old[same] == new[same] for same in {"colour", "shape", "size", "cell"} - {key} - {"cell"})
    for words, _, source, target in english(dataset, "editing", "background"):
        assert source == target and any(ground in words for ground in GROUNDS)


def test_smallest_settings_draw_every_task(tmp_path):
    least = ShapesConfig(60, 20, 20, 32, 1.0, 1.0, 1.0, 2, 3, 3, 0.0, 0.0, 1, 0.0)
    counts = shapes.draw_rows(tmp_path, least, seed=0, num_workers=1)
    assert len(counts["category"]) == len(QUESTIONS) + len(CAPTIONS) + len(EDITS)
    assert counts["language"] == {"en": 100}


def test_a_task_without_a_share_is_not_drawn(tmp_path):
    counts = shapes.draw_rows(tmp_path, dataclasses.replace(SMALL, editing=0.0, generation=3.0), 0, num_workers=1)
    assert set(counts["task"]) == {"generation", "understanding"}
    assert counts["task"]["generation"] > 2 * counts["task"]["understanding"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train", 0),
        ("num_heldout", 0),
        ("num_compositional", -1),
        ("image_size", 8),
        ("max_objects", 7),
        ("num_colours", 9),
        ("num_shapes", 1),
        ("textured_fraction", 1.5),
        ("chinese_fraction", -0.1),
        ("understanding", -1.0),
        ("generation", float("nan")),
        ("editing", float("inf")),
        ("num_questions", 0),
        ("new_names", 1.1),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=f"shapes.{key} is {value}"):
        shapes.draw_rows(tmp_path, dataclasses.replace(CONFIG, **{key: value}), seed=0)


def test_the_stage_config_fits_the_schema():
    file = Path(__file__).parents[3] / "configs" / "stage" / "shapes.yaml"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ShapesConfig), OmegaConf.load(file).shapes))
    assert isinstance(config, ShapesConfig)
    config.check()


COMMAND = ["--num-train", "20", "--num-heldout", "5", "--num-compositional", "4", "--image-size", "32", "--seed", "3"]


def test_command_writes_an_artifact_and_replaces_it(tmp_path, capsys):
    out = tmp_path / "dataset"
    assert shapes.main(["shapes", str(out), *COMMAND]) == 0
    manifest = verify(out)
    assert (manifest.kind, manifest.stage, manifest.config["seed"]) == ("messages", "shapes", 3)
    assert manifest.details["split"] == {"train": 20, "heldout": 5, "compositional": 4}
    assert "20 train" in capsys.readouterr().out
    assert shapes.main(["shapes", str(out), *COMMAND, "--num-train", "4"]) == 0
    assert count_rows(out / "train.jsonl", check_images="open").check().rows == 4
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]


def test_command_refuses_what_it_did_not_write(tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        shapes.main(["shapes", str(out), *COMMAND])
    with pytest.raises(UserError, match="is a file"):
        shapes.main(["shapes", str(out / "chapter.tex"), *COMMAND])
    assert (out / "chapter.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="--seed is -1"):
        shapes.main(["shapes", str(tmp_path / "new"), "--seed", "-1"])
