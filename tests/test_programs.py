"""Random programs whose numbers are held in every way code holds numbers: no cut of them is wrong."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.programs import Program, Stage, build, draw, example_of, source
from tests.survivors import MisfitError, marked, narrow_scales, plain
from tests.verdicts import judge, told


def assert_not_wrong(program):
    verdict = judge(program)
    assert verdict.outcome != "wrong", told(program, verdict.why)


# A piece of which nothing is left has no variance; that is one of the things to be survived.
pytestmark = pytest.mark.filterwarnings("ignore:var.. degrees of freedom")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**9))
def test_no_cut_of_a_random_program_is_wrong(seed):
    """Whatever the code holds its numbers in, a cut is right or refused."""
    assert_not_wrong(draw(random.Random(seed)))


@pytest.mark.slow
@settings(deadline=None, max_examples=1500, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9))
def test_no_cut_of_many_random_programs_is_wrong(seed):
    """The same over more and longer programs."""
    assert_not_wrong(draw(random.Random(seed), most=5))


def test_a_program_is_rebuilt_from_its_repr():
    """What a failure prints makes the same network again."""
    program = draw(random.Random(3))
    again = eval(repr(program), {"Program": Program, "Stage": Stage})
    assert source(again) == source(program)
    one, other = build(program).state_dict(), build(again).state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_program_runs():
    """A program runs on its example and on other inputs, in both modes, before anything is cut."""
    for seed in range(40):
        program = draw(random.Random(seed))
        model = build(program)
        with torch.no_grad():
            model(example_of(program))
            model.train()(example_of(program)[:1].repeat_interleave(3, 0))


# The oracle itself, against slim code written by hand

KEPT = [0, 1, 2, 5]


def kept(tensor, dim):
    alive = torch.zeros(tensor.shape, dtype=torch.bool)
    return marked(tensor, alive.index_fill(dim, torch.tensor(KEPT), True))


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_the_oracle_takes_statistics_over_what_survives_of_each_piece():
    """Pieces are the original ones, and their statistics run over the channels of theirs that are left."""
    x, first, last = drawn(2, 3, 4, 4), drawn(8, 3, 3, 3), drawn(4, 8, 1, 1)
    y = F.conv2d(marked(x), kept(first, 0), padding=1)
    y = torch.cat([y[:, :4].softmax(1), F.group_norm(y[:, 4:], 1)], 1)
    found = F.conv2d(y, kept(last, 1))
    z = F.conv2d(x, first, padding=1)
    slim = torch.cat([z[:, [0, 1, 2]].softmax(1), F.group_norm(z[:, [5]], 1)], 1)
    torch.testing.assert_close(plain(found), F.conv2d(slim, last[:, KEPT]))
    assert found.alive.all()


@pytest.mark.parametrize("kept_channels, heads", [([0, 1, 2, 3], 1), ([0, 2, 4, 6], 2)])
def test_the_oracle_keeps_the_original_heads(kept_channels, heads):
    """Whole heads that are gone are gone; heads that lost a share each are still the same heads."""
    tensors = [drawn(2, 5, 8) for _ in range(3)]
    alive = torch.zeros(8, dtype=torch.bool)
    alive[kept_channels] = True
    q, k, v = (marked(t, alive).view(2, 5, 2, 4).transpose(1, 2) for t in tensors)
    with narrow_scales(True):
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8)
    slim = [t[..., kept_channels].view(2, 5, heads, -1).transpose(1, 2) for t in tensors]
    expected = F.scaled_dot_product_attention(*slim).transpose(1, 2).reshape(2, 5, 4)
    torch.testing.assert_close(plain(found)[..., kept_channels], expected)


@pytest.mark.parametrize(
    "statistic",
    [
        lambda t: t.mean(-1), lambda t: t.var(-1), lambda t: t.std(-1, unbiased=False), lambda t: t.amax(-1),
        lambda t: t.max(-1)[0], lambda t: t.norm(dim=-1), lambda t: F.layer_norm(t, (t.shape[-1],)),
        lambda t: F.rms_norm(t, (t.shape[-1],)), lambda t: t.logsumexp(-1), lambda t: t.cumsum(-1),
        lambda t: F.normalize(t, dim=-1), lambda t: t.softmax(-1),
    ],
)  # fmt: skip
def test_the_oracle_leaves_pruned_entries_out(statistic):
    """Every statistic is that of the entries that are left."""
    x = drawn(2, 5, 8)
    found, expected = statistic(kept(x, -1)), statistic(x[..., KEPT])
    torch.testing.assert_close(plain(found)[found.alive], expected.flatten())


def test_the_oracle_refuses_survivors_that_do_not_fit():
    """Where tensors meet of which other channels are left, there is no right slim model."""
    x, weight = drawn(2, 5, 8), drawn(3, 8)
    with pytest.raises(MisfitError):
        F.linear(kept(x, -1), marked(weight))
    with pytest.raises(MisfitError):
        kept(x, -1) + marked(x)
    with pytest.raises(MisfitError):
        kept(x, -1).argmax(-1)
