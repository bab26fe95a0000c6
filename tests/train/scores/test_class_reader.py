"""The probe that reads prompts and labels: what it is taught, what it is not shown, and its chance level."""

import numpy as np
import pytest

from train.scores.class_reader import ClassReader, features_of

KEYS = ["c1", "c2", "c3", "d1", "d2", "x"]
NAMES = [frozenset([name]) for name in ("cat", "cat", "cat", "dog", "dog", "fox")]
CATS, DOGS, FOX = [5.0, 0.1], [-5.0, 0.2], [0.0, 9.0]
FEATURES = np.array([CATS, [5.2, 0.0], [4.9, -0.1], DOGS, [-5.1, 0.0], FOX])


def test_features_are_the_same_wherever_in_the_picture_something_is() -> None:
    embeds = np.array([[[1.0, 2.0], [3.0, 6.0]]])
    # Of each width: mean, standard deviation, maximum, minimum.
    np.testing.assert_allclose(features_of(embeds), [[2, 4, 1, 2, 3, 6, 1, 2]])
    np.testing.assert_allclose(features_of(embeds[:, ::-1]), features_of(embeds))


def test_it_reads_what_a_picture_shows_beside_what_it_should() -> None:
    reader = ClassReader(KEYS, FEATURES, NAMES)
    read = reader.read(np.array([-4.8, 0.1]), "c1", FEATURES[0])
    assert read is not None
    assert (read.name, read.right, read.true_right) == ("dog", False, True)
    assert read.chance == pytest.approx(2 / 5)  # two cats among the five others


def test_a_name_that_no_other_picture_has_is_not_read() -> None:
    reader = ClassReader(KEYS, FEATURES, NAMES)
    assert reader.read(FEATURES[5], "x", FEATURES[5]) is None
    assert reader.read(FEATURES[5], "unknown", FEATURES[5]) is None
    assert ClassReader(KEYS[:3], FEATURES[:3], NAMES[:3]).read(FEATURES[0], "c1", FEATURES[0]) is None


def test_its_own_picture_does_not_teach_it() -> None:
    # A cat that looks like a dog, but for a mark that no other has: who was taught it knows it by the mark.
    features = np.array([[*one, 0.0] for one in FEATURES[:5]] + [[-5.0, 0.15, 9.0]])
    names = [*NAMES[:5], frozenset(["cat"])]
    read = ClassReader(KEYS, features, names).read(features[5], "x", features[5])
    assert read is not None and (read.name, read.right, read.true_right) == ("dog", False, False)
    taught = ClassReader(KEYS, features, names).read(features[5], "c1", features[5])
    assert taught is not None and taught.name == "cat"


def test_a_picture_of_two_names_is_right_by_either_and_one_of_none_is_left_out() -> None:
    names = [*NAMES[:4], frozenset(["dog", "cat"]), frozenset()]
    reader = ClassReader(KEYS, FEATURES, names)
    read = reader.read(FEATURES[0], "d2", FEATURES[4])
    assert read is not None and (read.name, read.right) == ("cat", True)
    assert read.chance == pytest.approx(1.0)  # all others are cats or dogs
    assert reader.names == ["cat", "dog"]
