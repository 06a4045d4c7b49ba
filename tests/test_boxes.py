"""Boxes against the elements they stand for, by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moescale.boxes import box_shape, first_index, is_contiguous, num_elements, overlap, relative_to, whole_box

SHAPE = (3, 4)
BOXES = [
    (slice(top, bottom), slice(left, right))
    for top, bottom in itertools.combinations(range(SHAPE[0] + 1), 2)
    for left, right in itertools.combinations(range(SHAPE[1] + 1), 2)
]
ELEMENTS = np.arange(12).reshape(SHAPE)


@pytest.mark.parametrize("box", BOXES)
def test_a_boxs_figures_are_those_of_its_elements(box):
    elements = ELEMENTS[box]
    assert box_shape(box) == elements.shape and num_elements(box) == elements.size
    assert first_index(box, SHAPE) == elements.flat[0]
    run = np.arange(elements.flat[0], elements.flat[0] + elements.size)
    if is_contiguous(box, SHAPE):
        assert elements.flatten().tolist() == run.tolist()
    elif elements.shape[0] > 1:
        assert elements.flatten().tolist() != run.tolist()


def test_the_overlap_holds_the_common_elements_and_its_place_in_each():
    for first, second in itertools.product(BOXES, repeat=2):
        common = sorted(set(ELEMENTS[first].flat) & set(ELEMENTS[second].flat))
        found = overlap(first, second)
        if found is None:
            assert not common
            continue
        assert ELEMENTS[found].flatten().tolist() == common
        for box in (first, second):
            assert ELEMENTS[box][relative_to(found, box)].flatten().tolist() == common


def test_an_empty_box_overlaps_nothing():
    empty = (slice(3, 3), slice(0, 4))
    assert num_elements(empty) == 0 and overlap(empty, whole_box(SHAPE)) is None
