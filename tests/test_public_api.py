"""The public names as one piece: how methods are shown and called, and what an optimizer adds to its base."""

import inspect

import pytest
import torch
from torch import nn

import agsurgery
from agsurgery import AGS, Fixed, GradientSurgery, PCGrad, Smoothed
from agsurgery.methods import Method
from agsurgery.methods._base import LossMethod, RowMethod
from tests.samplers import random

NEEDED = {"Fixed": [[1.0, 0.5]], "NormRestored": ["ags"], "Smoothed": ["upgrad"]}
"""Arguments of the methods that cannot do without."""

CLASSES = {
    name: value
    for name in agsurgery.__all__
    if isinstance(value := getattr(agsurgery, name), type) and issubclass(value, Method)
}


def made(name: str) -> Method:
    """A method with the least of arguments."""
    return CLASSES[name](*NEEDED.get(name, []))


every_method = pytest.mark.parametrize("name", CLASSES)


def every_one(*kinds: type[Method]) -> pytest.MarkDecorator:
    """Methods of these kinds."""
    return pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if issubclass(c, kinds)])


weighs_gradients = pytest.mark.parametrize(
    "name", [n for n, c in CLASSES.items() if not issubclass(c, (LossMethod, RowMethod))]
)


@every_method
def test_a_method_is_shown_as_it_would_be_written(name):
    method = made(name)
    again = eval(repr(method), vars(agsurgery))
    assert type(again) is type(method)
    assert repr(again) == repr(method)
    for argument in inspect.signature(type(method)).parameters:
        assert f"{argument}=" in repr(method)


def test_arguments_that_were_given_are_shown():
    assert repr(AGS(max_scale=None, seed=7)) == "AGS(max_scale=None, seed=7, reduction='sum')"
    assert repr(Fixed({"a": 2.0})) == "Fixed(weights={'a': 2.0})"
    assert repr(Smoothed(PCGrad(seed=3), momentum=0.5)) == (
        "Smoothed(method=PCGrad(seed=3, reduction='sum'), momentum=0.5)"
    )


@pytest.mark.parametrize("name", ["AGS", "PCGrad", "GradVac", "GradDrop", "Random", "RLW"])
def test_the_seed_shown_is_the_one_in_use(name):
    method = CLASSES[name](seed=3)
    assert method.seed == 3
    method.load_state_dict(CLASSES[name](seed=11).state_dict())
    assert "seed=11" in repr(method)


def test_words_are_given_by_name_and_numbers_may_be_given_by_place():
    for name, method in CLASSES.items():
        for argument in inspect.signature(method).parameters.values():
            if isinstance(argument.default, str):
                assert argument.kind is inspect.Parameter.KEYWORD_ONLY, (name, argument)


# -- what a method can be called with ---------------------------------------------------------------


@weighs_gradients
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2, 3), (0, 0)])
def test_every_method_refuses_what_has_no_square_gramian(name, shape):
    method = made(name)
    with pytest.raises(ValueError, match="`gramian` must be square") as caught:
        method(torch.ones(shape))
    assert f"Got shape {tuple(shape)}" in str(caught.value)
    with pytest.raises(ValueError, match="must be square"):
        method.solve(torch.ones(shape))


def test_a_gramian_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"`gramian` must be a tensor\. Got list"):
        AGS()([[1.0, 0.0], [0.0, 1.0]])


@every_one(LossMethod)
@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_methods_of_losses_refuse_what_is_no_vector(name, shape):
    method = made(name)
    with pytest.raises(ValueError, match=r"must have shape \(K,\)"):
        method(torch.ones(shape))


@every_one(RowMethod)
@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 2, 2)])
def test_methods_of_rows_refuse_what_is_no_matrix(name, shape):
    method = made(name)
    with pytest.raises(ValueError, match=r"must have shape \(K, n\)"):
        method(torch.ones(shape))


# -- what an optimizer adds ---------------------------------------------------------------------------


def test_a_wrapper_adds_few_names_to_those_of_an_optimizer():
    weight = nn.Parameter(torch.ones(2))
    optimizer = GradientSurgery(torch.optim.SGD([weight], lr=0.1))
    added = {name for name in dir(optimizer) if not name.startswith("_")}
    added -= set(dir(torch.optim.SGD([weight], lr=0.1)))
    assert added == {"backward", "base_optimizer", "combine", "method", "report", "task"}


def test_function_and_wrapper_take_the_same_arguments_in_the_same_words():
    function = inspect.signature(agsurgery.backward).parameters
    options = inspect.signature(GradientSurgery).parameters
    step = inspect.signature(GradientSurgery.backward).parameters
    # What needs a step before or after this one, an optimizer's groups or its state.
    assert options.keys() - function.keys() == {
        *("optimizer", "every", "accumulation", "tasks", "fsdp_model")
    }
    assert step.keys() - function.keys() == {"self", "combine"}
    assert function.keys() <= options.keys() | step.keys() | {"params"}
    for name, argument in function.items():
        for others in (options, step):
            if name in others:
                assert others[name].default == argument.default, name


# -- methods of the user's own --------------------------------------------------------------------------


def test_a_callable_with_a_memory_is_called_after_each_micro_batch_and_never_taken_back():
    # As the page on methods says; methods of this package are asked once for each update.
    seen = []

    def remembering(gramian: torch.Tensor) -> torch.Tensor:
        seen.append(gramian)
        return torch.ones_like(gramian.diagonal())

    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = GradientSurgery(
        torch.optim.SGD([weight], lr=0.1), remembering, accumulation="tasks"
    )
    rows = random(2, 4)
    for _ in range(3):
        optimizer.backward([row @ weight for row in rows])
    for count, gramian in enumerate(seen, 1):
        torch.testing.assert_close(gramian, count**2 * rows @ rows.T)
    assert len(seen) == 3
    torch.testing.assert_close(weight.grad, 3 * rows.sum(0))
    assert not any(key.startswith("agsurgery") for key in optimizer.param_groups[0])
