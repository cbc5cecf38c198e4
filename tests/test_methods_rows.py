"""GradDrop and TrimmedMean, coordinate by coordinate."""

import copy

import pytest
import torch
from torch import Tensor

import agsurgery
from agsurgery.methods import GradDrop, TrimmedMean
from tests.samplers import random


def signs_kept(rows: Tensor, update: Tensor) -> Tensor:
    """1 where the positive entries were kept, -1 where the negative ones, 0 where neither fits."""
    positive, negative = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
    return torch.where(update == positive, 1, torch.where(update == negative, -1, 0))


def test_graddrop_keeps_one_sign_in_each_coordinate_with_the_probability_of_its_weight():
    rows = torch.tensor([[3.0], [-1.0], [0.5]], dtype=torch.float64).expand(3, 40_000)
    kept = signs_kept(rows, GradDrop()(rows))
    assert (kept != 0).all()
    # P = (1 + 2.5 / 4.5) / 2 = 7/9; four standard deviations of the share are 0.008.
    assert abs((kept == 1).double().mean() - 7 / 9) < 0.0085


def test_graddrop_draws_independently_for_each_coordinate_and_step():
    rows = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 10_000)
    method = GradDrop()
    first, second = method(rows), method(rows)
    assert abs((first * first.roll(1)).mean()) < 0.04
    assert abs((first * second).mean()) < 0.04


def test_graddrop_does_not_depend_on_how_the_parameters_are_cut():
    rows = random(3, 100)
    whole, parts = GradDrop(seed=4), GradDrop(seed=4)
    parts.begin(rows.device)
    pieces = [parts.combine(rows[:, :30], 0), parts.combine(rows[:, 30:], 30)]
    assert torch.equal(whole(rows), torch.cat(pieces))


@pytest.mark.parametrize("leak", [0.25, [0.0, 0.5, 1.0]])
def test_the_leak_passes_whatever_the_sign(leak):
    rows = random(3, 50)
    kept = GradDrop(seed=2)(rows)
    signs = signs_kept(rows, kept)
    mask = (rows > 0) == (signs == 1)
    leaks = torch.tensor(leak if isinstance(leak, list) else [leak] * 3, dtype=torch.float64)[
        :, None
    ]
    expected = ((leaks + (1 - leaks) * mask) * rows).sum(0)
    torch.testing.assert_close(GradDrop(leak, seed=2)(rows), expected)


def test_trimmed_mean_by_hand_and_beside_torchjd():
    import torchjd.aggregation

    rows = torch.tensor([[1.0, 9.0], [2.0, -9.0], [4.0, 0.0], [100.0, 1.0]])
    assert TrimmedMean(1, reduction="mean")(rows).tolist() == [3.0, 0.5]
    rows = random(9, 40)
    for trim in (0, 1, 4):
        peer = torchjd.aggregation.TrimmedMean(trim)(rows)
        torch.testing.assert_close(TrimmedMean(trim, reduction="mean")(rows), peer)
        torch.testing.assert_close(TrimmedMean(trim)(rows), 9 * peer)


@pytest.mark.parametrize("method", [GradDrop(), GradDrop(0.5), TrimmedMean(1)])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_not_finite_in_its_coordinate(method, poison):
    rows = random(3, 4)
    rows[1, 2] = poison
    assert method(rows).isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("method", [GradDrop(), TrimmedMean(1)])
def test_reduction_mean_divides_by_the_number_of_tasks(method):
    mean = copy.deepcopy(method)
    mean.reduction = "mean"
    rows = random(3)
    torch.testing.assert_close(method(rows), 3 * mean(rows))


def test_graddrop_resumes_its_draws_from_a_saved_state():
    used, fresh, rows = GradDrop(seed=5), GradDrop(), random(3, 50)
    used(rows)
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(used(rows), fresh(rows))


@pytest.mark.parametrize("method", ["graddrop", "trimmedmean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_through_the_engine_by_name(method, dtype):
    x = torch.zeros(5, dtype=dtype, requires_grad=True)
    losses = [x.sum(), 2 * x.sum(), 3 * x.sum()]
    report = agsurgery.backward(losses, [x], method)
    assert x.grad.tolist() == [6.0] * 5  # the sum, and three times the median
    assert report.weights.isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradDrop(1.5), "between 0 and 1"),
        (lambda: GradDrop([]), "Got none"),
        (lambda: GradDrop([0.1, 0.2])(random(3)), "Got 2 for 3 tasks"),
        (lambda: TrimmedMean(-1), "must not be negative"),
        (lambda: TrimmedMean(1)(random(2)), "use a smaller `trim`"),
    ],
)
def test_wrong_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
