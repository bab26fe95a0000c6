"""Rows without scenes: what the models say and paint against the rows' own replies and pictures. No torch here."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from data.messages.rows import Row
from train.evaluate.rows import KnownPicture
from train.scores.answer_match import is_exact, likeness
from train.scores.class_reader import ClassReader, features_of
from train.scores.measures import psnr
from train.scores.outcomes import Outcome, outcome_of, pixels_like
from train.scores.retrieval import Gallery
from train.scores.scoring import edited_region, is_right, outside


def judge_reply(row: Row, answer: str) -> Outcome:
    """An understanding row and what the model replied."""
    replies = [text for texts in row.choices[-1].values() for text in texts]
    outcome = {
        **outcome_of(row, "understanding"),
        "exact": is_exact(answer, replies),
        "similarity": likeness(answer, replies),
        "answer": answer,
        "truth": replies[0],
        "replies": replies,
    }
    if row.truth:
        outcome |= {"right": is_right(answer, row.truth["answer"]), "true_answer": row.truth["answer"]}
    return outcome


def judge_change(row: Row, picture: Image.Image) -> Outcome:
    """An editing row and its result: what it keeps outside the region that the true edit changes, and changes inside.

    None where nothing differs, or too little stays. inside_psnr: against the true result; unchanged_psnr: of the source
    against it, so of doing nothing. changed: whether the region is nearer to the true result than to the source.
    """
    result = np.asarray(picture.convert("RGB"))
    source, target = (pixels_like(picture, image) for image in row.images[-2:])
    region = edited_region(source, target)
    kept = dict(zip(("psnr", "l1", "ssim"), outside(result, target, region), strict=True))
    outcome = {**outcome_of(row, "editing"), **kept}
    if not region.any():
        return {**outcome, "inside_psnr": None, "unchanged_psnr": None, "changed": None}
    reached = psnr(result, target, region)
    return {
        **outcome,
        "inside_psnr": reached,
        "unchanged_psnr": psnr(source, target, region),
        "changed": reached > psnr(result, source, region),
    }


class KnownPictures:
    """The pictures of a task's held-out rows with their embeddings: what others are found among and read by."""

    def __init__(
        self, known: Sequence[KnownPicture], embeds: np.ndarray, for_probe: Sequence[KnownPicture] = ()
    ) -> None:
        """for_probe: further pictures that teach the probes alone. embeds: of both, (G, N, D)."""
        self._known = {picture.key: picture for picture in known}
        self._gallery = Gallery(list(self._known), embeds[: len(known)])
        taught = [*known, *for_probe]
        keys, features = [picture.key for picture in taught], features_of(embeds)
        self._readers = {
            "class": ClassReader(keys, features, [picture.prompts for picture in taught]),
            "label": ClassReader(keys, features, [picture.labels for picture in taught]),
        }

    def compare(self, embeds: np.ndarray, own: Sequence[str], own_embeds: np.ndarray) -> list[dict[str, Any]]:
        """What is known of B pictures by their embeddings, (B, N, D), beside those of their own true pictures.

        own: keys of these. As JSON: `Comparison`, the nearest picture by row and place, and what the probes read.
        """
        found = []
        features, own_features = features_of(embeds), features_of(own_embeds)
        for number, comparison in enumerate(self._gallery.compare(embeds, own, own_embeds)):
            nearest = self._known.get(comparison.nearest)
            place = None if nearest is None else {"id": nearest.row, "place": nearest.place}
            one: dict[str, Any] = {**asdict(comparison), "nearest": place}
            for name, reader in self._readers.items():
                reading = reader.read(features[number], own[number], own_features[number])
                if reading is not None:
                    one[name] = asdict(reading)
            found.append(one)
        return found
