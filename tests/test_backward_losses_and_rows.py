"""The engine with methods that look at losses (one backward pass) or at coordinates (no weights)."""

import pytest
import torch
from torch import Tensor, nn

import agsurgery
from agsurgery import GradientSurgery
from agsurgery.methods._base import LossMethod, RowMethod


class ByLoss(LossMethod):
    """Weights 10 times the losses, and a count of what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[str, ...], list[float]]] = []

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        self.seen.append((tasks, losses.tolist()))
        return 10 * losses


class Largest(RowMethod):
    """The entry of largest size of each coordinate, and the places it was called for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []
        self.begun = 0

    def begin(self, device: torch.device) -> None:
        self.begun += 1

    def _combine_sum(self, rows: Tensor, start: int) -> Tensor:
        self.calls.append((start, rows.shape[1]))
        return rows.gather(0, rows.abs().argmax(0, keepdim=True)).squeeze(0)


class Counted(torch.autograd.Function):
    """The identity, which counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Counted.passes += 1
        return gradient


def parts(dtype=torch.float64):
    trunk = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    heads = [nn.Parameter(torch.tensor(float(i + 1), dtype=dtype)) for i in range(2)]
    return trunk, heads


def losses_of(trunk, heads):
    Counted.passes = 0
    shared = Counted.apply(trunk)
    return {"a": heads[0] * shared[0] * 0.5, "b": heads[1] * (shared[1] - shared[0])}


def test_methods_that_look_at_losses_take_one_backward_pass_of_the_weighted_sum():
    trunk, heads = parts()
    method = ByLoss()
    report = agsurgery.backward(losses_of(trunk, heads), [trunk, *heads], method)
    assert Counted.passes == 1
    assert method.seen == [(("a", "b"), [0.5, 2.0])]
    assert report.weights.tolist() == [5.0, 20.0]
    assert report.gramian.isnan().all()
    # By hand: 5 d(a)/d + 20 d(b)/d; heads are weighted too.
    assert trunk.grad.tolist() == [5 * 0.5 - 20 * 2, 20 * 2.0]
    assert [head.grad.item() for head in heads] == [5 * 0.5, 20 * 1.0]


def test_heads_keep_their_own_gradient_when_asked_to_in_the_same_single_pass():
    trunk, heads = parts()
    agsurgery.backward(losses_of(trunk, heads), [trunk, *heads], ByLoss(), heads="own")
    assert Counted.passes == 1
    assert trunk.grad.tolist() == [5 * 0.5 - 20 * 2, 20 * 2.0]
    assert [head.grad.item() for head in heads] == [0.5, 1.0]


def test_the_single_pass_accumulates_leaves_untouched_parameters_alone_and_takes_constants():
    trunk, heads = parts()
    idle = nn.Parameter(torch.ones(3, dtype=torch.float64))
    trunk.grad = torch.ones_like(trunk)
    losses = losses_of(trunk, heads) | {"gone": torch.zeros(())}
    agsurgery.backward(losses, [trunk, *heads, idle], ByLoss())
    assert trunk.grad.tolist() == [1 + 5 * 0.5 - 20 * 2, 1 + 20 * 2.0]
    assert idle.grad is None


def test_the_single_pass_scales_gradients_for_a_grad_scaler_and_weighs_unscaled_losses():
    trunk, heads = parts(torch.float32)
    optimizer = GradientSurgery(torch.optim.SGD([trunk, *heads], lr=0.1), ByLoss())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    report = optimizer.backward(losses_of(trunk, heads), scaler=scaler)
    assert report.weights.tolist() == [5.0, 20.0]
    assert trunk.grad.tolist() == [1024 * (5 * 0.5 - 20 * 2), 1024 * 40.0]


def test_a_loss_that_is_not_finite_reaches_the_gradients():
    trunk, heads = parts()
    losses = losses_of(trunk, heads)
    losses["a"] = losses["a"] * torch.inf
    agsurgery.backward(losses, [trunk, *heads], ByLoss())
    assert not trunk.grad.isfinite().any()


def test_methods_without_weights_combine_the_coordinates_of_the_shared_parameters():
    trunk, heads = parts()
    report = agsurgery.backward(losses_of(trunk, heads), [trunk, *heads], Largest())
    assert trunk.grad.tolist() == [-2.0, 2.0]
    assert [head.grad.item() for head in heads] == [0.5, 1.0]
    assert report.weights.isnan().all()
    torch.testing.assert_close(report.norms, torch.tensor([0.5, 8**0.5], dtype=torch.float64))


def test_methods_without_weights_accumulate_and_see_each_bucket_once():
    first = nn.Parameter(torch.ones(5))
    second = nn.Parameter(torch.ones(7, dtype=torch.float64))
    method = Largest()
    for repeat in (1, 2):
        losses = [first.sum() + second.sum(), -2 * first.sum() - 3 * second.sum()]
        agsurgery.backward(losses, [first, second], method)
        assert first.grad.tolist() == [-2.0 * repeat] * 5
        assert second.grad.tolist() == [-3.0 * repeat] * 7
    assert method.begun == 2
    lengths = [length for _, length in method.calls[:2]]
    assert method.calls[:2] == [(0, lengths[0]), (lengths[0], lengths[1])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_methods_without_weights_see_16_bit_gradients_widened(dtype):
    x = nn.Parameter(torch.ones(3, dtype=dtype))

    class Widened(Largest):
        def _combine_sum(self, rows, start):
            assert rows.dtype == torch.float32
            return super()._combine_sum(rows, start)

    agsurgery.backward([x.sum(), -2 * x.sum()], [x], Widened())
    assert x.grad.dtype == dtype
    assert x.grad.tolist() == [-2.0] * 3


def test_a_method_by_losses_asked_for_a_gramian_alone_says_what_it_needs():
    with pytest.raises(ValueError, match=r"needs them\. Got a Gramian only"):
        ByLoss().solve(torch.eye(2))
    with pytest.raises(TypeError, match="has no weights"):
        Largest().solve(torch.eye(2))
    with pytest.raises(TypeError, match="works on coordinates"):
        agsurgery.methods.NormRestored(Largest())
