"""The procedural dataset: questions, captions and edits about coloured shapes, with ground truth beside each row.

nexus-gen data shapes OUT --num-train 10000 --image-size 252

Deterministic in its seed. A row belongs to the split that the hash of its words and scene says, so train and held-out
rows never share content.
"""

import argparse
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data.scenes import CELLS, COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene, Thing, draw, name
from nexus_gen.specs.artifact import MANIFEST, Manifest, building, seal, write_text_atomic
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import (
    EDITING_PROMPT,
    EDITING_REPLY,
    GENERATION_PROMPT,
    GENERATION_REPLY,
    UNDERSTANDING_PROMPT,
)

HELDOUT_SHARE = 8  # one in so many contents may only be held out
ROWS_PER_CHUNK = 64
QUESTIONS = ("colour", "shape", "count", "position", "relation", "yes_no")
CAPTIONS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
EDITS = ("add", "remove", "recolour", "move", "replace", "background")
# Cells of objects whose place a caption does not say, by their number.
CANONICAL = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8), 6: (0, 2, 3, 5, 6, 8)}
ENGLISH_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
CHINESE_NUMBERS = ("零", "一", "两", "三", "四", "五", "六")


@dataclass
class ShapesConfig:
    """How much is drawn, and how varied: the fewer colours, shapes and textures, the smaller a model that learns it.

    understanding, generation, editing: relative shares of the tasks. textured, chinese: fractions of the rows.
    """

    num_train: int
    num_heldout: int
    image_size: int
    understanding: float
    generation: float
    editing: float
    max_objects: int
    num_colours: int
    num_shapes: int
    textured: float
    chinese: float

    def check(self) -> None:
        """UserError for numbers out of range."""
        for key, low, high in (
            ("num_train", 1, 10**9),
            ("num_heldout", 1, 10**9),
            ("image_size", 16, 4096),
            ("max_objects", 2, max(CANONICAL)),
            ("num_colours", 3, len(COLOURS)),
            ("num_shapes", 2, len(SHAPES)),
            ("textured", 0, 1),
            ("chinese", 0, 1),
        ):
            if not low <= getattr(self, key) <= high:
                raise UserError(f"shapes.{key} is {getattr(self, key)}; it must be from {low} to {high}")
        shares = (self.understanding, self.generation, self.editing)
        if min(shares) < 0 or sum(shares) <= 0:
            raise UserError(f"shapes.understanding, generation and editing are {shares}; give shares of 0 or more")


@dataclass(frozen=True)
class Content:
    """What a row is about, before it is drawn: the user's words, the answer, and one or two scenes."""

    task: str
    category: str
    language: str
    words: str
    answer: str
    scenes: tuple[Scene, ...]

    def is_heldout(self) -> bool:
        """The split that this content belongs to, whatever the seed."""
        things = [sorted(dataclasses.astuple(thing) for thing in scene.things) for scene in self.scenes]
        key = json.dumps([self.task, self.words, things], ensure_ascii=False)
        return hashlib.sha256(key.encode()).digest()[0] % HELDOUT_SHARE == 0


class Imagination:
    """Draws contents at random within a config."""

    def __init__(self, config: ShapesConfig, generator: np.random.Generator) -> None:
        self.config = config
        self.generator = generator
        self.colours = list(COLOURS)[: config.num_colours]
        self.shapes = SHAPES[: config.num_shapes]

    def pick(self, values: Any) -> Any:
        return values[int(self.generator.integers(len(values)))]

    def content(self) -> Content:
        config = self.config
        shares = np.array([config.understanding, config.generation, config.editing])
        make = [self.question, self.caption, self.edit][self.generator.choice(3, p=shares / shares.sum())]
        language = "zh" if self.generator.random() < config.chinese else "en"
        return make(language)

    def scene(self, num_things: int, **same: str) -> Scene:
        """Things of different shape and colour in different cells; `same` fixes a shape or a colour for all."""
        cells = self.generator.permutation(len(CELLS))[:num_things]
        shapes = [
            self.shapes[i % len(self.shapes)] for i in self.generator.permutation(max(num_things, len(self.shapes)))
        ]
        colours = [
            self.colours[i % len(self.colours)] for i in self.generator.permutation(max(num_things, len(self.colours)))
        ]
        things = tuple(
            replace(Thing(shape, colour, self.pick(tuple(SIZES)), int(cell)), **same)
            for shape, colour, cell in zip(shapes, colours, cells, strict=False)
        )
        texture = self.pick(TEXTURES) if self.generator.random() < self.config.textured else "plain"
        return Scene(things, self.pick(tuple(GROUNDS)), texture, int(self.generator.integers(2**31)))

    def some_things(self, least: int = 1) -> int:
        return int(self.generator.integers(least, min(self.config.max_objects, self.config.num_shapes) + 1))

    def question(self, language: str) -> Content:
        kind = self.pick(QUESTIONS)
        zh = language == "zh"
        scene = self.scene(2 if kind == "relation" else self.some_things())
        if kind == "count":
            scene = self.scene(int(self.generator.integers(1, self.config.max_objects + 1)))
        thing = self.pick(scene.things)
        colour, shape = name(thing.colour, language), name(thing.shape, language)
        if kind == "colour":
            words, answer = (f"{shape}是什么颜色？" if zh else f"What colour is the {shape}?"), colour
        elif kind == "shape":
            words, answer = (f"{colour}的是什么形状？" if zh else f"What shape is the {colour} object?"), shape
        elif kind == "count":
            words, answer = ("图中有几个形状？" if zh else "How many shapes are there?"), str(len(scene.things))
        elif kind == "position":
            words = f"{colour}{shape}在哪里？" if zh else f"Where is the {colour} {shape}?"
            answer = name(CELLS[thing.cell], language)
        elif kind == "relation":
            words, answer = self.relation(scene, language)
        else:
            asked = thing.shape if self.generator.random() < 0.5 else self.pick(self.shapes)
            there = any((other.colour, other.shape) == (thing.colour, asked) for other in scene.things)
            asked_name = name(asked, language)
            words = f"图中有{colour}{asked_name}吗？" if zh else f"Is there a {colour} {asked_name}?"
            answer = ("有" if there else "没有") if zh else ("yes" if there else "no")
        return Content("understanding", kind, language, words, answer, (scene,))

    def relation(self, scene: Scene, language: str) -> tuple[str, str]:
        """Which side of the other the first thing is on, along the axis on which they differ more."""
        first, second = scene.things
        across, down = first.cell % 3 - second.cell % 3, first.cell // 3 - second.cell // 3
        if abs(across) >= abs(down):
            answer = ("左" if across < 0 else "右") if language == "zh" else ("left" if across < 0 else "right")
            sides = "左边还是右边" if language == "zh" else "to the left or to the right of"
        else:
            answer = ("上" if down < 0 else "下") if language == "zh" else ("above" if down < 0 else "below")
            sides = "上面还是下面" if language == "zh" else "above or below"
        one, other = self.noun(first, language), self.noun(second, language)
        return (f"{one}在{other}的{sides}？" if language == "zh" else f"Is the {one} {sides} the {other}?"), answer

    def noun(self, thing: Thing, language: str) -> str:
        gap = "" if language == "zh" else " "
        return f"{name(thing.colour, language)}{gap}{name(thing.shape, language)}"

    def caption(self, language: str) -> Content:
        """What a caption leaves open is fixed (large things in CANONICAL cells), so that it determines its picture."""
        kind = self.pick(CAPTIONS)
        zh = language == "zh"
        count = 2 if kind in ("two_objects", "colour_attribution") else 1
        same = {}
        if kind == "counting":
            count = int(self.generator.integers(2, self.config.max_objects + 1))
            same = {"shape": self.pick(self.shapes), "colour": self.pick(self.colours)}
        if kind != "single_object":
            same["size"] = "large"
        scene = self.scene(count, **same)
        if kind != "position":
            placed = [replace(thing, cell=cell) for thing, cell in zip(scene.things, CANONICAL[count], strict=True)]
            scene = replace(scene, things=tuple(placed))
        thing, noun = scene.things[0], self.noun(scene.things[0], language)
        if kind == "counting":
            number = (CHINESE_NUMBERS if zh else ENGLISH_NUMBERS)[count]
            words = f"{number}个{noun}" if zh else f"{number} {noun}s"
        elif kind in ("two_objects", "colour_attribution"):
            other = self.noun(scene.things[1], language)
            words = f"一个{noun}和一个{other}" if zh else f"a {noun} and a {other}"
        elif kind == "position":
            where = name(CELLS[thing.cell], language)
            words = f"{where}有一个{noun}" if zh else f"a {noun} at the {where}"
        elif kind == "single_object":
            size = name(thing.size, language)
            words = f"一个{size}{noun}" if zh else f"a {size} {noun}"
        else:
            words = f"一个{noun}" if zh else self.pick((f"a {noun}", f"a photo of a {noun}", f"one {noun}"))
        return Content("generation", kind, language, words + self.on_ground(scene, language), "", (scene,))

    def on_ground(self, scene: Scene, language: str) -> str:
        ground = name(scene.ground, language)
        if language == "zh":
            return f"，{ground}{'' if scene.texture == 'plain' else name(scene.texture, language)}背景"
        texture = "" if scene.texture == "plain" else f" {scene.texture}"
        return f" on a {ground}{texture} background"

    def edit(self, language: str) -> Content:
        kind = self.pick(EDITS)
        zh = language == "zh"
        scene = self.scene(self.some_things(2 if kind == "remove" else 1))
        index = int(self.generator.integers(len(scene.things)))
        thing = scene.things[index]
        noun = self.noun(thing, language)
        free = [cell for cell in range(len(CELLS)) if cell not in {other.cell for other in scene.things}]
        changed: Thing | None = thing
        ground = scene.ground
        if kind == "add":
            new = replace(self.scene(1).things[0], cell=self.pick(free))
            where = name(CELLS[new.cell], language)
            words = (
                f"在{where}添加一个{self.noun(new, language)}"
                if zh
                else f"add a {self.noun(new, language)} at the {where}"
            )
            return self.edited(kind, language, words, scene, (*scene.things, new), ground)
        if kind == "remove":
            changed, words = None, (f"去掉{noun}" if zh else f"remove the {noun}")
        elif kind == "recolour":
            colour = self.pick([colour for colour in self.colours if colour not in {t.colour for t in scene.things}])
            changed = replace(thing, colour=colour)
            words = f"把{noun}变成{name(colour, language)}" if zh else f"make the {noun} {colour}"
        elif kind == "move":
            changed = replace(thing, cell=self.pick(free))
            where = name(CELLS[changed.cell], language)
            words = f"把{noun}移到{where}" if zh else f"move the {noun} to the {where}"
        elif kind == "replace":
            changed = replace(thing, shape=self.pick([shape for shape in self.shapes if shape != thing.shape]))
            new_noun = self.noun(changed, language)
            words = f"把{noun}换成{new_noun}" if zh else f"replace the {noun} with a {new_noun}"
        else:
            ground = self.pick([other for other in GROUNDS if other != scene.ground])
            words = f"把背景换成{name(ground, language)}" if zh else f"change the background to {ground}"
        things = [changed if place == index else other for place, other in enumerate(scene.things)]
        return self.edited(kind, language, words, scene, tuple(other for other in things if other), ground)

    def edited(
        self, kind: str, language: str, words: str, scene: Scene, things: tuple[Thing, ...], ground: str
    ) -> Content:
        return Content("editing", kind, language, words, "", (scene, replace(scene, things=things, ground=ground)))


def content_of(config: ShapesConfig, seed: int, heldout: bool, index: int) -> Content:
    """The index-th content of a split; drawn again until it belongs there."""
    generator = np.random.default_rng((seed, int(heldout), index))
    imagination = Imagination(config, generator)
    while (content := imagination.content()).is_heldout() != heldout:
        pass
    return content


def messages_of(content: Content) -> list[dict[str, str]]:
    if content.task == "understanding":
        pair = UNDERSTANDING_PROMPT.format(content.words), content.answer
    elif content.task == "generation":
        pair = GENERATION_PROMPT[content.language].format(content.words), GENERATION_REPLY[content.language]
    else:
        pair = EDITING_PROMPT.format(content.words), EDITING_REPLY[content.language]
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]


def draw_chunk(job: tuple[str, ShapesConfig, int, str, int, int]) -> list[str]:
    """Draw a range of a split's pictures; returns its rows as JSON lines."""
    directory, config, seed, split, first, last = job
    lines = []
    for index in range(first, last):
        content = content_of(config, seed, split == "heldout", index)
        images = []
        for number, scene in enumerate(content.scenes):
            images.append(f"images/{split}-{index:07d}-{number}.png")
            draw(scene, config.image_size).save(os.path.join(directory, images[-1]), compress_level=1)
        truth = {
            "category": content.category,
            "language": content.language,
            "answer": content.answer,
            "scenes": [scene.truth() for scene in content.scenes],
        }
        row = {
            "id": f"{split}-{index:07d}",
            "source": "shapes",
            "images": images,
            "messages": messages_of(content),
            "truth": {**truth, "task": content.task},
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    return lines


def draw_rows(directory: Path, config: ShapesConfig, seed: int, num_workers: int | None = None) -> dict[str, Any]:
    """Write train.jsonl, heldout.jsonl and images/ into a directory; the bytes do not depend on num_workers.

    Returns counts of rows by split, task, category and language. Raises UserError for a config out of range.
    """
    config.check()
    (directory / "images").mkdir(parents=True, exist_ok=True)
    counts: dict[str, Counter[str]] = {key: Counter() for key in ("split", "task", "category", "language")}
    # Forked workers: a fresh interpreter would import for longer than a chunk takes.
    with get_context("fork").Pool(num_workers or os.cpu_count()) as pool:
        for split, total in (("train", config.num_train), ("heldout", config.num_heldout)):
            jobs = [
                (str(directory), config, seed, split, first, min(first + ROWS_PER_CHUNK, total))
                for first in range(0, total, ROWS_PER_CHUNK)
            ]
            lines = [line for chunk in pool.imap(draw_chunk, jobs) for line in chunk]
            write_text_atomic(directory / f"{split}.jsonl", "\n".join(lines) + "\n")
            for truth in (json.loads(line)["truth"] for line in lines):
                counts["split"][split] += 1
                counts["task"][truth["task"]] += 1
                counts["category"][f"{truth['task']}/{truth['category']}"] += 1
                counts["language"][truth["language"]] += 1
    return {key: dict(counter) for key, counter in counts.items()}


def arguments(argv: list[str]) -> Iterator[Any]:
    """The output directory, then the config, then the seed, from a command line."""
    parser = argparse.ArgumentParser(prog="nexus-gen data shapes", description="Draw the dataset of coloured shapes.")
    parser.add_argument("out", type=Path, help="directory to make")
    defaults = ShapesConfig(4000, 200, 252, 1.0, 1.0, 1.0, 3, 6, 4, 0.2, 0.3)
    for field in dataclasses.fields(ShapesConfig):
        value = getattr(defaults, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    given = vars(parser.parse_args(argv))
    yield given.pop("out")
    yield given.pop("seed")
    yield ShapesConfig(**given)


def main(argv: list[str]) -> int:
    out, seed, config = arguments(argv[1:])
    config.check()
    if out.exists() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise UserError(f"{out} holds other files; give an empty or a new directory")
        Manifest.load(out).require("messages", out)
    with building(out) as directory:
        counts = draw_rows(directory, config, seed)
        settings = {**dataclasses.asdict(config), "seed": seed}
        seal(directory, Manifest("messages", "shapes", settings, inputs={}, code={}, details=counts))
    print(f"{out}: " + ", ".join(f"{count} {split} rows" for split, count in counts["split"].items()))
    return 0
