"""`SurgeryReport`: every number against explicit gradients, and what it says where there is none."""

import math

import pytest
import torch
from torch import Tensor, nn

import agsurgery
from agsurgery import GradDrop, GradientSurgery, PCGrad, SurgeryReport
from tests.samplers import imbalanced, opposite, random, zero_row


def report_of(rows: Tensor, weights: list[float] | None = None) -> SurgeryReport:
    """A report on explicit gradients."""
    tasks = tuple(f"t{i}" for i in range(len(rows)))
    chosen = torch.ones(len(rows)) if weights is None else torch.tensor(weights)
    one = torch.ones((), dtype=rows.dtype)
    return SurgeryReport(tasks, torch.arange(len(rows)) + 1.0, rows @ rows.T, chosen.to(rows), one)


@pytest.mark.parametrize("rows", [random(2), random(4, 3), imbalanced(3, 1e6), opposite(2)])
def test_numbers_are_those_of_the_gradients(rows):
    weights = [(-1.0) ** i * (i + 0.5) for i in range(len(rows))]
    report = report_of(rows, weights)
    update = torch.tensor(weights, dtype=rows.dtype) @ rows
    torch.testing.assert_close(report.norms, rows.norm(dim=1))
    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            cosine = torch.cosine_similarity(row, other, dim=0)
            torch.testing.assert_close(report.cosines[i, j], cosine)
            assert report.conflicts[i, j] == (row @ other < 0)
    torch.testing.assert_close(report.update_norm, update.norm())
    torch.testing.assert_close(report.sum_norm, rows.sum(0).norm())
    torch.testing.assert_close(report.descent, rows @ update, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(report.sum_descent, rows @ rows.sum(0), rtol=1e-9, atol=1e-12)
    assert report.known.item()


def test_first_order_change_is_the_derivative_of_a_step_of_sgd():
    torch.manual_seed(1)
    start = torch.randn(6, dtype=torch.float64)
    curvatures = [torch.randn(6, 6, dtype=torch.float64) for _ in range(3)]

    def losses(x: Tensor) -> list[Tensor]:
        return [(a @ x - 1).square().mean() for a in curvatures]

    lr = 1e-6
    x = nn.Parameter(start.clone())
    optimizer = GradientSurgery(torch.optim.SGD([x], lr=lr), "config")
    report = optimizer.backward(losses(x))
    optimizer.step()
    change = torch.stack(losses(x)).detach() - torch.stack(losses(start))
    torch.testing.assert_close(report.first_order_change(lr), change, rtol=1e-4, atol=0)
    assert torch.equal(report.first_order_change(torch.tensor(0.5)), report.first_order_change(0.5))


def test_blocks_have_their_own_numbers_and_are_summed_for_a_logger():
    torch.manual_seed(2)
    first, second = (nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(2))
    matrices = torch.randn(2, 2, 4, dtype=torch.float64)
    losses = {
        name: (a @ first).square().sum() + (b @ second).sin().sum()
        for name, (a, b) in zip("ab", matrices.unbind(1), strict=True)
    }
    rows = [
        torch.autograd.grad(loss, [first, second], retain_graph=True) for loss in losses.values()
    ]
    report = agsurgery.backward(losses, [first, second], PCGrad(), granularity="parameter")
    assert report.gramian.shape == (2, 2, 2)
    for block, parameter in enumerate((first, second)):
        gradients = torch.stack([row[block] for row in rows])
        torch.testing.assert_close(report.norms[block], gradients.norm(dim=1))
        torch.testing.assert_close(report.descent[block], gradients @ parameter.grad)
        torch.testing.assert_close(report.update_norm[block], parameter.grad.norm())
        rate = torch.tensor([0.5, 2.0])
        expected = -rate[block] * (gradients @ parameter.grad)
        torch.testing.assert_close(report.first_order_change(rate)[block], expected)
    whole = torch.stack([torch.cat(row) for row in rows])
    update = torch.cat([first.grad, second.grad])
    flat = report.to_dict()
    assert flat["update_norm"] == pytest.approx(update.norm().item())
    assert flat["sum_norm"] == pytest.approx(whole.sum(0).norm().item())
    assert flat["conflict"] == float(whole[0] @ whole[1] < 0)
    for i, name in enumerate("ab"):
        assert flat[f"norm/{name}"] == pytest.approx(whole[i].norm().item())
        assert flat[f"descent/{name}"] == pytest.approx((whole[i] @ update).item())
        assert flat[f"sum_descent/{name}"] == pytest.approx((whole[i] @ whole.sum(0)).item())
        assert flat[f"weight/{name}/1"] == pytest.approx(report.weights[1, i].item())
    assert "block 1: weights" in str(report)


def test_a_task_without_gradient_conflicts_with_nobody_and_changes_nothing():
    report = report_of(zero_row(3))
    assert report.norms[2] == 0
    assert report.cosines[2].tolist() == report.cosines[:, 2].tolist() == [0, 0, 0]
    assert not report.conflicts[2].any()
    assert report.first_order_change(1.0)[2] == 0
    assert report.known.item()


def test_all_gradients_zero_is_known_and_no_conflict():
    report = report_of(torch.zeros(2, 3, dtype=torch.float64))
    flat = report.to_dict()
    assert flat["conflict"] == flat["update_norm"] == flat["cosine/t1/t0"] == 0


def test_a_single_task_shares_nothing():
    weight = nn.Parameter(torch.ones(2))
    report = agsurgery.backward([weight.square().sum()], [weight], "ags")
    assert report.norms.tolist() == [0]
    assert not report.conflict.item()
    assert report.to_dict()["sum_descent/0"] == 0
    assert "scale 1" in str(report)


def test_what_nobody_computed_is_not_a_number():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    losses = {"a": weight.sum(), "b": -weight[0]}
    report = agsurgery.backward(losses, [weight], "rlw")
    assert not report.known.item()
    assert not report.conflict.item()
    for name in ("norms", "cosines", "update_norm", "sum_norm", "descent", "sum_descent"):
        assert getattr(report, name).isnan().all(), name
    flat = report.to_dict()
    assert math.isnan(flat["conflict"])
    assert math.isnan(flat["descent/a"])
    assert flat["loss/a"] == 3
    assert 0 < flat["weight/a"] < 2
    assert "nan" in str(report)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad):
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    report = agsurgery.backward({"a": weight.sum(), "b": weight[0] * bad}, [weight], "ags")
    assert not report.known.item()
    assert math.isnan(report.to_dict()["conflict"])
    assert not torch.isfinite(report.update_norm)


def test_a_method_without_weights_knows_what_the_sum_would_do_but_not_its_update():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    losses = {"a": weight.sum(), "b": weight[0] - 4 * weight[1]}
    report = agsurgery.backward(losses, [weight], GradDrop())
    assert report.known.item()
    assert report.conflict.item()
    assert report.sum_descent.tolist() == [-1, 14]
    assert report.descent.isnan().all()
    assert report.update_norm.isnan()


def test_numbers_of_a_report_need_no_answer_from_the_device():
    """Under a fake device, any `.item()` or branch on a tensor raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        gramian = torch.empty(2, 3, 3, dtype=torch.float64, device="cuda")
        weights = torch.empty(2, 3, dtype=torch.float64, device="cuda")
        losses = torch.empty(3, device="cuda")
        report = SurgeryReport(tuple("abc"), losses, gramian, weights, weights.sum(1), ("0", "1"))
        properties = [n for n, v in vars(SurgeryReport).items() if isinstance(v, property)]
        values = [getattr(report, name) for name in properties if not name.startswith("_")]
        values += [report.first_order_change(0.1), report.first_order_change(weights.sum(1))]
        assert {value.device.type for value in values} == {"cuda"}
        assert len(values) >= 10
