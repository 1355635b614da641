"""Second-order surgery on matrices: what the solvers promise, held against closed forms and brute force in numpy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune import PruningError
from lightning_prune.algorithms.solvers import (
    SOLVERS,
    Curve,
    Pattern,
    best_on_columns,
    best_on_support,
    damped,
    greedy_paths,
    inverse,
    keep_along,
    rise,
    share_lost,
    split,
)  # fmt: skip
from lightning_prune.algorithms.solvers.blocked import factor, sweep
from lightning_prune.algorithms.solvers.brain_surgeon import (
    add_outer_products,
    damage,
    inverse_of_outer_products,
    surgeon,
)
from lightning_prune.algorithms.solvers.damping import damp_
from lightning_prune.algorithms.solvers.exchange import exchange
from lightning_prune.algorithms.solvers.least_squares import fit_by_blocks

CASES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))


def problem(groups, rows, columns, seed):
    """Rows of weights, and the Hessians of inputs that are correlated, as those of layers are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(groups, columns, 5 * columns, generator=generator, dtype=torch.float64)
    weights = torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)
    return weights, inputs @ inputs.transpose(1, 2) / (5 * columns), inputs


def by_lstsq(weights, inputs, keep):
    """The best row on a support, from the inputs themselves."""
    best = np.zeros_like(weights)
    best[keep] = np.linalg.lstsq(inputs[keep].T, inputs.T @ weights, rcond=None)[0]
    return best


@given(CASES, st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_best_weights_on_a_support_are_those_of_least_squares(case, share):
    """What stays is the least-squares solution for the outputs that all weights gave, to 1e-8."""
    weights, hessian, inputs = problem(*case)
    keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(case[3])) > share
    found = best_on_support(weights, hessian, keep)
    for g, r in itertools.product(range(case[0]), range(case[1])):
        expected = by_lstsq(weights[g, r].numpy(), inputs[g].numpy(), keep[g, r].numpy())
        np.testing.assert_allclose(found[g, r].numpy(), expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


def test_best_weights_of_fewer_columns_are_those_of_least_squares():
    """Columns that leave all rows together are made up for by the least-squares solution."""
    weights, hessian, inputs = problem(1, 4, 9, 3)
    keep = torch.arange(9) % 3 != 1
    found = best_on_columns(weights[0], hessian[0], keep)
    for row, new in zip(weights[0], found, strict=True):
        expected = by_lstsq(row.numpy(), inputs[0].numpy(), keep.numpy())[keep.numpy()]
        np.testing.assert_allclose(new.numpy(), expected, rtol=1e-8)


@given(CASES)
@settings(max_examples=25, deadline=None)
def test_greedy_paths_are_those_of_brute_force(case):
    """At every step the weight leaves without which the best fit of all others is nearest; its rise is that loss."""
    weights, hessian, inputs = problem(*case)
    paths = greedy_paths(weights, inverse(hessian))
    for which, (g, r) in enumerate(itertools.product(range(case[0]), range(case[1]))):
        row, left, before = weights[g, r].numpy(), np.ones(case[2], dtype=bool), 0.0
        for step in range(case[2]):
            errors = {}
            for q in np.flatnonzero(left):
                keep = left.copy()
                keep[q] = False
                change = by_lstsq(row, inputs[g].numpy(), keep) - row
                errors[q] = 0.5 * change @ hessian[g].numpy() @ change
            q = min(errors, key=errors.get)
            assert int(paths.order[which, step]) == q
            assert float(paths.rises[which, step]) == pytest.approx(errors[q] - before, rel=1e-6, abs=1e-9 * errors[q])
            left[q], before = False, errors[q]


def test_paths_go_on_where_the_inverse_is_renewed():
    """Rows longer than what is removed between two renewals of the inverse come out as one long path: rises add up."""
    weights, hessian, _ = problem(2, 3, 150, 0)
    paths = greedy_paths(weights, inverse(hessian))
    assert torch.equal(paths.order.sort(dim=1).values, torch.arange(150).expand(6, 150))
    everything = 0.5 * torch.einsum("grc,gcd,grd->gr", weights, hessian, weights).flatten()
    torch.testing.assert_close(paths.rises.sum(dim=1), everything)
    keep = keep_along(paths, 500).view_as(weights)
    assert int((~keep).sum()) == 500
    predicted = sum(
        float(rises[: int((~k).sum())].sum()) for rises, k in zip(paths.rises, keep.flatten(0, 1), strict=True)
    )
    change = best_on_support(weights, hessian, keep) - weights
    assert float(rise(change, hessian).sum()) == pytest.approx(predicted, rel=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@given(case=CASES, share=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_solvers_remove_exactly_what_was_asked(solver, case, share):
    """Exactly so many weights are zero, and what is left is no farther off than if it had not moved."""
    weights, hessian, _ = problem(*case)
    leaving = int(share * weights.numel())
    new, keep = SOLVERS[solver](weights, hessian).solve(leaving)
    assert int((~keep).sum()) == leaving
    assert (new[~keep] == 0).all()
    assert float(rise(new - weights, hessian).sum()) <= float(rise(weights * ~keep, hessian).sum()) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("widest", [9, 4096])
@given(case=CASES, shares=st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_errors_at_several_counts_are_those_of_each_alone(solver, widest, case, shares):
    """What the quick way tells of several counts at once is what it ends at when it solves for each."""
    weights, hessian, _ = problem(*case)
    quick = SOLVERS[solver](weights, damped(hessian, 0.01)).quick(widest)
    counts = [int(share * weights.numel()) for share in shares]
    alone = [float(rise(quick.solve(count)[0] - weights, quick.hessian).sum()) for count in counts]
    assert quick.errors(counts) == pytest.approx(alone, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("apart", [1, 3])
def test_solvers_keep_to_patterns(solver, apart):
    """Of every four columns that lie apart, two stay, with less error than the two largest of them unmoved."""
    weights, hessian, _ = problem(2, 5, 24, 1)
    new, keep = SOLVERS[solver](weights, hessian).solve(Pattern(2, 4, apart))
    for start in range(0, 24, 4 * apart):
        for place in range(apart):
            assert (keep[..., start + place : start + 4 * apart : apart].sum(dim=-1) == 2).all()
    by_size = Pattern(2, 4, apart).highest(weights.abs().flatten(0, 1)).view_as(weights)
    assert float(rise(new - weights, hessian).sum()) < float(rise(weights * ~by_size, hessian).sum())


@pytest.mark.parametrize("columns", [96, 352])
def test_alternating_directions_match_the_exact_greedy_at_half(columns):
    """At half of the weights, the error is at most 1.01 times the exact greedy solver's; in narrow rows, as much."""
    weights, hessian, _ = problem(1, 24, columns, 5)
    hessian = damped(hessian, 0.01)
    errors = {}
    for name in ("exact", "admm"):
        new, _ = SOLVERS[name](weights, hessian).solve(weights.numel() // 2)
        errors[name] = float(rise(new - weights, hessian).sum())
    assert errors["admm"] <= (1 if columns < 320 else 1.01) * errors["exact"]


@given(CASES, st.floats(0, 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_trades_end_where_the_cheapest_weight_is_also_the_one_that_gains_most(case, share, patterned):
    """Of each row as many stay, by the pattern if there is one; the error is no higher, and no such trade lowers it."""
    groups, rows, columns, seed = case
    pattern = Pattern(1, 2) if patterned else None
    weights, hessian, inputs = problem(groups, rows, columns - columns % 2 if patterned else columns, seed)
    drawn = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed))
    before = pattern.highest(drawn.flatten(0, 1)).view_as(drawn) if pattern else drawn > share
    after = exchange(weights, hessian, before, pattern)

    def error(g, r, keep):
        change = by_lstsq(weights[g, r].numpy(), inputs[g].numpy(), keep) - weights[g, r].numpy()
        return 0.5 * change @ hessian[g].numpy() @ change

    def flipped(keep, column):
        return np.where(np.arange(len(keep)) == column, ~keep, keep)

    for g, r in itertools.product(range(groups), range(rows)):
        keep = after[g, r].numpy()
        assert keep.sum() == int(before[g, r].sum())
        if pattern:
            assert (keep.reshape(-1, 2).sum(axis=1) == 1).all()
        found = error(g, r, keep)
        assert found <= error(g, r, before[g, r].numpy()) * (1 + 1e-6) + 1e-9
        if not 0 < keep.sum() < len(keep):
            continue
        out = min(np.flatnonzero(keep), key=lambda q: error(g, r, flipped(keep, q)))
        without = flipped(keep, out)
        others = [q for q in np.flatnonzero(~keep) if not pattern or q // 2 == out // 2]
        assert found <= min(error(g, r, flipped(without, q)) for q in others) * (1 + 1e-6) + 1e-9


def test_the_rise_of_an_error_is_half_its_squared_length():
    """Summed block by block, it is what the inputs make of the change, for rows of any width."""
    change, hessian, inputs = problem(2, 3, 300, 6)
    made = (change @ inputs).square().sum(dim=(1, 2)) / inputs.shape[2]
    torch.testing.assert_close(rise(change, hessian), 0.5 * made)


@pytest.mark.parametrize("units", [1e-30, 1.0, 1e30])
def test_the_share_of_lost_energy_is_that_of_the_outputs(units):
    """It is the squared length of what outputs lose relative to theirs, in whatever units; of nothing, nothing."""
    weights, hessian, inputs = problem(2, 3, 20, 6)
    new = weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) > 0.5)
    expected = ((new - weights) @ inputs).square().sum() / (weights @ inputs).square().sum()
    regular = hessian * units
    added = damp_(regular, 0.01)
    found = share_lost(new * units, weights * units, regular, added)
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert share_lost(weights * 0, weights * 0, regular, added) == 0


def test_the_factor_of_a_sweep_multiplies_to_the_hessian():
    """V is upper triangular, and V V^T is H."""
    _, hessian, _ = problem(2, 1, 12, 2)
    found = factor(hessian)
    assert torch.equal(found, found.triu())
    torch.testing.assert_close(found @ found.transpose(1, 2), hessian)


@pytest.mark.parametrize("widths", [(8, 4), (4, 4), (12, 6)])
def test_a_sweep_gives_each_column_its_best_value_given_those_before(widths):
    """Each column, when it is its turn, has the least-squares value given those before it; so is its saliency."""
    weights, hessian, inputs = problem(2, 3, 14, 4)
    keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    seen = {}

    def choose(free, diagonal, first):
        seen[first] = 0.5 * (free[:, 0] / diagonal[:, :1]).square()
        return keep[..., first : first + widths[1]].transpose(1, 2)

    new, kept = sweep(weights, factor(hessian), choose, *widths)
    assert torch.equal(kept, keep)
    for g, r in itertools.product(range(2), range(3)):
        row, x = weights[g, r].numpy(), inputs[g].numpy()
        done = np.zeros(14)
        for j in range(14):
            # The columns from j on make up for what those before it changed.
            missing = x.T @ (row - done)
            best = np.linalg.lstsq(x[j:].T, missing, rcond=None)[0]
            if j in seen:
                without = np.linalg.lstsq(x[j + 1 :].T, missing, rcond=None)[0] if j < 13 else np.zeros(0)
                left = missing - x[j + 1 :].T @ without
                more = left @ left - np.square(missing - x[j:].T @ best).sum()
                assert float(seen[j][g, r]) == pytest.approx(0.5 * more / x.shape[1], rel=1e-6)
            done[j] = best[0] if keep[g, r, j] else 0
        np.testing.assert_allclose(new[g, r].numpy(), done, rtol=1e-8, atol=1e-8)


@given(CASES, st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_a_fit_by_blocks_comes_nearer_and_ends_at_the_best(case, share):
    """No pass takes the weights farther from their aim, and many end at the best weights on their support."""
    weights, hessian, _ = problem(*case)
    hessian = damped(hessian, 0.1)
    keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(case[3])) > share
    found = weights * keep
    best = float(rise(best_on_support(weights, hessian, keep) - weights, hessian).sum())
    error = float(rise(found - weights, hessian).sum())
    for passes in (1, 2, 100):
        found = fit_by_blocks(weights, hessian, keep, found, passes, width=4)
        assert (found[~keep] == 0).all()
        before, error = error, float(rise(found - weights, hessian).sum())
        assert error <= before * (1 + 1e-9) + 1e-12
    assert error == pytest.approx(best, rel=1e-3, abs=1e-12)


def test_worthless_columns_leave_first_wherever_they_lie():
    """Columns that hardly see inputs take the whole removal of a sweep, though they fill one block and no other."""
    weights, _, _ = problem(1, 8, 256, 0)
    inputs = torch.randn(1, 256, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs[:, :128] *= 1e-3
    hessian = damped(inputs @ inputs.transpose(1, 2) / 512, 1e-3)
    _, keep = SOLVERS["blocked"](weights, hessian).solve(weights.numel() // 2)
    assert int(keep[..., 128:].sum()) > 0.95 * weights.numel() / 2


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("damping", [0.01, 1e-9])
def test_sweeps_in_single_precision_keep_what_double_ones_keep(monkeypatch, scale, damping):
    """Whatever the units, errors are those of a sweep in double precision to a thousandth."""
    weights, hessian, _ = problem(2, 16, 200, 3)
    hessian = damped(hessian, damping)
    leaving = weights.numel() // 2
    new, _ = SOLVERS["blocked"](weights * scale, hessian * scale).solve(leaving)
    monkeypatch.setattr("lightning_prune.algorithms.solvers.choice._SINGLE", torch.inf)
    exact, _ = SOLVERS["blocked"](weights, hessian).solve(leaving)
    error, least = (float(rise(found - weights, hessian).sum()) for found in (new / scale, exact))
    assert error == pytest.approx(least, rel=1e-3)


def test_singular_hessians_are_refused():
    """A Hessian of fewer inputs than weights is not replaced by another; a stated damping makes it regular."""
    inputs = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(PruningError, match=r"5 x 5, is singular.*damping="):
        inverse(inputs @ inputs.T)
    regular = damped(inputs @ inputs.T, 0.1)
    torch.testing.assert_close(inverse(regular) @ regular, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("at_once", [1, 4])
def test_rank_one_updates_give_the_inverse(at_once):
    """Outer products taken up one by one, or some at a time, give the inverse of their sum."""
    rows = torch.randn(30, 7, dtype=torch.float64)
    found = add_outer_products(torch.eye(7, dtype=torch.float64) / 0.01, rows, at_once)
    torch.testing.assert_close(found, torch.linalg.inv(0.01 * torch.eye(7, dtype=torch.float64) + rows.T @ rows))
    mean = inverse_of_outer_products(rows, examples=10, alpha=0.01)
    torch.testing.assert_close(mean, torch.linalg.inv(0.01 * torch.eye(7, dtype=torch.float64) + rows.T @ rows / 10))


@given(st.integers(2, 8), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_the_surgeon_foretells_the_rise_of_a_quadratic_loss(size, seed):
    """At the minimum of a quadratic the predicted rise is the measured one, and no other single removal costs less."""
    weights, hessian, _ = problem(1, 1, size, seed)
    w, H = weights[0, 0], hessian[0]
    step = surgeon(w, torch.linalg.inv(H))
    change = step.weights - w
    assert step.weights[step.which] == 0
    assert float(0.5 * change @ H @ change) == pytest.approx(step.rise, rel=1e-6)
    free = [best_on_support(w[None, None], H[None], (torch.arange(size) != q)[None, None])[0, 0] for q in range(size)]
    assert step.rise <= min(float(0.5 * (f - w) @ H @ (f - w)) for f in free) * (1 + 1e-6)


def test_damage_looks_at_the_diagonal_and_moves_nothing():
    """OBD removes the weight of least half h w squared, and leaves the others as they are."""
    step = damage(torch.tensor([1.0, -3.0, 2.0]), torch.tensor([5.0, 0.1, 1.0]))
    assert step.which == 1
    assert step.rise == pytest.approx(0.45)
    assert step.weights.tolist() == [1.0, 0.0, 2.0]


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=3), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_split_costs_least_where_curves_are_convex(slopes, share):
    """No other split of the same total over convex curves has a smaller sum of errors."""
    curves = {str(i): Curve(range(len(rises) + 1), [0.0, *np.cumsum(sorted(rises))]) for i, rises in enumerate(slopes)}
    total = round(share * sum(map(len, slopes)))
    counts = split(curves, total)
    cost = sum(curves[name].errors[count] for name, count in counts.items())
    every = itertools.product(*(range(len(rises) + 1) for rises in slopes))
    least = min(
        sum(curve.errors[n] for curve, n in zip(curves.values(), tried, strict=True))
        for tried in every if sum(tried) == total
    )  # fmt: skip
    assert sum(counts.values()) == total
    assert cost == pytest.approx(least, abs=1e-9)
