"""From losses to `.grad`: who gets what, in which form losses may come, what is refused."""

import copy

import pytest
import torch
from torch import nn

import agsurgery
from agsurgery import AGS, CAGrad, GradientSurgery, PCGrad, Sum, SurgeryReport
from agsurgery.engine import Engine
from agsurgery.graph import gradient_root, walk
from tests import references


class TwoHeads(nn.Module):
    """A trunk, two heads of one loss each, and a layer that nothing uses."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh()).to(dtype)
        self.first, self.second = nn.Linear(6, 1).to(dtype), nn.Linear(6, 1).to(dtype)
        self.unused = nn.Linear(2, 2).to(dtype)

    def losses(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(x)
        return {
            "up": (self.first(features) - 3).square().mean(),
            "down": 4 * (self.second(features) + 2).square().mean(),
        }


@pytest.fixture
def model():
    return TwoHeads()


@pytest.fixture
def x():
    return torch.randn(11, 5, dtype=torch.float64)


def explicit(model: TwoHeads, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows of the trunk's gradients by separate backward passes, and the plain gradients of all parameters."""
    rows = []
    for name in ("up", "down"):
        gradients = torch.autograd.grad(model.losses(x)[name], list(model.trunk.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    twin = copy.deepcopy(model)
    sum(twin.losses(x).values()).backward()
    return torch.stack(rows), [p.grad for p in twin.parameters()]


def trunk_gradient(model: TwoHeads) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.trunk.parameters()])


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        (PCGrad(), lambda rows: references.pcgrad(rows, [[1], [0]])),
        (AGS(), lambda rows: references.ags(rows, [[1], [0]])),
        (Sum(), lambda rows: rows.sum(0)),
        (CAGrad(0.4), lambda rows: references.cagrad(rows, 0.4)),
    ],
)
def test_shared_parameters_receive_the_surgery_of_explicit_vectors(model, x, method, reference):
    rows, _ = explicit(model, x)
    agsurgery.backward(model.losses(x), model.parameters(), method)
    torch.testing.assert_close(trunk_gradient(model), reference(rows), rtol=1e-5, atol=1e-7)


def test_heads_receive_their_own_gradient_and_unused_parameters_none(model, x):
    _, plain = explicit(model, x)
    agsurgery.backward(model.losses(x), model.parameters(), "pcgrad")
    by_name = dict(zip([name for name, _ in model.named_parameters()], plain, strict=True))
    for name, parameter in model.named_parameters():
        if name.startswith("unused"):
            assert parameter.grad is None
        elif not name.startswith("trunk"):
            torch.testing.assert_close(parameter.grad, by_name[name])


def test_heads_stay_out_of_the_gramian(model, x):
    rows, _ = explicit(model, x)
    report = agsurgery.backward(model.losses(x), model.parameters())
    torch.testing.assert_close(report.gramian, rows @ rows.T)


def test_weighted_heads_receive_their_gradient_times_the_weight_of_the_task(model, x):
    _, plain = explicit(model, x)
    report = agsurgery.backward(
        model.losses(x), model.parameters(), lambda g: g.new_tensor([2.0, 3.0]), heads="weighted"
    )
    by_name = dict(zip([name for name, _ in model.named_parameters()], plain, strict=True))
    assert report.weights.tolist() == [2.0, 3.0]
    torch.testing.assert_close(model.first.weight.grad, 2 * by_name["first.weight"])
    torch.testing.assert_close(model.second.bias.grad, 3 * by_name["second.bias"])


def test_parameters_named_as_shared_are_the_only_ones_in_the_gramian(model, x):
    last = list(model.trunk[2].parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(model.losses(x)[n], last)])
        for n in ("up", "down")
    ]
    _, plain = explicit(model, x)
    report = agsurgery.backward(model.losses(x), model.parameters(), "pcgrad", shared=last)
    torch.testing.assert_close(report.gramian[0, 1], rows[0] @ rows[1])
    torch.testing.assert_close(
        model.trunk[0].weight.grad, plain[0]
    )  # reached by both, gets the plain sum


@pytest.mark.parametrize(
    "form",
    [
        lambda d: list(d.values()),
        lambda d: tuple(d.values()),
        lambda d: torch.stack(list(d.values())),
    ],
)
def test_every_form_of_losses_gives_the_same_gradients(model, x, form):
    other = copy.deepcopy(model)
    named = agsurgery.backward(model.losses(x), model.parameters())
    unnamed = agsurgery.backward(form(other.losses(x)), other.parameters())
    assert named.tasks == ("up", "down")
    assert unnamed.tasks == ("0", "1")
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None)
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad)


def test_a_stacked_vector_of_losses_still_tells_heads_from_shared_parameters(model, x):
    report = agsurgery.backward(torch.stack(list(model.losses(x).values())), model.parameters())
    rows, _ = explicit(model, x)
    torch.testing.assert_close(report.gramian, rows @ rows.T)


def test_without_params_all_leaves_that_the_losses_reach_get_a_gradient(model, x):
    agsurgery.backward(model.losses(x))
    assert all(
        (p.grad is None) == name.startswith("unused") for name, p in model.named_parameters()
    )


def test_a_single_loss_gives_its_plain_gradient(model, x):
    twin = copy.deepcopy(model)
    twin.losses(x)["up"].backward()
    agsurgery.backward([model.losses(x)["up"]], model.parameters())
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None)
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad)


def test_a_constant_loss_is_a_task_without_gradient(model, x):
    twin = copy.deepcopy(model)
    twin.losses(x)["up"].backward()
    report = agsurgery.backward(
        {"up": model.losses(x)["up"], "absent": torch.zeros(())}, model.parameters()
    )
    assert report.tasks == ("up", "absent")
    torch.testing.assert_close(model.trunk[0].weight.grad, twin.trunk[0].weight.grad)


def test_a_task_that_reaches_only_part_of_the_shared_parameters_has_zeros_elsewhere(x):
    a, b = (
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
        nn.Parameter(torch.ones(3, dtype=torch.float64)),
    )
    losses = [(a * b).sum(), (a - 2).square().sum(), -(3 * b).sum()]
    report = agsurgery.backward(losses, [a, b], Sum())
    assert report.gramian[1, 2] == 0
    torch.testing.assert_close(a.grad, torch.full((3,), 1.0 - 2.0, dtype=torch.float64))
    torch.testing.assert_close(b.grad, torch.full((3,), 1.0 - 3.0, dtype=torch.float64))


def test_rows_of_an_earlier_step_do_not_leak_into_a_task_that_is_absent_now(model, x):
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), Sum())
    third = lambda: model.trunk(x).sum()  # noqa: E731  # a loss without a head
    optimizer.backward([*model.losses(x).values(), third()])
    optimizer.zero_grad()
    twin = copy.deepcopy(model)
    sum(twin.losses(x).values()).backward()
    optimizer.backward([*model.losses(x).values(), torch.zeros(())])
    torch.testing.assert_close(model.trunk[0].weight.grad, twin.trunk[0].weight.grad)


def test_gradients_are_added_to_what_is_there(model, x):
    agsurgery.backward(model.losses(x), model.parameters())
    once = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    agsurgery.backward(model.losses(x), model.parameters())
    for parameter, before in zip(model.parameters(), once, strict=True):
        if before is not None:
            torch.testing.assert_close(parameter.grad, 2 * before)


def test_disjoint_graphs_need_no_retained_graph():
    weight = nn.Parameter(torch.randn(3, 3))
    losses = [(torch.randn(4, 3) @ weight).square().sum() for _ in range(3)]
    reach = walk([gradient_root(loss) for loss in losses], [weight])
    assert reach.retain == [False, False, False]


def test_a_graph_is_retained_until_its_last_loss():
    weight = nn.Parameter(torch.randn(3, 3))
    trunk = torch.randn(4, 3) @ weight
    apart = (torch.randn(4, 3) @ weight).sum()
    losses = [trunk.sum(), apart, trunk.square().sum(), trunk.exp().sum()]
    reach = walk([gradient_root(loss) for loss in losses], [weight])
    assert reach.retain == [True, False, True, False]


def test_graphs_are_freed_unless_asked_to_stay(model, x):
    losses = model.losses(x)
    agsurgery.backward(losses, model.parameters(), retain_graph=True)
    agsurgery.backward(losses, model.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        agsurgery.backward(losses, model.parameters())


def test_tied_weights_count_once():
    weight = nn.Parameter(torch.randn(3, dtype=torch.float64))
    losses = [(weight * weight).sum(), -(weight * 5).sum()]
    report = agsurgery.backward(losses, [weight, weight], Sum())
    torch.testing.assert_close(report.gramian[0, 0], 4 * weight.detach().square().sum())
    torch.testing.assert_close(weight.grad, 2 * weight.detach() - 5)


def test_complex_parameters_use_the_real_inner_product():
    weight = nn.Parameter(torch.randn(4, dtype=torch.complex128))
    target = torch.randn(4, dtype=torch.complex128)
    losses = [(weight - target).abs().square().sum(), weight.abs().square().sum()]
    rows = [
        torch.view_as_real(torch.autograd.grad(loss, weight, retain_graph=True)[0]).flatten()
        for loss in losses
    ]
    report = agsurgery.backward(losses, [weight], Sum())
    torch.testing.assert_close(report.gramian, torch.stack(rows) @ torch.stack(rows).T)
    torch.testing.assert_close(torch.view_as_real(weight.grad).flatten(), rows[0] + rows[1])


def test_mixed_dtypes_share_one_gramian():
    a, b = nn.Parameter(torch.randn(40)), nn.Parameter(torch.randn(40).bfloat16())
    losses = [(a * b.float()).sum(), -(a + b.float()).sum()]
    rows = [
        torch.cat([g.double() for g in torch.autograd.grad(loss, [a, b], retain_graph=True)])
        for loss in losses
    ]
    report = agsurgery.backward(losses, [a, b], "ags")
    torch.testing.assert_close(
        report.gramian, torch.stack(rows) @ torch.stack(rows).T, rtol=1e-5, atol=1e-5
    )
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.bfloat16)


def test_channels_last_parameters_are_served():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 6, 6)
    losses = [conv(image).square().mean(), -conv(image).mean()]
    expected = torch.autograd.grad(sum(losses), conv.weight, retain_graph=True)[0]
    agsurgery.backward(losses, conv.parameters(), Sum())
    torch.testing.assert_close(conv.weight.grad, expected)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_neither_of_two_tasks_is_opposed_at_any_loss_scale(scale, dtype):
    model = TwoHeads(dtype)
    x = torch.randn(11, 5, dtype=dtype)
    losses = [scale * loss for loss in model.losses(x).values()]
    losses[1] = 1e4 * losses[1]
    report = agsurgery.backward(losses, model.parameters())
    smallest = (report.descent / report.norms).min()
    assert smallest >= -1e-6 * report.update_norm


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_reaches_every_shared_gradient(model, x, poison):
    losses = model.losses(x)
    losses["up"] = losses["up"] * poison
    agsurgery.backward(losses, model.parameters())
    assert not any(torch.isfinite(p.grad).any() for p in model.trunk.parameters())
    assert torch.isfinite(model.second.weight.grad).all()


def test_the_gramian_is_not_computed_in_16_bits_inside_autocast(x):
    model = TwoHeads(torch.float32)
    losses = model.losses(x.float())
    plain = agsurgery.backward(losses, model.parameters(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = agsurgery.backward(losses, model.parameters())
    assert torch.equal(plain.gramian, inside.gramian)


def test_report_says_what_happened(model, x):
    report = agsurgery.backward(model.losses(x), model.parameters(), "pcgrad")
    rows, _ = explicit(model, x)
    assert isinstance(report, SurgeryReport)
    torch.testing.assert_close(report.norms, rows.norm(dim=1))
    torch.testing.assert_close(report.cosines[0, 1], torch.cosine_similarity(*rows, dim=0))
    assert report.conflict.item() == (rows[0] @ rows[1] < 0).item()
    torch.testing.assert_close(report.update_norm, trunk_gradient(model).norm())
    torch.testing.assert_close(report.sum_norm, rows.sum(0).norm())
    torch.testing.assert_close(report.descent, rows @ trunk_gradient(model))
    torch.testing.assert_close(report.sum_descent, rows @ rows.sum(0))
    flat = report.to_dict()
    assert flat["cosine/down/up"] == pytest.approx(report.cosines[0, 1].item())
    assert "down" in str(report)


def test_storage_is_reused_from_step_to_step(model, x):
    engine = Engine("ags")
    parameters = list(model.parameters())
    engine(model.losses(x), parameters)
    first = model.trunk[0].weight.grad.data_ptr()
    for parameter in parameters:
        parameter.grad = None
    engine(model.losses(x), parameters)
    assert model.trunk[0].weight.grad.data_ptr() == first


def test_parameters_outside_may_be_ignored():
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    agsurgery.backward([(weight * other).sum(), weight.sum()], [weight], outside="ignore")
    assert other.grad is None
    assert weight.grad is not None


def test_inputs_that_require_grad_are_not_strangers():
    weight = nn.Parameter(torch.ones(3))
    points = torch.ones(3, requires_grad=True)  # as in a physics-informed network
    agsurgery.backward([(weight * points).sum(), weight.sum()], [weight])
    assert points.grad is None


def test_nothing_is_changed_by_a_refused_call(model, x):
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.backward(model.losses(x))
    before = model.trunk[0].weight.grad.clone()
    with pytest.raises(ValueError, match="scalar"):
        optimizer.backward([model.trunk(x)])
    assert torch.equal(model.trunk[0].weight.grad, before)


def test_non_reentrant_checkpoints_are_served(x):
    from torch.utils.checkpoint import checkpoint

    model = TwoHeads()
    rows, _ = explicit(model, x)
    features = checkpoint(model.trunk, x, use_reentrant=False)
    losses = [
        (model.first(features) - 3).square().mean(),
        4 * (model.second(features) + 2).square().mean(),
    ]
    report = agsurgery.backward(losses, model.parameters())
    torch.testing.assert_close(report.gramian, rows @ rows.T)


@pytest.mark.parametrize("method", ["ags", "pcgrad", "cagrad", "sum"])
def test_weighted_heads_are_served_when_nothing_is_shared(method, model, x):
    agsurgery.backward([model.losses(x)["up"]], model.parameters(), method, heads="weighted")
    assert model.first.weight.grad.norm() > 0


def test_losses_with_one_element_are_served_under_no_grad():
    weight = nn.Parameter(torch.ones(3))
    losses = [(2 * weight).sum().reshape(1), (-weight).sum().reshape(1)]
    with torch.no_grad():
        agsurgery.backward(losses, [weight], Sum())
    torch.testing.assert_close(weight.grad, torch.ones(3))


@pytest.mark.parametrize("part", ["trunk.0.weight", "first.weight"])
def test_gradient_hooks_that_would_never_fire_are_refused_before_anything_is_written(
    model, x, part
):
    model.get_parameter(part).register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(RuntimeError, match="post-accumulate-grad hooks"):
        agsurgery.backward(model.losses(x), model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_frozen_after_the_forward_pass_are_left_out(model, x):
    losses = model.losses(x)
    model.trunk.requires_grad_(False)
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.backward(losses)
    assert model.trunk[0].weight.grad is None
    assert model.first.weight.grad is not None


def test_several_processes_are_refused_rather_than_left_to_drift_apart(model, x, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="all processes together"):
        agsurgery.backward(model.losses(x), model.parameters())


def test_hooks_on_a_vector_of_losses_are_honoured():
    weight = nn.Parameter(torch.ones(2))
    losses = torch.stack([weight.sum(), weight.sum()])
    losses.register_hook(lambda gradient: gradient * torch.tensor([1.0, 3.0]))
    agsurgery.backward(losses, [weight], Sum())
    torch.testing.assert_close(weight.grad, torch.full((2,), 4.0))
