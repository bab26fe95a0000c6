"""How a checkpoint's training rows were worded, so that inference words prompts the same way. No torch.

`wording.json` beside a checkpoint's config.json holds it, by task and language:

    {"generation": {"en": {"user": "Draw {}.", "reply": "Here is the image: <image>", "shares": {"Draw {}.": 1.0}}}}

`{}` is where a person's words go, `<image>` where a picture goes. A checkpoint without the file, such as a released
one, is worded as the released model; so is every task and language that the file does not name. `data.mixture.wording`
learns it from rows.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import (
    EDITING_PROMPT,
    EDITING_REPLY,
    GENERATION_PROMPT,
    GENERATION_REPLY,
    IMAGE_TAG,
    LANGUAGES,
    UNDERSTANDING_PROMPT,
    language_of,
)

WORDING = "wording.json"
TRAINED, RELEASED, RAW = TEMPLATES = ("trained", "released", "raw")
COMMANDS = {"understanding": "understand", "generation": "generate", "editing": "edit"}
HOLE = "{}"
PUNCTUATION = ".!?。！？…"
TAG_BEFORE, TAG_BEHIND = re.compile(rf"{IMAGE_TAG}\s*"), re.compile(rf"\s*{IMAGE_TAG}")
# How a request for a picture begins. A template may begin so, and a prompt that does is in need of none.
INSTRUCTION = re.compile(
    r"\s*(?:(?:please|kindly),? )?(?:(?:can|could|will|would) you (?:please )?|i(?: want| need|'d like| would like) "
    r"(?:you to )?|let's )?"
    r"(?:draw|paint|sketch|generate|create|make|produce|render|imagine|illustrate|design|depict|visuali[sz]e|show|give)"
    r"(?: me| us)?"
    r"(?: (?:an?|the|one|some) (?:\w+ )?(?:image|picture|photo|photograph|painting|drawing|illustration|sketch)s?"
    r"(?: (?:of|showing|depicting|that shows|with|for|from))?)?\s+(?=\S)"
    r"|\s*(?:请你?|麻烦你?|帮我|给我|为我|我想要?|能否|可以)*(?:画出?|绘制|生成|创作|制作|创建|描绘)"
    r"(?:一?[张幅个]?(?:图片|图像|照片|画)[，：:]\s*)?(?=\S)",
    re.IGNORECASE,
)


class Turn(NamedTuple):
    """What is sent. reply: how the model's begins, its `<image>` included; None lets the model write its own words."""

    user: str
    reply: str | None
    system: str


class Frame(NamedTuple):
    """A template's own words around those of a person, without the tags of pictures."""

    lead: str
    tail: str

    @staticmethod
    def of(template: str) -> "Frame":
        before, _, behind = template.partition(HOLE)
        return Frame(TAG_BEFORE.sub("", before), TAG_BEHIND.sub("", behind))


def bare(template: str) -> str:
    """The template with the tags of pictures as its only frame."""
    before, _, behind = template.partition(HOLE)
    return "".join(TAG_BEFORE.findall(before)) + HOLE + "".join(TAG_BEHIND.findall(behind))


@dataclass(frozen=True)
class Words:
    """How one task is worded in one language.

    user: the template of user messages; a picture's tag in it stands for those of all pictures. reply: the model's;
    empty for answers. fixed_reply: whether nearly all rows have that reply; if not, the model writes its own words up
    to the picture. system: the system message; empty for none. shares: each template of the rows -> its share of them.
    examples: words of rows, as a person would type them.
    """

    user: str
    reply: str = ""
    fixed_reply: bool = True
    system: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)
    examples: tuple[str, ...] = ()

    def turn(self, words: str, num_pictures: int = 0) -> Turn:
        """A person's words as the rows would say them."""
        return Turn(self.message(words, num_pictures), self.reply if self.fixed_reply else None, self.system)

    def message(self, words: str, num_pictures: int = 0) -> str:
        """The user message. Words that already stand in one of the templates, or in a part of one, get no second.

        Where the template is a request for a picture ("Draw {}."), any other request ("Please paint a cat") is sent
        as it is.
        """
        template = next((one for one in (self.user, *self.shares) if begins_with(words, Frame.of(one).lead)), None)
        if template is None and is_request(Frame.of(self.user).lead) and INSTRUCTION.match(words):
            template = bare(self.user)
        return filled(template or self.user, words, num_pictures)


def begins_with(words: str, lead: str) -> bool:
    """Whether words start with a template's lead, in upper or lower case, and say more after it."""
    words = words.lstrip().lower()
    return bool(lead) and words.startswith(lead.lower()) and words != lead.lower()


def is_request(lead: str) -> bool:
    """Whether a template begins with a request for a picture and with nothing else."""
    found = INSTRUCTION.match(f"{lead}x")
    return found is not None and found.end() == len(lead)


def filled(template: str, words: str, num_pictures: int) -> str:
    """The template around words, less what of it they have themselves, with a tag for each picture."""
    before, _, behind = template.partition(HOLE)
    lead, tail = Frame.of(template)
    if begins_with(words, lead):
        words = words.lstrip()[len(lead) :]
    said = words.rstrip()
    if tail and said.endswith(tail.rstrip()):
        words = said.removesuffix(tail.rstrip())
    elif tail and tail in PUNCTUATION and said[-1:] in PUNCTUATION:
        behind = behind.removeprefix(tail)
    before = TAG_BEFORE.sub(lambda tag: tag[0] * num_pictures, before)
    return before + words + TAG_BEHIND.sub(lambda tag: tag[0] * num_pictures, behind)


RELEASED_WORDS: Mapping[tuple[str, str], Words] = {
    key: words
    for language in LANGUAGES
    for key, words in {
        ("understanding", language): Words(UNDERSTANDING_PROMPT),
        ("generation", language): Words(GENERATION_PROMPT[language], GENERATION_REPLY[language]),
        ("editing", language): Words(EDITING_PROMPT, EDITING_REPLY[language]),
    }.items()
}


@dataclass(frozen=True)
class Wording:
    """Words by (task, language); those of the released model where it has none."""

    words: Mapping[tuple[str, str], Words] = field(default_factory=dict)

    def of(self, task: str, language: str) -> Words:
        """language: en or zh."""
        return self.words.get((task, language)) or RELEASED_WORDS[task, language]

    def turn(self, task: str, words: str, num_pictures: int = 0, language: str | None = None) -> Turn:
        """What is sent for a person's words; language: that of the words unless given."""
        return self.of(task, language or language_of(words)).turn(words, num_pictures)

    def kind(self, task: str, language: str) -> str:
        """`released`, `raw` where a user message is a person's words and nothing else, or the template."""
        words = self.of(task, language)
        sent = (words.user, words.reply, words.fixed_reply, words.system)
        for spoken in LANGUAGES:
            released = RELEASED_WORDS[task, spoken]
            if sent == (released.user, released.reply, True, ""):
                return RELEASED
        return RAW if words.user == bare(words.user) else words.user

    def recorded(self) -> dict[str, str]:
        """`task, language` -> how it is worded, in a few words: `released`, `raw`, or the template in quotes."""
        kinds = {key: self.kind(*key) for key in self.words}
        return {
            ", ".join(key): kind if kind in TEMPLATES else json.dumps(kind, ensure_ascii=False)
            for key, kind in kinds.items()
        }

    def examples(self, task: str) -> list[str]:
        """Words of rows, in every language that they have."""
        return [words for language in LANGUAGES for words in self.of(task, language).examples]

    def under(self, template: str = TRAINED, reply: str | None = None) -> "Wording":
        """Another wording. template: one of TEMPLATES, or a text with `{}`. reply: of pictures, with `<image>`.

        `raw` changes user messages only: the replies stay those of training.
        """
        changed = {key: self.of(*key) for key in RELEASED_WORDS} if template != RELEASED else dict(RELEASED_WORDS)
        for key, words in changed.items():
            if template == RAW:
                typed = tuple(words.message(example) for example in words.examples)
                changed[key] = words = replace(words, user=bare(words.user), shares={}, examples=typed)
            elif HOLE in template:
                user = template if IMAGE_TAG in template else bare(words.user).replace(HOLE, template)
                changed[key] = words = replace(words, user=user, shares={})
            if reply is not None and words.reply:
                changed[key] = replace(words, reply=reply, fixed_reply=True)
        return Wording(changed)

    @staticmethod
    def load(checkpoint: Path) -> "Wording":
        """Of a checkpoint's directory. Raises UserError for a file that is damaged."""
        path = checkpoint / WORDING
        if not path.is_file():
            return Wording()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            read = {
                (task, language): words_from(of_language)
                for task, of_task in values.items()
                for language, of_language in of_task.items()
            }
            if unknown := read.keys() - RELEASED_WORDS.keys():
                raise ValueError(f"there is no {' in '.join(min(unknown))}")
            return Wording(read)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is not a readable record of how rows were worded ({error}); copy it again"
            ) from error

    def save(self, checkpoint: Path) -> None:
        values: dict[str, dict[str, Any]] = {}
        for (task, language), words in sorted(self.words.items()):
            values.setdefault(task, {})[language] = asdict(words)
        write_text_atomic(checkpoint / WORDING, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def words_from(values: dict[str, Any]) -> Words:
    """Raises ValueError or TypeError for what is no record of words."""
    words = Words(**{**values, "examples": tuple(values.get("examples", ()))})
    texts = (words.user, words.reply, words.system, *words.shares, *words.examples)
    numbers = (words.fixed_reply, *words.shares.values())
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(one, int | float) for one in numbers):
        raise TypeError("a text or a number is none")
    for template in (words.user, *words.shares):
        if template.count(HOLE) != 1:
            raise ValueError(f"the template {template!r} needs one {HOLE}")
    if words.reply and words.reply.count(IMAGE_TAG) != 1:
        raise ValueError(f"the reply {words.reply!r} needs one {IMAGE_TAG}")
    return words


def check_template(template: str, reply: str | None = None) -> None:
    """UserError unless these are what `--template` and `--reply` take."""
    if template not in TEMPLATES and template.count(HOLE) != 1:
        raise UserError(
            f"--template {template!r} is none of {', '.join(TEMPLATES)}; a template of your own holds {HOLE} once, "
            f"where the words go: 'Draw {HOLE}.'"
        )
    if reply is not None and reply.count(IMAGE_TAG) != 1:
        raise UserError(f"--reply {reply!r} needs {IMAGE_TAG} once, where the picture goes: 'Here it is: {IMAGE_TAG}'")
