"""The keyed permutation and the choice of validation documents."""

from __future__ import annotations

import numpy as np
import pytest

from moescale.data import shuffle


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096, 4097])
def test_every_position_maps_to_its_own_place(size):
    for epoch in range(3):
        result = shuffle.permuted(np.arange(size), size, seed=7, epoch=epoch)
        assert sorted(result.tolist()) == list(range(size))


def test_positions_map_alike_alone_and_together():
    together = shuffle.permuted(np.arange(1000), 1000, seed=3, epoch=5)
    alone = [int(shuffle.permuted(np.array([position]), 1000, seed=3, epoch=5)[0]) for position in range(1000)]
    assert together.tolist() == alone


def test_seed_and_epoch_change_the_order():
    orders = {
        tuple(shuffle.permuted(np.arange(50), 50, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_order_is_the_one_of_earlier_versions():
    assert shuffle.permuted(np.arange(10), 10, seed=0, epoch=0).tolist() == [8, 1, 7, 6, 3, 2, 5, 9, 4, 0]


def test_each_place_is_as_likely_as_any_other():
    size, epochs = 10, 2000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), shuffle.permuted(np.arange(size), size, seed=1, epoch=epoch)] += 1
    expected = epochs / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 40 < chi_squared < 140  # 81 degrees of freedom: mean 81, standard deviation 12.7


def test_neighbours_are_taken_apart():
    size = 10_000
    order = shuffle.permuted(np.arange(size), size, seed=2, epoch=0)
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 10
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05


def test_choice_takes_the_fraction_and_does_not_depend_on_how_it_is_asked():
    whole = shuffle.chosen(11, 0, 20_000, 0.1)
    parts = np.concatenate([shuffle.chosen(11, first, 500, 0.1) for first in range(0, 20_000, 500)])
    assert np.array_equal(whole, parts)
    assert 1800 < whole.sum() < 2200
    assert not np.array_equal(whole, shuffle.chosen(12, 0, 20_000, 0.1))
