"""What `optimizer.backward` puts into `.grad` behaves as what autograd puts there: kept, added to, fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agsurgery import GradientSurgery
from tests._optimizer_cases import FourTasks, every_base, losses, make, same, train

# -- gradients that the user keeps -----------------------------------------------------------------

KEEP: dict[str, Callable[[Tensor], Any]] = {
    "the gradient": lambda gradient: gradient,
    "a row of it": lambda gradient: gradient[0],
    "a flat view": lambda gradient: gradient.view(-1)[1:3],
    "detached": lambda gradient: gradient.detach(),
    "its numpy array": lambda gradient: gradient.numpy(),
}


@pytest.mark.parametrize("what", KEEP)
@pytest.mark.parametrize("part", ["trunk", "head"])
def test_a_kept_gradient_is_unchanged_by_the_next_backward(part, what):
    model, optimizer = make("sgd")
    layer = model.trunk if part == "trunk" else model.heads[0]
    kept = []
    for batch in range(4):
        optimizer.zero_grad()
        optimizer.backward(losses(model, batch))
        optimizer.step()
        held = KEEP[what](layer.weight.grad)
        kept.append((held, copy.deepcopy(held)))
    for held, then in kept:
        assert (held == then).all()
    assert not (kept[0][0] == kept[1][0]).all()


@every_base
def test_memory_is_reused_without_any_effect_on_the_training(base):
    model, optimizer = make(base, "sum")
    twin, reference = make(base, "sum")
    for batch in range(4):
        train(model, optimizer, [batch])
        train(twin, reference, [batch])
        reference._engine = copy.deepcopy(reference._engine)  # without the memory of earlier steps
    assert same(model.parameters(), twin.parameters())


# -- accumulation ----------------------------------------------------------------------------------


def _clip(model: nn.Module, optimizer: GradientSurgery) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def _zero_in_place(model: nn.Module, optimizer: GradientSurgery) -> None:
    optimizer.zero_grad(set_to_none=False)


def _replace_one(model: nn.Module, optimizer: GradientSurgery) -> None:
    model.trunk.weight.grad = torch.full_like(model.trunk.weight, 0.5)


def _replace_all(model: nn.Module, optimizer: GradientSurgery) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)


def _drop_one(model: nn.Module, optimizer: GradientSurgery) -> None:
    model.trunk.weight.grad = None


def _drop_all(model: nn.Module, optimizer: GradientSurgery) -> None:
    model.zero_grad()


def _plain_backward(model: nn.Module, optimizer: GradientSurgery) -> None:
    torch.stack(losses(model, batch=9)).sum().backward()


def _fewer_tasks(model: nn.Module, optimizer: GradientSurgery) -> None:
    optimizer.backward(losses(model, batch=9, tasks=2))


def _transpose(model: nn.Module, optimizer: GradientSurgery) -> None:
    gradient = model.trunk.weight.grad
    model.trunk.weight.grad = gradient.t().contiguous().t()


BETWEEN = {
    "nothing": lambda model, optimizer: None,
    "a clip in place": _clip,
    "zeros": _zero_in_place,
    "one gradient replaced": _replace_one,
    "all gradients replaced": _replace_all,
    "one gradient dropped": _drop_one,
    "all gradients dropped": _drop_all,
    "a plain backward": _plain_backward,
    "a backward of fewer tasks": _fewer_tasks,
    "one gradient with other strides": _transpose,
}


@pytest.mark.parametrize("method", ["sum", "cagrad"])
@pytest.mark.parametrize("between", BETWEEN)
def test_a_second_backward_adds_to_what_it_finds(between, method):
    fresh, reference = make("sgd", method)
    reference.backward(losses(fresh, batch=1))
    update = [parameter.grad for parameter in fresh.parameters()]

    model, optimizer = make("sgd", method)
    optimizer.backward(losses(model, batch=0))
    BETWEEN[between](model, optimizer)
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    optimizer.backward(losses(model, batch=1))
    for parameter, before, added in zip(model.parameters(), found, update, strict=True):
        expected = added if before is None else before + added
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


def test_two_backwards_accumulate_as_autograd_does():
    model, optimizer = make("sgd", "sum")
    twin = FourTasks()
    for batch in range(3):
        optimizer.backward(losses(model, batch))
        torch.stack(losses(twin, batch)).sum().backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-12)


# -- gradients are ordinary tensors ----------------------------------------------------------------


def test_a_model_with_gradients_can_be_copied():
    model, optimizer = make("sgd")
    optimizer.backward(losses(model))
    before = [parameter.grad.clone() for parameter in model.parameters()]
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = torch.zeros_like(parameter)
    leaf = torch.ones(3, requires_grad=True)
    GradientSurgery(torch.optim.SGD([leaf], lr=0.1)).backward([leaf.sum(), leaf.square().sum()])
    copied = copy.deepcopy(leaf)  # of a plain leaf, torch copies the gradient too
    copied.grad.zero_()
    assert same(before, [parameter.grad for parameter in model.parameters()])
    assert leaf.grad.tolist() == [3.0, 3.0, 3.0]


def test_gradients_can_be_detached_in_place():
    # The idiom of older code: `p.grad.detach_(); p.grad.zero_()`. Torch refuses it for views.
    model, optimizer = make("sgd")
    optimizer.backward(losses(model))
    for parameter in model.parameters():
        parameter.grad.detach_().zero_()
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_gradients_can_be_changed_in_place_outside_of_no_grad():
    # Weight decay by hand: autograd's own gradients allow it, views made under `no_grad` do not.
    model, optimizer = make("sgd")
    optimizer.backward(losses(model))
    for parameter in model.parameters():
        expected = parameter.grad + 0.1 * parameter.detach()
        parameter.grad.add_(parameter, alpha=0.1)
        torch.testing.assert_close(parameter.grad.detach(), expected)


class _Layouts(nn.Module):
    """A convolution in channels_last and a matrix whose gradient autograd computes transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
        self.matrix = nn.Parameter(torch.randn(3, 5))
        self.vector = nn.Parameter(torch.randn(3))

    def losses(self, *, shared: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
        y, z = torch.randn(5, 3, generator=generator), torch.randn(3, generator=generator)
        first = nn.functional.conv2d(x, self.filters).square().mean() + (self.matrix.T * y).sum()
        second = (self.vector * z).sum() + self.vector.square().sum()
        linked = first.sin() if shared else 0
        return [first + self.vector.sum(), second + linked]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gradients_have_the_strides_of_their_parameters_as_autograd_gives_them(shared):
    model = _Layouts()
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    optimizer.backward(model.losses(shared=shared))
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()


FUSED = {
    "SGD": lambda params, fused: torch.optim.SGD(params, lr=0.1, fused=fused),
    "AdamW": lambda params, fused: torch.optim.AdamW(params, lr=0.1, fused=fused),
    "Adagrad": lambda params, fused: torch.optim.Adagrad(params, lr=0.1, fused=fused),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_fused_base_makes_the_same_step_whatever_the_memory_layout(shared, name):
    # Fused kernels walk through parameter and gradient in memory order.
    model = _Layouts()
    twin = copy.deepcopy(model)
    optimizer = GradientSurgery(FUSED[name](model.parameters(), True), "sum")
    bare = FUSED[name](twin.parameters(), False)
    for _ in range(2):
        optimizer.zero_grad()
        bare.zero_grad()
        optimizer.backward(model.losses(shared=shared))
        torch.stack(twin.losses(shared=shared)).sum().backward()
        optimizer.step()
        bare.step()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-3, atol=1e-4)  # float32


def test_the_model_may_change_its_dtype_between_steps():
    model, optimizer = make(lambda params: torch.optim.SGD(params, lr=0.1))
    twin, reference = make(lambda params: torch.optim.SGD(params, lr=0.1))
    model.float()
    optimizer.backward([output.square().mean() for output in model(torch.ones(2, 5))])
    model.double()  # the same parameters, with other data
    model.load_state_dict(twin.state_dict())
    train(model, optimizer, [0])
    train(twin, reference, [0])
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-12, atol=1e-12)
