"""Boxes and slots: who gets which, and that nothing depends on the order in which they come."""

import itertools

import pytest
import torch

from holofunc import random
from holofunc.ops.matching import assign, occupied

THERE = torch.ones(3, dtype=torch.bool)


def by_hand(quality, slots):
    """All pairs, best first; a box takes a slot that is free."""
    pairs = sorted(itertools.product(range(len(quality)), range(len(quality[0]))), key=lambda p: -quality[p[0]][p[1]])
    chosen, taken = {}, set()
    for box, candidate in pairs:
        if box not in chosen and slots[box][candidate] not in taken:
            chosen[box] = candidate
            taken.add(slots[box][candidate])
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_given_twice_and_good_ones_first(seed):
    quality = random.uniform(random.key(seed), (6, 4))
    cells = random.randint(random.key(seed + 100), (6, 1), 0, 2)
    slots = cells * 4 + torch.arange(4)
    choice, placed = assign(quality, slots, torch.ones(6, dtype=torch.bool))
    expected = by_hand(quality.tolist(), slots.tolist())
    taken = slots.gather(1, choice[:, None])[:, 0][placed].tolist()
    assert len(set(taken)) == len(taken) == len(expected)
    best = quality.argmax(1)
    for i in range(6):  # whoever fits a slot best of all that have it for their first has it
        rivals = [j for j in range(6) if slots[j, best[j]] == slots[i, best[i]]]
        if all(quality[i, best[i]] >= quality[j, best[j]] for j in rivals):
            assert placed[i]
            assert choice[i] == best[i]


def test_equals_by_order_and_losers_take_what_is_left():
    quality = torch.tensor([[0.5, 0.4], [0.5, 0.4], [0.5, 0.4]])
    choice, placed = assign(quality, torch.tensor([[0, 1]]).expand(3, 2), THERE)
    assert choice.tolist() == [0, 1, 0]
    assert placed.tolist() == [True, True, False]


def test_boxes_that_are_not_there_take_nothing():
    quality = torch.tensor([[0.9, 0.8], [0.1, 0.2], [float("nan"), 0.3]])
    slots = torch.tensor([[0, 1], [0, 1], [2, 3]])
    choice, placed = assign(quality, slots, torch.tensor([False, True, False]))
    assert placed.tolist() == [False, True, False]
    assert choice[1] == 1


def test_batches_and_maps_are_one_by_one():
    quality = random.uniform(random.key(0), (3, 5, 2))
    slots = random.randint(random.key(1), (3, 5, 1), 0, 3) * 2 + torch.arange(2)
    mask = random.uniform(random.key(2), (3, 5)) > 0.3
    together = assign(quality, slots, mask)
    for got, wanted in zip(torch.vmap(assign)(quality, slots, mask), together, strict=True):
        assert torch.equal(got, wanted)
    order = torch.tensor([4, 2, 0, 1, 3])
    turned = assign(quality[:, order], slots[:, order], mask[:, order])
    for got, wanted in zip(turned, together, strict=True):
        assert torch.equal(got, wanted[:, order])


def test_occupied():
    found = occupied(torch.tensor([[1, 1, 9], [0, 3, 2]]), torch.tensor([[True, True, False]] * 2), 4)
    assert found.tolist() == [[False, True, False, False], [True, False, False, True]]
