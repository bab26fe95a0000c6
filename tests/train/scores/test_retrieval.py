"""Pictures found again among others: distances, ranks and ties by hand on three pictures of two tokens."""

import numpy as np
import pytest

from train.scores.retrieval import Gallery

# (G, N, D): each token of a picture points along an axis, so that cosines are 0, 1 or -1.
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
PICTURES = np.array([[EAST, EAST], [EAST, NORTH], [WEST, NORTH]])


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery(["one", "two", "three"], PICTURES)


def test_distances_are_means_over_tokens_and_chance_is_of_all_others(gallery: Gallery) -> None:
    (found,) = gallery.compare(np.array([[EAST, [0.0, 3.0]]]), ["one"], PICTURES[:1])
    # To its own: cosines 1 and 0. To two: 1 and 1. To three: -1 and 1.
    assert found.cosine_distance == pytest.approx(0.5)
    assert found.chance_cosine_distance == pytest.approx((0.0 + 1.0) / 2)
    # Squared differences by value: own (0, 0), (1, 9); two (0, 0), (0, 4); three (4, 0), (0, 4).
    assert found.mse == pytest.approx(10 / 4)
    assert found.chance_mse == pytest.approx((4 / 4 + 8 / 4) / 2)
    assert (found.rank, found.among, found.nearest) == (2, 3, "two")


def test_a_picture_is_nearest_to_itself(gallery: Gallery) -> None:
    found = gallery.compare(PICTURES, ["one", "two", "three"], PICTURES)
    assert [(one.rank, one.nearest) for one in found] == [(1, "one"), (1, "two"), (1, "three")]
    assert [one.mse for one in found] == pytest.approx([0, 0, 0])


def test_a_tie_is_a_miss() -> None:
    twins = Gallery(["one", "twin", "three"], PICTURES[[0, 0, 2]])
    (found,) = twins.compare(PICTURES[:1], ["one"], PICTURES[:1])
    assert (found.rank, found.nearest) == (2, "twin")


def test_a_picture_that_the_gallery_lacks_is_one_more(gallery: Gallery) -> None:
    other = np.array([[NORTH, NORTH]])
    (found,) = gallery.compare(other, ["four"], other)
    assert (found.rank, found.among, found.nearest) == (1, 4, "four")
    # two: cosines 0 and 1; one: 0 and 0; three: 0 and 1.
    assert found.chance_cosine_distance == pytest.approx((0.5 + 1.0 + 0.5) / 3)


def test_what_cannot_be_compared_is_refused(gallery: Gallery) -> None:
    with pytest.raises(ValueError, match="no other"):
        Gallery(["one"], PICTURES[:1]).compare(PICTURES[:1], ["one"], PICTURES[:1])
    with pytest.raises(ValueError, match="once"):
        Gallery(["one", "one"], PICTURES[:2])
