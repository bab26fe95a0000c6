"""How the rows of a dataset are worded: what `pretrain` records in its checkpoint and `nexus-gen data check` shows.

Of each row the first exchange counts, which is all that inference asks. Its user message is taken apart into a person's
words and a template around them:

- the released sentence;
- what nearly all other rows share: up to a picture or a colon before the words, from a line's end on behind them;
- a request for a picture ("Please paint"), told by its words, where nearly all of these rows begin with one.

Everything else is raw: messages that a person types as they are.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.messages.rows import Row, RowError
from data.mixture.order import Mixture
from nexus_gen.parts.models import target_tokens_of
from nexus_gen.parts.wording import HOLE, INSTRUCTION, PUNCTUATION, RAW, RELEASED, Wording, Words, bare
from nexus_gen.specs.prompts import GENERATION_PROMPT, IMAGE_TAG, LANGUAGES, language_of

NUM_ROWS = 4096  # of the training order that are looked at
NEARLY_ALL = 0.9
MIXED = 0.05  # of the rows of a task and language, from which on others than the most are worth a warning
LONGEST = 300  # characters of a template's own words, before or behind those of a person
NUM_SHARES = 8  # templates that are recorded
NUM_EXAMPLES, EXAMPLE = 3, 200  # recorded, and characters of each
TEMPLATE, OTHER = "template", "pictures among the words"
LEAD_ENDS = re.compile(rf"(?:^|:\s*|：\s*|\n){IMAGE_TAG}\s*|:\s+(?!{IMAGE_TAG})|：\s*(?!{IMAGE_TAG})")
TAIL_STARTS = re.compile(rf"\s*{IMAGE_TAG}\s*$|\n+")
TAG_FIRST, TAG_LAST = re.compile(rf"\s*{IMAGE_TAG}\s*"), re.compile(rf"\s*{IMAGE_TAG}\s*$")
TAGS_IN_A_ROW = re.compile(rf"(?:{IMAGE_TAG}\s*)+({IMAGE_TAG}\s*)")


class Said(NamedTuple):
    """The first exchange of a row. user: one tag stands for several pictures in a row. reply: to its first picture."""

    task: str
    language: str
    system: str
    user: str
    reply: str


class Parts(NamedTuple):
    """A user message, taken apart: the template around the words, the words."""

    template: str
    words: str


@dataclass(frozen=True)
class Worded:
    """The rows of a task in a language.

    words: what inference takes from them, None where it can take nothing. kinds: `released`, `raw`, TEMPLATE and
    OTHER -> share of the rows, beginning with that of `words`. message: of a row that is worded so. unlike: each other
    kind -> the template and the message of its first row. system_share: of the rows that have the system message of
    `words`.
    """

    words: Words | None
    kinds: Mapping[str, float]
    message: str
    unlike: Mapping[str, tuple[str, str]]
    system_share: float


def said_in(row: Row) -> Said | None:
    """None for an exchange without pictures."""
    turns = [message["content"] for message in row.messages if message["role"] != "system"]
    system = row.messages[0]["content"] if row.messages[0]["role"] == "system" else ""
    user, reply = turns[:2]
    if IMAGE_TAG not in user + reply:
        return None
    made, seen = IMAGE_TAG in reply, IMAGE_TAG in user
    task = "understanding" if not made else "editing" if seen else "generation"
    reply = f"{reply.split(IMAGE_TAG)[0]}{IMAGE_TAG}" if made else ""
    return Said(task, language_of(user), system, TAGS_IN_A_ROW.sub(lambda tags: tags[1], user), reply)


def sample(mixture: Mixture) -> Iterator[tuple[Said, float]]:
    """First exchanges of the training order, some thousands at most, and how many rows each stands for.

    Rows of rehearsal are worded as what was learned before, and left out.
    """
    num_rows = min(NUM_ROWS, mixture.epoch_rows)
    for position in range(num_rows):
        draw = mixture.draw(position)
        if draw.source >= mixture.spec.num_own:
            continue
        try:
            said = said_in(mixture.row(draw))
        except RowError:  # training names it
            continue
        if said is not None:
            yield said, mixture.epoch_rows / num_rows


def learn(exchanges: Iterable[tuple[Said, float]]) -> dict[tuple[str, str], Worded]:
    """How rows are worded, by (task, language). exchanges: as of `sample`."""
    groups: dict[tuple[str, str], dict[Said, float]] = defaultdict(lambda: defaultdict(float))
    for said, count in exchanges:
        groups[said.task, said.language][said] += count
    return {key: _learn_group(groups[key]) for key in sorted(groups)}


def trained_wording(own: Mixture, start: Path) -> Wording:
    """What a checkpoint records that is trained on a person's own rows, beginning with the checkpoint `start`.

    For tasks and languages without rows that is what `start` records. A plain Qwen2.5-VL never saw the released words:
    there a language without rows is worded as the other one.
    """
    found = {key: of.words for key, of in learn(sample(own)).items() if of.words is not None}
    before = Wording.load(start).words
    if target_tokens_of(start) is None:
        before = {(task, language): words for (task, _), words in found.items() for language in LANGUAGES}
    return Wording({**before, **found})


def _learn_group(group: dict[Said, float]) -> Worded:
    task, total = next(iter(group)).task, sum(group.values())
    parts = taken_apart(_counted((said.user, count) for said, count in group.items()), task)
    kind_of = {text: _kind(task, template) for text, (template, _) in parts.items()}
    kinds = _counted((kind_of[said.user], count) for said, count in group.items())
    chosen = max((kind for kind in kinds if kind != OTHER), key=kinds.__getitem__, default=OTHER)
    unlike = {
        kind_of[said.user]: (parts[said.user].template, said.user)
        for said in reversed(list(group))
        if kind_of[said.user] != chosen
    }
    shares = {kind: kinds[kind] / total for kind in sorted(kinds, key=lambda kind: (kind != chosen, -kinds[kind]))}
    if chosen == OTHER:
        return Worded(None, shares, next(iter(group)).user, {}, 0.0)
    own = {said: count for said, count in group.items() if kind_of[said.user] == chosen}
    template, _ = _most((parts[said.user].template, count) for said, count in own.items())
    reply, reply_count = _most((said.reply, count) for said, count in own.items())
    system, system_count = _most((said.system, count) for said, count in group.items())
    messages = [said.user for said in own if parts[said.user].template == template]
    templates = _counted((parts[said.user].template, count) for said, count in group.items())
    ranked = sorted(filter(None, templates), key=lambda one: -templates[one])
    words = Words(
        user=template,
        reply=reply,
        fixed_reply=reply_count >= NEARLY_ALL * sum(own.values()),
        system=system,
        shares={one: round(templates[one] / total, 4) for one in ranked[:NUM_SHARES]},
        examples=tuple(dict.fromkeys(parts[message].words[:EXAMPLE] for message in messages))[:NUM_EXAMPLES],
    )
    return Worded(words, shares, messages[0], unlike, system_count / total)


def taken_apart(texts: Mapping[str, float], task: str) -> dict[str, Parts]:
    """Each user message of a task as template and words; the template is empty where pictures are among the words.

    texts: message -> number of rows.
    """
    parts: dict[str, Parts] = {}
    if task == "generation":
        for sentence in GENERATION_PROMPT.values():
            lead = sentence.removesuffix(HOLE)
            parts |= {text: Parts(sentence, text[len(lead) :]) for text in texts if _goes_on(text, lead)}
    others = {text: count for text, count in texts.items() if text not in parts}
    lead, tail = _shared(others, _leads, str.removeprefix), _shared(others, _tails, str.removesuffix)
    framed = {text: _parts(text, lead, tail, requests=task == "generation") for text in others}
    words_of: dict[str, set[str]] = defaultdict(set)
    for template, words in framed.values():
        words_of[template].add(words)
    # A template around one and the same words says nothing of where other words would go.
    templates = {template for template, words in words_of.items() if template != bare(template) and len(words) > 1}
    num_framed = sum(count for text, count in others.items() if framed[text].template in templates)
    if num_framed < NEARLY_ALL * sum(others.values()):
        templates = set()
    return parts | {text: of if of.template in templates else _parts(text) for text, of in framed.items()}


def _parts(text: str, lead: str = "", tail: str = "", requests: bool = False) -> Parts:
    """requests: whether the words of a request for a picture belong to the template."""
    before, words, behind = "", text, ""
    if lead and _goes_on(text, lead):
        before, words = lead, text.removeprefix(lead)
    elif first := TAG_FIRST.match(text):
        before, words = first[0].lstrip(), text[first.end() :]
    if tail and words.endswith(tail) and words.removesuffix(tail).strip():
        words, behind = words.removesuffix(tail), tail
    elif last := TAG_LAST.search(words):
        words, behind = words[: last.start()], last[0].rstrip()
    if IMAGE_TAG in words:
        return Parts("", text)
    if requests and not before and (request := INSTRUCTION.match(words)):
        before, words = request[0], words[request.end() :].rstrip()
        if words[-1] in PUNCTUATION and len(words) > 1:
            words, behind = words[:-1], words[-1] + behind
    return Parts(before + HOLE + behind, words)


def _shared(
    texts: Mapping[str, float], pieces_of: Callable[[str], Iterator[str]], without: Callable[[str, str], str]
) -> str:
    """The longest piece that nearly all texts have beside words that vary; empty when there is none."""
    counts: dict[str, float] = defaultdict(float)
    left: dict[str, set[str]] = defaultdict(set)
    for text, count in texts.items():
        for piece in pieces_of(text):
            if HOLE not in piece and piece.count(IMAGE_TAG) < 2 and (rest := without(text, piece)).strip():
                counts[piece] += count
                left[piece].add(rest)
    enough = NEARLY_ALL * sum(texts.values())
    return max((piece for piece in counts if counts[piece] >= enough and len(left[piece]) > 1), key=len, default="")


def _leads(text: str) -> Iterator[str]:
    return (text[: end.end()] for end in LEAD_ENDS.finditer(text[:LONGEST]))


def _tails(text: str) -> Iterator[str]:
    return (text[start.start() :] for start in TAIL_STARTS.finditer(text, max(0, len(text) - LONGEST)))


def _goes_on(text: str, lead: str) -> bool:
    return text.startswith(lead) and bool(text[len(lead) :].strip())


def _kind(task: str, template: str) -> str:
    if not template:
        return OTHER
    if task == "generation" and template in GENERATION_PROMPT.values():
        return RELEASED
    return RAW if template == bare(template) else TEMPLATE


def _counted(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    counts: dict[str, float] = defaultdict(float)
    for value, count in values:
        counts[value] += count
    return dict(counts)


def _most(values: Iterable[tuple[str, float]]) -> tuple[str, float]:
    """The most frequent value, the first of several, and its count."""
    return max(_counted(values).items(), key=lambda item: item[1])
