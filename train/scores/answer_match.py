"""How near an answer is to the row's own reply, for rows of any questions. No torch here.

`train/scores/scoring.py` judges answers to questions that have one right answer; here the reply may be any text.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from train.scores.plain_words import bare, without_markup

MIN_ASKED = 5  # a question that is asked less often is a kind of its own with the other rare ones
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"  # scripts that write no blanks between words
TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def normalised(text: str) -> str:
    """A text without markup, case, width of characters and the signs around it, its blanks single."""
    return " ".join(bare(without_markup(text)).split())


def similarity(answer: str, reply: str) -> float:
    """F1 of the tokens that two texts share, in [0, 1]; a token is a word, or one character of Chinese.

    Source: SQuAD, Rajpurkar et al. 2016, without its removal of articles.
    """
    said, true = (Counter(TOKEN.findall(normalised(text))) for text in (answer, reply))
    if not said or not true:
        return float(normalised(answer) == normalised(reply))
    return 2 * (said & true).total() / (said.total() + true.total())


def is_exact(answer: str, replies: Sequence[str]) -> bool:
    """Whether an answer is one of the replies that its row allows, both normalised."""
    return normalised(answer) in map(normalised, replies)


def likeness(answer: str, replies: Sequence[str]) -> float:
    """The similarity to the nearest of the replies that a row allows."""
    return max(similarity(answer, reply) for reply in replies)


@dataclass(frozen=True)
class Asked:
    """A question and the replies that its row allows, the first of them its own."""

    question: str
    replies: Sequence[str]


def commonest_replies(asked: Sequence[Asked]) -> list[str]:
    """For each row the reply that is given most often to its question: what a model could say without looking.

    Questions that are asked fewer than MIN_ASKED times count as one kind, or each would have its own reply.
    """
    times = Counter(row.question for row in asked)
    kinds = [row.question if times[row.question] >= MIN_ASKED else None for row in asked]
    replies: dict[str | None, Counter[str]] = {}
    for kind, row in zip(kinds, asked, strict=True):
        replies.setdefault(kind, Counter())[normalised(row.replies[0])] += 1
    commonest = {kind: of_kind.most_common(1)[0][0] for kind, of_kind in replies.items()}
    return [commonest[kind] for kind in kinds]
