"""What the rows of the procedural dataset are about: questions, captions and edits of scenes, in two languages."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from data.shapes.scenes import CELLS, COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene, Thing, name, renamed
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.keys import described, key

TASKS = ("understanding", "generation", "editing")
CAPTIONS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")  # as in GenEval
# Cells of objects whose place a caption does not say, by their number.
CANONICAL = {1: (4,), 2: (3, 5), 3: (3, 4, 5), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8), 6: (0, 2, 3, 5, 6, 8)}
# Every cell but the middle one, where single objects of captions stand.
AROUND = tuple(cell for cell in range(len(CELLS)) if cell != 4)
# The cells of two objects, one to the left of (right of, above, below) the other.
SIDES = {"left": (3, 5), "right": (5, 3), "above": (1, 7), "below": (7, 1)}
NUMBERS = {"en": ("one", "two", "three", "four", "five", "six"), "zh": ("一", "两", "三", "四", "五", "六")}
PREPOSITIONS = {"left": "on", "right": "on", "centre": "in"}
YES_NO = {"en": ("yes", "no"), "zh": ("有", "没有")}
CHINESE_SIDES = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}

# Templates: {thing} is "red circle", {a_thing} "a red circle"; `other` and `new` alike; {at} is "at the top left".
Templates = dict[str, dict[str, tuple[str, ...]]]
QUESTIONS: Templates = {
    "colour": {
        "en": ("What colour is the {shape}?", "Which colour does the {shape} have?"),
        "zh": ("{shape}是什么颜色？", "图中的{shape}是什么颜色的？"),
    },
    "shape": {
        "en": ("What shape is the {colour} object?", "Which shape is {colour}?"),
        "zh": ("{colour}的是什么形状？", "{colour}物体是什么形状？"),
    },
    "count": {
        "en": ("How many shapes are there?", "How many objects are in the picture?"),
        "zh": ("图中有几个形状？", "图里一共有多少个物体？"),
    },
    "position": {
        "en": ("Where is the {thing}?", "In which part of the picture is the {thing}?"),
        "zh": ("{thing}在哪里？", "{thing}在图中的什么位置？"),
    },
    "relation": {
        "en": ("Is the {thing} {sides} the {other}?",),
        "zh": ("{thing}在{other}的{sides}？",),
    },
    "yes_no": {
        "en": ("Is there {a_thing}?", "Does the picture show {a_thing}?"),
        "zh": ("图中有{thing}吗？", "能看到{thing}吗？"),
    },
}
FRAMES = {
    "en": ("{subject} on {ground}", "a photo of {subject} on {ground}", "a picture of {subject}, drawn on {ground}"),
    "zh": ("{subject}，{ground}", "一张图片：{subject}，{ground}", "一幅画：{subject}，{ground}"),
}
EDITS: Templates = {
    "add": {
        "en": ("add {a_new} {at}", "put {a_new} {at}"),
        "zh": ("在{at}添加{a_new}", "在{at}画{a_new}"),
    },
    "remove": {
        "en": ("remove the {thing}", "delete the {thing}"),
        "zh": ("去掉{thing}", "删除{thing}"),
    },
    "recolour": {
        "en": ("make the {thing} {colour}", "change the colour of the {thing} to {colour}"),
        "zh": ("把{thing}变成{colour}", "把{thing}的颜色改为{colour}"),
    },
    "move": {
        "en": ("move the {thing} so that it is {at}", "put the {thing} {at} instead"),
        "zh": ("把{thing}移到{at}", "将{thing}的位置改到{at}"),
    },
    "replace": {
        "en": ("replace the {thing} with {a_new}", "turn the {thing} into {a_new}"),
        "zh": ("把{thing}换成{a_new}", "用{a_new}代替{thing}"),
    },
    "background": {
        "en": ("change the background to {ground}", "make the background {ground}"),
        "zh": ("把背景换成{ground}", "将背景改为{ground}"),
    },
}

CATEGORIES = {"understanding": tuple(QUESTIONS), "generation": CAPTIONS, "editing": tuple(EDITS)}

# Questions which colour and shape go together. A yes or a no says least, so it is asked as often as both others.
PAIRINGS = ("colour", "shape", "yes_no", "yes_no")
TRIES = 4  # for each further question, before a conversation ends

Choice = TypeVar("Choice")


@described
class ShapesConfig:
    """How much is drawn, and how varied: the fewer colours, shapes and textures, the smaller a model that learns it.

    The names that `new_names` means are data.shapes.scenes.NEW_NAMES.
    """

    num_train: int = key("Rows of train.jsonl", "rows")
    num_heldout: int = key("Rows of heldout.jsonl", "rows")
    num_compositional: int = key("Rows of compositional.jsonl, whose combinations training never shows", "rows")
    image_size: int = key("Side of the pictures", "pixels")
    understanding: float = key("Share of the rows that ask about a picture, relative to the other two tasks")
    generation: float = key("Share of the rows that ask for a picture, relative to the other two tasks")
    editing: float = key("Share of the rows that ask to change a picture, relative to the other two tasks")
    max_objects: int = key("Objects in any picture at most", "objects")
    num_colours: int = key("Colours in use, the first ones of the palette")
    num_shapes: int = key("Shapes in use, the first ones of the list")
    textured_fraction: float = key("Share of the scenes that have a textured ground, from 0 to 1")
    chinese_fraction: float = key("Share of the rows that are in Chinese, from 0 to 1; the others are English")
    num_questions: int = key("Questions about one picture in a training row at most; rows of the other splits ask one")
    new_names: float = key(
        "Share of the training rows that use invented names, from 0 to 1; above 0, all rows of the other splits do"
    )

    def check(self) -> None:
        """UserError for numbers out of range."""
        for number, low, high in (
            ("num_train", 1, 10**7),
            ("num_heldout", 1, 10**7),
            ("num_compositional", 0, 10**7),
            ("image_size", 32, 2048),
            ("max_objects", 2, max(CANONICAL)),
            ("num_colours", 3, len(COLOURS)),
            ("num_shapes", 3, len(SHAPES)),
            ("textured_fraction", 0, 1),
            ("chinese_fraction", 0, 1),
            ("num_questions", 1, 64),
            ("new_names", 0, 1),
        ):
            if not low <= getattr(self, number) <= high:
                raise UserError(f"shapes.{number} is {getattr(self, number)}; it must be from {low} to {high}")
        shares = {task: getattr(self, task) for task in TASKS}
        if not (all(0 <= share < float("inf") for share in shares.values()) and sum(shares.values()) > 0):
            given = ", ".join(f"shapes.{task} is {share}" for task, share in shares.items())
            raise UserError(f"{given}; give shares of 0 or more, at least one of them above 0")


@dataclass(frozen=True)
class Content:
    """What a row is about, before it is drawn: the user's words, the answer, and one or two scenes.

    category: the type of a question, the category of a caption, or the operation of an edit.
    answer: of a question; empty for the other tasks. scenes: of an edit, the source and the target.
    absent: what the words name and no scene shows. later: further questions about the scene.
    about: the things that a question is about.
    """

    task: str
    category: str
    language: str
    words: str
    answer: str
    scenes: tuple[Scene, ...]
    absent: Thing | None = None
    later: tuple["Content", ...] = ()
    about: tuple[Thing, ...] = ()

    @property
    def is_compositional(self) -> bool:
        """Whether its pictures or words combine what is never combined in training."""
        shown = any(is_new_pair(thing) or is_new_place(thing) for scene in self.scenes for thing in scene.things)
        named = self.absent is not None and is_new_pair(self.absent)
        return shown or named or any(content.is_compositional for content in self.later)

    @property
    def key(self) -> str:
        """The same for contents that differ in wording, language, question or order of objects only."""
        scenes = [
            (sorted(dataclasses.astuple(thing) for thing in scene.things), scene.ground, scene.texture)
            for scene in self.scenes
        ]
        return json.dumps([self.task, scenes])


def named(questions: list[Content]) -> set[Thing]:
    """Things whose colour and shape these questions say, or their answers: that they are there is said, too."""
    return {thing for question in questions if not question.absent for thing in question.about}


def is_told(question: Content, earlier: list[Content]) -> bool:
    """Whether the earlier questions and answers answer this one to who never sees the picture."""
    alike = [other for other in earlier if other.category == question.category]
    if question.category in PAIRINGS:
        return bool(named(earlier) & set(question.about)) or any(other.words == question.words for other in alike)
    return any(set(other.about) == set(question.about) for other in alike)


def with_new_names(content: Content) -> Content:
    words, answer = (renamed(text, content.language) for text in (content.words, content.answer))
    return replace(content, words=words, answer=answer, later=tuple(map(with_new_names, content.later)))


def is_new_pair(thing: Thing) -> bool:
    """Whether a colour and a shape meet in the compositional split only, in pictures and in words.

    One colour for each shape, never its usual one, so every colour and every shape is met in other company.
    """
    return tuple(COLOURS).index(thing.colour) == SHAPES.index(thing.shape) + 2


def is_new_place(thing: Thing) -> bool:
    """Whether a thing of this colour and shape stands in this cell in the compositional split only.

    One cell for each colour and shape, never the middle one. The factors spread the usual colours over the cells.
    """
    step = 3 * tuple(COLOURS).index(thing.colour) - 2 * SHAPES.index(thing.shape) + 2
    return thing.cell == AROUND[step % len(AROUND)]


def noun(thing: Thing, language: str, *facts: str) -> str:
    """The thing called by some of its facts, by colour and shape unless said."""
    words = [name(getattr(thing, fact), language) for fact in facts or ("colour", "shape")]
    return ("" if language == "zh" else " ").join(words)


def a(words: str, language: str) -> str:
    """With the indefinite article or measure word."""
    if language == "zh":
        return f"一个{words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def many(count: int, words: str, language: str) -> str:
    number = NUMBERS[language][count - 1]
    if language == "zh":
        return f"{number}个{words}"
    return f"{number} {words}{'es' if words.endswith('s') else 's'}"


def at(cell: int, language: str) -> str:
    """The place of a cell, with its preposition in English."""
    place = name(CELLS[cell], language)
    if language == "zh":
        return place
    return f"{PREPOSITIONS.get(place, 'at')} the {place}"


def background(scene: Scene, language: str) -> str:
    words = [name(word, language) for word in (scene.ground, scene.texture) if word != "plain"]
    return "".join(words) + "背景" if language == "zh" else f"a {' '.join(words)} background"


class Imagination:
    """Draws contents at random within a config."""

    def __init__(self, config: ShapesConfig, generator: np.random.Generator) -> None:
        self.config = config
        self.generator = generator
        self.colours = tuple(COLOURS)[: config.num_colours]
        self.shapes = SHAPES[: config.num_shapes]

    def pick(self, values: Sequence[Choice]) -> Choice:
        return values[int(self.generator.integers(len(values)))]

    def happens(self, probability: float) -> bool:
        return bool(self.generator.random() < probability)

    def number(self, least: int, most: int) -> int:
        return int(self.generator.integers(least, most + 1))

    def task(self) -> str:
        shares = np.array([getattr(self.config, task) for task in TASKS])
        return TASKS[self.generator.choice(len(TASKS), p=shares / shares.sum())]

    def language(self) -> str:
        return "zh" if self.happens(self.config.chinese_fraction) else "en"

    def content(self, task: str, category: str, language: str, num_questions: int = 1) -> Content:
        if task == "understanding":
            return self.conversation(category, language, num_questions)
        return {"generation": self.caption, "editing": self.edit}[task](category, language)

    def scene(self, num_things: int) -> Scene:
        """Things in different cells; their shapes differ and their colours, as far as the palettes reach."""
        cells = self.generator.permutation(len(CELLS))
        shapes = self.generator.permutation(len(self.shapes))
        colours = self.generator.permutation(len(self.colours))
        things = tuple(
            Thing(
                shape=self.shapes[shapes[index % len(shapes)]],
                colour=self.colours[colours[index % len(colours)]],
                size=self.pick(tuple(SIZES)),
                cell=int(cells[index]),
            )
            for index in range(num_things)
        )
        texture = self.pick(TEXTURES) if self.happens(self.config.textured_fraction) else "plain"
        return Scene(things, self.pick(tuple(GROUNDS)), texture, self.number(0, 2**31 - 1))

    def distinct(self, least: int = 1, room: int = 0) -> Scene:
        """A scene in which shape or colour alone tells the things apart; `room` for so many more things."""
        most = min(self.config.max_objects - room, len(self.shapes), len(self.colours))
        return self.scene(self.number(least, most))

    def conversation(self, kind: str, language: str, num_questions: int) -> Content:
        """A question of a kind about a scene made for it, and further ones about the same scene.

        First those that ask which colour and shape go together, since all others say it. They end before num_questions
        where what was said tells what else could be asked.
        """
        if kind == "count":
            scene = self.scene(self.number(1, self.config.max_objects))
        else:
            scene = self.scene(2) if kind == "relation" else self.distinct()
        asked = [self.question(kind, language, scene)]
        # More objects than colours or shapes look alike: only their number can be asked for without doubt.
        unlike = len(scene.things) <= min(len(self.shapes), len(self.colours))
        others = ("count",) + ("position",) * unlike + ("relation",) * (unlike and len(scene.things) > 1)
        for _ in range(TRIES * (num_questions - 1)):
            pairs = unlike and not set(scene.things) <= named(asked)
            further = self.question(self.pick(PAIRINGS if pairs else others), language, scene)
            if not is_told(further, asked):
                asked.append(further)
        return replace(asked[0], later=tuple(asked[1:num_questions]))

    def question(self, kind: str, language: str, scene: Scene) -> Content:
        thing = self.pick(scene.things)
        about: tuple[Thing, ...] = (thing,)
        words = {"shape": name(thing.shape, language), "colour": name(thing.colour, language)}
        absent = None
        if kind in ("colour", "shape"):
            answer = words[kind]
        elif kind == "count":
            answer, about = str(len(scene.things)), ()
        elif kind == "position":
            answer = name(CELLS[thing.cell], language)
        elif kind == "relation":
            if len(scene.things) == 2:
                thing, other = scene.things
            else:
                other = self.pick([other for other in scene.things if other != thing])
            about = (thing, other)
            words["other"] = noun(other, language)
            words["sides"], answer = relation(thing, other, language)
        else:
            there = self.happens(0.5)
            answer = YES_NO[language][not there]
            if not there:  # all but right: the colour or the shape is in the picture
                near = [replace(thing, shape=shape) for shape in self.shapes]
                near += [replace(thing, colour=colour) for colour in self.colours]
                thing = absent = self.missing(near, scene)
        words["thing"] = noun(thing, language)
        words["a_thing"] = a(words["thing"], language)
        question = self.pick(QUESTIONS[kind][language]).format(**words)
        return Content("understanding", kind, language, question, answer, (scene,), absent, about=about)

    def missing(self, things: Sequence[Thing], scene: Scene) -> Thing:
        """One of the things that differs from all in the scene by shape or colour."""
        there = {(other.shape, other.colour) for other in scene.things}
        return self.pick([thing for thing in things if (thing.shape, thing.colour) not in there])

    def caption(self, kind: str, language: str) -> Content:
        """A caption and the picture that it determines.

        What it leaves open is fixed: things are large, stand in CANONICAL cells, and have the usual colour of their
        shape. A mean-squared loss would teach the average of the choices otherwise.
        """
        scene = self.scene(2)
        thing, other = (replace(thing, size="large") for thing in scene.things)
        things: tuple[Thing, ...]
        cells: tuple[int, ...] = ()
        if kind == "single_object":
            things = (self.usual(scene.things[0]),)
            subject = a(noun(things[0], language, "size", "shape"), language)
        elif kind == "two_objects":
            things = (self.usual(thing), self.usual(other))
            one, two = (a(noun(thing, language, "shape"), language) for thing in things)
            subject = both(one, two, language)
        elif kind == "counting":
            things = (thing,) * self.number(2, self.config.max_objects)
            subject = many(len(things), noun(thing, language), language)
        elif kind == "colours":
            things = (thing,)
            subject = a(noun(thing, language), language)
        elif kind == "position" and self.happens(0.5):
            things = (thing,)
            cells = (thing.cell,)
            place, words = at(thing.cell, language), noun(thing, language)
            subject = f"位于{place}的{a(words, language)}" if language == "zh" else f"{a(words, language)} {place}"
        else:
            things = (thing, other)
            one, two = (a(noun(thing, language), language) for thing in things)
            if kind == "position":
                side = self.pick(tuple(SIDES))
                cells = SIDES[side]
                subject = beside(one, two, side, language)
            else:
                subject = both(one, two, language)
        cells = cells or CANONICAL[len(things)]
        placed = tuple(replace(thing, cell=cell) for thing, cell in zip(things, cells, strict=True))
        scene = replace(scene, things=placed)
        caption = self.pick(FRAMES[language]).format(subject=subject, ground=background(scene, language))
        return Content("generation", kind, language, caption, "", (scene,))

    def usual(self, thing: Thing) -> Thing:
        """In the colour that its shape has where nothing is said."""
        return replace(thing, colour=self.colours[self.shapes.index(thing.shape) % len(self.colours)])

    def edit(self, kind: str, language: str) -> Content:
        source = self.distinct(least=2 if kind == "remove" else 1, room=1 if kind == "add" else 0)
        index = self.number(0, len(source.things) - 1)
        thing = source.things[index]
        words = {"thing": noun(thing, language)}
        target, new = source, thing
        if kind == "background":
            ground = self.pick([other for other in GROUNDS if other != source.ground])
            target = replace(source, ground=ground, texture="plain")
            words["ground"] = name(ground, language)
        elif kind == "remove":
            target = replace(source, things=source.things[:index] + source.things[index + 1 :])
        elif kind == "recolour":
            new = replace(thing, colour=self.pick([colour for colour in self.colours if colour != thing.colour]))
        elif kind == "replace":
            new = replace(thing, shape=self.pick([shape for shape in self.shapes if shape != thing.shape]))
        else:
            taken = {other.cell for other in source.things}
            cell = self.pick([cell for cell in range(len(CELLS)) if cell not in taken])
            if kind == "add":
                any_thing = [Thing(shape, colour, "large", cell) for shape in self.shapes for colour in self.colours]
                new = self.missing(any_thing, source)
                target = replace(source, things=(*source.things, new))
            else:
                new = replace(thing, cell=cell)
        if target is source:
            target = replace(source, things=(*source.things[:index], new, *source.things[index + 1 :]))
        words |= {
            "a_new": a(noun(new, language), language),
            "colour": name(new.colour, language),
            "at": at(new.cell, language),
        }
        instruction = self.pick(EDITS[kind][language]).format(**words)
        return Content("editing", kind, language, instruction, "", (source, target))


def both(one: str, other: str, language: str) -> str:
    return f"{one}和{other}" if language == "zh" else f"{one} and {other}"


def beside(one: str, other: str, side: str, language: str) -> str:
    """One thing on a side of the other."""
    if language == "zh":
        return f"{one}在{other}的{CHINESE_SIDES[side]}"
    return f"{one} {f'to the {side} of' if side in ('left', 'right') else side} {other}"


def relation(thing: Thing, other: Thing, language: str) -> tuple[str, str]:
    """(The two sides asked about, the one that holds), along the axis on which the cells differ more."""
    across, down = thing.cell % 3 - other.cell % 3, thing.cell // 3 - other.cell // 3
    if abs(across) >= abs(down):
        side = "left" if across < 0 else "right"
        sides = "to the left or to the right of"
    else:
        side = "above" if down < 0 else "below"
        sides = "above or below"
    if language == "en":
        return sides, side
    return ("左边还是右边" if side in ("left", "right") else "上面还是下面"), CHINESE_SIDES[side]
