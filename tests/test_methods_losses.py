"""Weightings of losses, constant and random weights: closed forms, TorchJD, what they remember."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import agsurgery
from agsurgery.methods import DWA, FAMO, GLS, RLW, STCH, UW, Fixed, Random, solve

LOSS_METHODS = [UW, DWA, RLW, GLS, FAMO, STCH]


def losses(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("method", LOSS_METHODS)
@pytest.mark.parametrize("tasks", [1, 2, 5, 32])
def test_equal_losses_start_from_the_plain_sum_on_average(method, tasks):
    weights = method()(torch.ones(tasks, dtype=torch.float64))
    assert weights.shape == (tasks,)
    torch.testing.assert_close(weights.sum().item(), float(tasks))
    if method is not RLW:
        torch.testing.assert_close(weights, torch.ones(tasks, dtype=torch.float64))
    mean = method(reduction="mean")(torch.ones(tasks, dtype=torch.float64))
    torch.testing.assert_close(mean * tasks, weights)


def test_gls_is_the_gradient_of_the_geometric_mean():
    values = losses(4.0, 0.5, 3.0).requires_grad_()
    values.prod().pow(1 / 3).backward()
    torch.testing.assert_close(GLS(reduction="mean")(values), values.grad)
    extreme = GLS()(losses(*[1e-30] * 20, *[1e-20] * 20))  # their product would be zero
    torch.testing.assert_close(extreme[0] / extreme[-1], losses(1e10)[0])


def test_stch_is_the_gradient_of_the_smooth_maximum():
    values, share, ideal = (
        losses(0.3, 2.0, 1.0).requires_grad_(),
        losses(2.0, 0.5, 0.5),
        losses(0.1, 0, 0.2),
    )
    (0.7 * torch.logsumexp(share * (values - ideal) / 0.7, 0)).backward()
    method = STCH(0.7, preference=share.tolist(), ideal=ideal.tolist(), reduction="mean")
    torch.testing.assert_close(method(values), values.grad)


def test_stch_goes_from_the_largest_loss_to_the_plain_sum():
    values = losses(0.3, 2.0, 1.0)
    torch.testing.assert_close(STCH(1e-3)(values), losses(0, 3, 0))
    torch.testing.assert_close(STCH(1e6)(values), losses(1, 1, 1), rtol=1e-5, atol=0)


def test_uw_learns_the_inverse_of_a_constant_loss():
    method = UW(lr=0.05)
    for _ in range(2000):
        weights = method(losses(4.0, 0.1))
    torch.testing.assert_close(weights, losses(0.25, 10.0), rtol=0.05, atol=0)


def test_uw_steps_as_torch_adam_on_the_objective_of_the_paper():
    method, log_variances = UW(lr=0.1), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_variances], lr=0.1)
    for step in range(20):
        values = losses(1 + step % 3, 0.2)
        torch.testing.assert_close(method(values), (-log_variances).exp().detach())
        optimizer.zero_grad()
        ((-log_variances).exp() * values + log_variances).sum().backward()
        optimizer.step()


def test_dwa_follows_the_ratio_of_the_last_two_epochs():
    method = DWA(temperature=2.0)
    epochs = [[(1.0, 4.0), (3.0, 4.0)], [(1.0, 3.0)], [(2.0, 2.0)]]
    for epoch in epochs:
        for pair in epoch:
            weights = method(losses(*pair))
        method.end_epoch()
    # In the third epoch: r = 1 / 2 and 3 / 4.
    expected = 2 * (losses(0.5, 0.75) / 2).softmax(0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(method(losses(1, 1)), 2 * (losses(2 / 1, 2 / 3) / 2).softmax(0))


def test_dwa_skips_an_epoch_for_a_task_that_did_not_occur():
    method = DWA()
    for tasks, values in ((("a", "b"), (2.0, 8.0)), (("a",), (1.0,)), (("a", "b"), (1.0, 2.0))):
        method.solve(torch.eye(len(tasks)), losses(*values), tasks)
        method.end_epoch()
    ratio = losses(1.0, 0.25)  # a: 1 / 1, b: 2 / 8
    weights = method.solve(torch.eye(2), losses(1, 1), ("a", "b")).weights
    torch.testing.assert_close(weights, 2 * (ratio / 2).softmax(0))


def test_rlw_draws_softmaxes_of_normal_numbers():
    method = RLW(seed=3, reduction="mean")
    draws = torch.stack([method(losses(1, 1, 1)) for _ in range(4000)])
    # Logarithms of ratios of softmaxes are differences of independent normal numbers.
    difference = (draws[:, 0] / draws[:, 1]).log()
    assert abs(difference.mean()) < 4 * math.sqrt(2 / 4000)
    assert abs(difference.var() - 2) < 4 * 2 * math.sqrt(2 / 4000)


def test_random_weights_are_uniform_on_the_simplex():
    method = Random(seed=3, reduction="mean")
    draws = torch.stack([method(torch.eye(3, dtype=torch.float64)) for _ in range(4000)])
    torch.testing.assert_close(draws.sum(1), torch.ones(4000, dtype=torch.float64))
    # A coordinate of a uniform point on the triangle has mean 1/3 and variance 1/18.
    assert (draws.mean(0) - 1 / 3).abs().max() < 4 * math.sqrt(1 / 18 / 4000)
    assert (draws.var(0) - 1 / 18).abs().max() < 0.005


def test_fixed_weights_by_place_or_name():
    gramian = torch.eye(2, dtype=torch.float64)
    assert Fixed([0.0, -2.0])(gramian).tolist() == [0.0, -2.0]
    assert Fixed({"b": 3.0, "a": 1.0}).solve(gramian, tasks=("a", "b")).weights.tolist() == [
        1.0,
        3.0,
    ]


def official_famo(sequence: list[tuple[Tensor, Tensor]], lr: float, decay: float) -> list[Tensor]:
    """The algorithm with autograd and torch's Adam, weights summing to 1."""
    logits = torch.zeros(len(sequence[0][0]), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr, weight_decay=decay)
    weights = []
    for before, after in sequence:
        share = logits.softmax(0)
        raw = share / before
        weights.append((raw / raw.sum()).detach())
        optimizer.zero_grad()
        share.backward(before.log() - after.log())
        optimizer.step()
    return weights


def test_famo_follows_its_algorithm():
    generator = torch.Generator().manual_seed(0)
    sequence = [
        tuple(torch.rand(2, 3, dtype=torch.float64, generator=generator) + 0.1) for _ in range(30)
    ]
    method = FAMO(lr=0.1, weight_decay=0.01, reduction="mean")
    for (before, after), expected in zip(sequence, official_famo(sequence, 0.1, 0.01), strict=True):
        torch.testing.assert_close(method(before), expected)
        method.update(after)


def test_famo_takes_updates_by_name_and_bounds():
    by_name, by_place = FAMO(lower_bound={"a": -1.0, "b": 0.5}), FAMO()
    unit = torch.eye(2, dtype=torch.float64)
    for _ in range(3):
        named = by_name.solve(unit, losses(1.0, 2.5), ("a", "b")).weights
        torch.testing.assert_close(named, by_place(losses(2.0, 2.0)))
        by_name.update({"b": losses(1.5)[0], "a": losses(0.5)[0]})
        by_place.update([losses(1.5)[0], losses(1.0)[0]])


def test_famo_refuses_updates_out_of_order_or_of_other_tasks():
    method = FAMO()
    with pytest.raises(RuntimeError, match="must follow a `backward`"):
        method.update(losses(1, 2))
    method(losses(1, 2))
    with pytest.raises(ValueError, match="must be those of the last `backward`"):
        method.update(losses(1, 2, 3))
    with pytest.raises(ValueError, match="must be those of the last `backward`"):
        method.update({"0": losses(1)[0], "b": losses(1)[0]})


def use(method, values: Tensor, tasks=("a", "b")) -> Tensor:
    weights = solve(method, torch.eye(2, dtype=torch.float64), values, tasks).weights
    if isinstance(method, FAMO):
        method.update(0.5 * values)
    if isinstance(method, DWA):
        method.end_epoch()
    return weights


@pytest.mark.parametrize("make", LOSS_METHODS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_restored_method_goes_on_as_the_original_would(make, way):
    original = make()
    for step in range(3):
        use(original, losses(1 + step, 2.0))
    if way == "deepcopy":
        restored = copy.deepcopy(original)
    elif way == "pickle":
        restored = pickle.loads(pickle.dumps(original))
    else:
        restored = make()
        restored.load_state_dict(original.state_dict())
    for step in range(3):
        values = losses(2.0, 1 + step)
        assert torch.equal(use(original, values), use(restored, values))


@pytest.mark.parametrize("make", [UW, DWA, FAMO])
def test_what_is_remembered_follows_the_names_of_the_tasks(make):
    straight, swapped = make(), make()
    for values in (losses(1.0, 2.0), losses(0.5, 1.9), losses(0.4, 1.7)):
        first = use(straight, values)
        second = use(swapped, values.flip(0), ("b", "a"))
        torch.testing.assert_close(first, second.flip(0))


@pytest.mark.parametrize("make", LOSS_METHODS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_losses_that_are_not_finite_give_no_finite_answer_and_are_not_remembered(make, poison):
    method, untouched = make(), make()
    use(method, losses(1.0, 2.0))
    use(untouched, losses(1.0, 2.0))
    weights = solve(
        method, torch.eye(2, dtype=torch.float64), losses(1.0, poison), ("a", "b")
    ).weights
    assert weights.isnan().all()
    if make is RLW:
        untouched(losses(1.0, 1.0))  # a draw is a draw
    torch.testing.assert_close(use(method, losses(1.0, 1.0)), use(untouched, losses(1.0, 1.0)))


@pytest.mark.parametrize("make", LOSS_METHODS)
def test_traced_without_reading_a_device_value_and_compiled_as_one_graph(make):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        method = make()
        weights = method(torch.empty(3, dtype=torch.float64, device="cuda"))
        assert weights.device.type == "cuda"
    torch._dynamo.reset()
    compiled, eager = torch.compile(make(), fullgraph=True, backend="aot_eager"), make()
    for values in (losses(1, 2, 3), losses(2, 2, 1)):
        torch.testing.assert_close(compiled(values), eager(values))


@pytest.mark.parametrize("name", ["uw", "dwa", "rlw", "gls", "famo", "stch"])
def test_trains_by_name_in_one_backward_pass(name):
    weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = agsurgery.GradientSurgery(torch.optim.SGD([weight], lr=0.1), name)
    for _ in range(3):
        optimizer.zero_grad()
        report = optimizer.backward({"a": weight.square().sum(), "b": (weight - 1).square().sum()})
        optimizer.step()
    assert weight.isfinite().all()
    assert report.weights.isfinite().all()
    assert report.gramian.isnan().all()


def test_agrees_with_torchjd_where_conventions_match():
    import torchjd.scalarization as peer

    values = losses(0.5, 2.0, 1.0).requires_grad_()
    peer.GeometricMean()(values).backward()
    torch.testing.assert_close(GLS(reduction="mean")(values), values.grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UW(lr=0.0), "must be positive"),
        (lambda: UW(lr=math.inf), "positive and finite"),
        (lambda: FAMO(lr=math.inf), "positive and finite"),
        (lambda: DWA(temperature=-1.0), "must be positive"),
        (lambda: FAMO(lr=-1.0), "must be positive"),
        (lambda: FAMO(weight_decay=-1.0), "must not be negative"),
        (lambda: STCH(mu=0.0), "positive and finite"),
        (lambda: Fixed([math.nan]), "must be finite"),
        (lambda: Fixed([1.0])(torch.eye(2)), "Got 1 for 2 tasks"),
    ],
)
def test_wrong_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
