"""`nexus-gen evaluate choices`: accuracy on multiple-choice questions about pictures from a local file.

nexus-gen evaluate choices runs/full --questions validation.parquet --output mmmu.json

A question is one row of JSON lines, a JSON array or Parquet: `question`, `options` (a list, or its text as MMMU has
it), `answer` (a letter), pictures as `images` or `image_1` to `image_7`, and optionally `id` and `subject`. `<image 1>`
in a question or an option is where a picture goes; pictures that are named nowhere come first.
Source of the format: Yue et al. 2024 (MMMU).
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from data.messages.rows import stored_image
from data.mixture.pictures import PictureHashes, fingerprint_rows
from data.records.reading import Record, read_records
from nexus_gen.artifacts.artifact import fingerprint_path, write_text_atomic
from nexus_gen.artifacts.results import check_result
from nexus_gen.commands.use import add_model_arguments
from nexus_gen.parts.models import ModelPaths, memory_of
from nexus_gen.pictures.images import StoredImage
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import IMAGE_TAG
from train.evaluate.benchmarks import batches
from train.evaluate.score_lines import table
from train.scores.letter_reader import parse_letter
from train.scores.measures import Score, mean_of, proportion

PLACE = re.compile(r"<image (\d+)>")
REQUEST = "Answer with the letter of the right option only."


@dataclass(frozen=True)
class Question:
    """content: the user message. images: in tag order. options: by letter. answer: the right letter."""

    id: str
    subject: str
    content: str
    images: list[StoredImage]
    options: dict[str, str]
    answer: str


def read_question(record: Record) -> Question | None:
    """A row as a question; None for one without options (MMMU's open questions). UserError for a broken one."""
    values = record.values
    if values is None:
        raise UserError(f"{record.where}: {record.problem}")

    def refuse(problem: str) -> UserError:
        return UserError(f"{record.where}: {problem}")

    options = values.get("options")
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (SyntaxError, ValueError) as error:
            raise refuse("options is a text that is no list; give a list of texts") from error
    if values.get("question_type") not in (None, "multiple-choice") or options == []:
        return None
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase):
        raise refuse(f"options must be a list of 2 to {len(ascii_uppercase)} texts")
    lettered = dict(zip(ascii_uppercase, map(str, options), strict=False))
    answer = values.get("answer")
    if not isinstance(answer, str) or answer not in lettered:
        raise refuse(f"answer is {answer!r}; it must be one of {', '.join(lettered)}")
    if not isinstance(values.get("question"), str):
        raise refuse("no question; give its text")
    numbered = (values.get(f"image_{number}") for number in range(1, 8))
    given = values.get("images") or [image for image in numbered if image is not None]
    if not isinstance(given, list):
        raise refuse(f"images is a {type(given).__name__}; give a list, of one picture too")
    pictures = [stored_image(image, number, record) for number, image in enumerate(given, start=1)]
    lines = [values["question"], *(f"{letter}. {option}" for letter, option in lettered.items()), REQUEST]
    text = "\n".join(lines)
    if IMAGE_TAG in text:
        raise refuse(f"{IMAGE_TAG} stands in it; say which picture goes there, as <image 1>")
    places = [int(number) for number in PLACE.findall(text)]
    if any(not 1 <= place <= len(pictures) for place in places):
        raise refuse(f"<image {max(places)}> stands in it, but it has {len(pictures)} pictures")
    first = [number for number in range(1, len(pictures) + 1) if number not in places]
    identity = str(values.get("id", record.name))
    parts = identity.split("_")  # MMMU: validation_Art_Theory_1
    return Question(
        id=identity,
        subject=str(values.get("subject") or "_".join(parts[1:-1]) or "all"),
        content=IMAGE_TAG * len(first) + ("\n" if first else "") + PLACE.sub(IMAGE_TAG, text),
        images=[pictures[number - 1] for number in (*first, *places)],
        options=lettered,
        answer=answer,
    )


def scores_of(outcomes: list[dict[str, Any]]) -> dict[str, Score]:
    """Accuracy over all questions, its mean over the subjects, each subject's, and the share that named a letter."""
    subjects = sorted({outcome["subject"] for outcome in outcomes})
    by_subject = {
        subject: proportion([outcome["right"] for outcome in outcomes if outcome["subject"] == subject])
        for subject in subjects
    }
    return {
        "accuracy": proportion([outcome["right"] for outcome in outcomes]),
        "mean_over_subjects": mean_of(list(by_subject.values())),
        "named_a_letter": proportion([outcome["letter"] is not None for outcome in outcomes]),
        **{f"subject/{subject}": score for subject, score in by_subject.items()},
    }


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="nexus-gen evaluate choices", description="Accuracy on multiple-choice questions by greedy answers."
    )
    parser.add_argument("run", type=Path, help="run directory, such as runs/tiny")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines, a JSON array or Parquet")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of scores and answers to write")
    parser.add_argument("--num", type=int, help="the first ones only")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    add_model_arguments(parser, paints=False)
    arguments = parser.parse_args(argv[1:])
    for name in ("num", "batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    check_result(arguments.output, "--output")
    read = [read_question(record) for record in read_records(arguments.questions)]
    questions = [question for question in read if question is not None]
    if not questions:
        raise UserError(f"{arguments.questions} holds no multiple-choice questions; give rows with options")
    paths = ModelPaths.find(arguments.run, decoder=None, autoregressive=arguments.autoregressive)
    hashes = PictureHashes(memory_of(arguments.run))
    images = [image for question in questions for image in question.images]
    inputs = {
        "autoregressive": fingerprint_path(paths.autoregressive, hashes.contents),
        "questions": fingerprint_rows(arguments.questions, images, hashes),
    }
    hashes.contents.save()
    from nexus_gen.inference import NexusGen  # loads torch: only once the arguments hold

    model, outcomes = NexusGen(paths, arguments.device), []
    for batch in batches(questions[: arguments.num], arguments.batch_size, "choices"):
        replies = model.answer_all(
            [question.content for question in batch],
            [list(question.images) for question in batch],
            arguments.max_new_tokens,
        )
        for question, reply in zip(batch, replies, strict=True):
            letter = parse_letter(reply, question.options)
            outcomes.append(
                {
                    "id": question.id,
                    "subject": question.subject,
                    "right": letter == question.answer,
                    "letter": letter,
                    "answer": question.answer,
                    "reply": reply,
                }
            )
    unreadable = [outcome for outcome in outcomes if outcome["letter"] is None]
    found = {**scores_of(outcomes), "unreadable": proportion([outcome in unreadable for outcome in outcomes])}
    scores = {name: score.as_json for name, score in found.items()}
    report = {
        "scores": scores,
        "inputs": inputs,
        "not_multiple_choice": len(read) - len(questions),
        "unreadable": [{name: outcome[name] for name in ("id", "answer", "reply")} for outcome in unreadable],
        "answers": outcomes,
    }
    write_text_atomic(arguments.output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(table(scores))
    if len(read) > len(questions):
        print(f"left out: {len(read) - len(questions)} questions without options")
    if unreadable:
        print(f"unreadable, scored as wrong: {len(unreadable)} replies, listed in {arguments.output}; the first is")
        print(f"  {unreadable[0]['id']}: {unreadable[0]['reply']!r}")
    print(f"wrote {arguments.output}")
    return 0
