"""Answers against the replies of rows: equality, shared tokens, and what always the commonest reply would give."""

import pytest

from train.scores.answer_match import Asked, commonest_replies, is_exact, likeness, normalised, similarity


@pytest.mark.parametrize(
    ("answer", "replies", "exact"),
    [
        ("**A cat.**", ["a cat"], True),
        ("Ａ  cat!", ["a cat"], True),  # full width, two blanks
        ("cat", ["a cat"], False),
        ("一只猫。", ["一只猫"], True),
        ("a kitten", ["a cat", "A kitten."], True),
    ],
)
def test_equal_is_what_reads_the_same(answer: str, replies: list[str], exact: bool) -> None:
    assert is_exact(answer, replies) is exact


@pytest.mark.parametrize(
    ("answer", "reply", "value"),
    [
        ("a red cat", "a cat", 4 / 5),  # two of three words, two of two: 2 * 2 / (3 + 2)
        ("cat cat", "cat", 2 / 3),  # a word counts as often as the other says it
        ("红色的圆", "红色圆", 6 / 7),  # by characters: three shared of four and of three
        ("a red 圆", "red 圆形", 2 * 2 / (3 + 3)),
        ("dog", "cat", 0.0),
        ("!", "?", 1.0),  # nothing is left of either
        ("", "cat", 0.0),
    ],
)
def test_similarity_is_f1_of_tokens(answer: str, reply: str, value: float) -> None:
    assert similarity(answer, reply) == pytest.approx(value) == pytest.approx(similarity(reply, answer))


def test_the_nearest_reply_counts() -> None:
    assert likeness("a tabby cat", ["a dog", "a cat"]) == pytest.approx(4 / 5)


def test_the_commonest_reply_is_that_of_a_question_or_of_all_rare_ones() -> None:
    often = [Asked("What colour?", [reply]) for reply in ("red", "Red.", "blue", "blue", "red")]
    rare = [Asked("What is it?", ["a cat"]), Asked("Where?", ["left"]), Asked("Who?", ["left"])]
    assert commonest_replies([*often, *rare]) == ["red"] * 5 + ["left"] * 3
    assert normalised("Red.") == "red"
