"""What the doctor says of how rows are worded, and where inference would word prompts otherwise."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data.mixture.order import Mixture
from data.mixture.wording import MIXED, OTHER, TEMPLATE, Worded, learn, sample
from nexus_gen.parts.wording import COMMANDS, RAW, RELEASED, RELEASED_WORDS, Wording, Words, bare
from nexus_gen.specs.prompts import GENERATION_PROMPT, IMAGE_TAG

SHOWN = 120  # characters of a message
Found = Mapping[tuple[str, str], Worded]


class Line(NamedTuple):
    """Of one task in one language. option: says the same to a command, empty where it needs none."""

    name: str
    worded: str
    share: str
    message: str
    reply: str
    option: str


def wording_of_datasets(paths: Iterable[Path], row_format: str, picture_root: Path | None) -> Found:
    """Of all of them together. Raises UserError for a mixture that training would refuse."""
    mixtures = [Mixture(path, 0, picture_root=picture_root, row_format=row_format) for path in paths]
    return learn(chain.from_iterable(map(sample, mixtures)))


def wording_lines(found: Found) -> Iterator[Line]:
    for (task, language), of in found.items():
        name, share, words = f"{task}, {language}", percent(next(iter(of.kinds.values()))), of.words
        if words is None:
            yield Line(name, OTHER, share, quoted(of.message), "", "")
            continue
        kind = Wording({(task, language): words}).kind(task, language)
        worded = kind if kind in (RELEASED, RAW) else quoted(words.user)
        num_templates = len([one for one in words.shares if one != bare(one) and one not in GENERATION_PROMPT.values()])
        if num_templates > 1 and next(iter(of.kinds)) == TEMPLATE:
            worded += f" ({percent(words.shares[words.user])}, the most frequent of {num_templates} templates)"
        if words.system:
            worded += f" behind the system message {quoted(words.system)}"
        reply = quoted(words.reply) if words.fixed_reply else "of many kinds, which the model words itself"
        option = "" if kind == RELEASED else option_of(task, language, words)
        yield Line(name, worded, share, quoted(of.message), reply if words.reply else "", option)


def option_of(task: str, language: str, words: Words) -> str:
    """What makes a command word prompts so with a checkpoint that does not say how it was trained."""
    released = RELEASED_WORDS[task, language]
    is_raw = words.user == bare(released.user)
    option = f"--template {RAW if is_raw else shlex.quote(words.user)}"
    if words.reply and words.fixed_reply and words.reply != released.reply:
        option += f" --reply {shlex.quote(words.reply)}"
    return option


def wording_warnings(found: Found) -> Iterator[str]:
    """Where the commands would word prompts otherwise than a good part of the rows."""
    for (task, language), of in found.items():
        name, command = f"{task}, {language}", COMMANDS[task]
        for kind, share in of.kinds.items():
            if share < MIXED:
                continue
            if kind == OTHER:
                message = of.unlike[OTHER][1] if OTHER in of.unlike else of.message
                yield (
                    f"{name}: {percent(share)} of the rows have pictures among the words, as {quoted(message)}, and "
                    f"{command} puts them before or behind; move {IMAGE_TAG} there"
                )
            elif kind in of.unlike:
                template, message = of.unlike[kind]
                given = shlex.quote(template) if kind == TEMPLATE else kind
                yield (
                    f"{name}: {percent(share)} of the rows are worded otherwise than {command} will, as "
                    f"{quoted(message)}; word all alike, or give it --template {given} for prompts like that"
                )
        if of.words is not None and of.system_share <= 1 - MIXED:
            other = (
                f"no other system message than {quoted(of.words.system)}" if of.words.system else "no system message"
            )
            yield (
                f"{name}: {percent(1 - of.system_share)} of the rows have a system message of their own, and {command} "
                f"will send {other}; give all rows the same, or none"
            )


def percent(share: float) -> str:
    return f"{share:.0%}" if round(share, 2) not in (0, 1) or share in (0, 1) else f"{share:.2%}"


def quoted(text: str) -> str:
    """On one line, its end cut where it is long."""
    return json.dumps(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…", ensure_ascii=False)
