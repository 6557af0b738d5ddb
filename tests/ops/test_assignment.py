"""Assignment: the least cost, by trying all; shapes, masks, transforms, errors."""

import itertools

import pytest
import torch

from holofunc.ops import assignment


def least(costs, columns):
    rows = range(costs.shape[0])
    return min(
        sum(costs[r, c].item() for r, c in zip(chosen, columns, strict=True))
        for chosen in itertools.permutations(rows, len(columns))
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_other_assignment_costs_less(seed):
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 5, (), generator=g))
    m = n + int(torch.randint(0, 3, (), generator=g))
    whole = torch.randint(-2, 3, (3, m, n), generator=g).float()  # with ties
    costs = whole if seed % 2 else torch.randn(3, m, n, generator=g)
    mask = torch.rand(3, n, generator=g) > 0.3
    found = assignment.assign(costs, mask)
    assert found.rows.shape == found.mask.shape == (3, n)
    assert torch.equal(found.mask, mask)
    for b in range(3):
        columns, rows = mask[b].nonzero()[:, 0].tolist(), found.rows[b][mask[b]].tolist()
        assert len(set(rows)) == len(rows)
        total = sum(costs[b, r, c].item() for r, c in zip(rows, columns, strict=True))
        assert total == pytest.approx(least(costs[b], columns), abs=1e-5)
        assert (found.rows[b][~mask[b]] == 0).all()


def test_costs_that_are_not_finite_are_taken_last():
    inf = torch.inf
    costs = torch.tensor([[inf, 1e6], [torch.nan, -1e6], [3.0, -inf]])
    assert assignment.assign(costs).rows.tolist() == [2, 1]
    assert sorted(assignment.assign(torch.full((2, 2), inf)).rows.tolist()) == [0, 1]


def test_maps_compiles_and_stops_gradients():
    costs = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    expected = assignment.assign(costs).rows
    assert torch.equal(torch.func.vmap(assignment.assign)(costs).rows, expected)
    compiled = torch.compile(assignment.assign, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(costs).rows, expected)

    def matched(costs):
        return costs.gather(-2, assignment.assign(costs).rows[..., None, :]).sum()

    gradient = torch.func.grad(matched)(costs)
    assert (gradient.sum((1, 2)) == 3).all()
    assert assignment.assign(costs.to("meta")).rows.shape == (4, 3)


def test_no_columns():
    assert assignment.assign(torch.zeros(2, 3, 0)).rows.shape == (2, 0)


def test_refuses():
    with pytest.raises(ValueError, match=r"at least as many rows .* got \(2, 3\)"):
        assignment.assign(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(2,\), got torch.float32 of shape \(2,\)"):
        assignment.assign(torch.zeros(3, 2), torch.ones(2))
