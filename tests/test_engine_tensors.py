"""Sparse gradients, and the whole step on a device that must not be waited for."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import agsurgery
from agsurgery import AGS, GradDrop, GradientSurgery
from agsurgery.jacobian import Rows
from agsurgery.methods import resolve, solve
from tests._engine_cases import inner
from tests.test_engines import method

# -- sparse gradients -------------------------------------------------------------------------------


class Words(nn.Module):
    """A lookup with sparse gradients under a dense layer; the losses see different words."""

    def __init__(self, sparse: bool, tied: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(12, 4, generator=generator, dtype=torch.float64)
        self.table = nn.Embedding(12, 4, sparse=sparse, _weight=draw)
        self.layer = nn.Linear(4, 4).double()
        with torch.no_grad():
            self.layer.weight.copy_(torch.linspace(-1, 1, 16).view(4, 4))
            self.layer.bias.zero_()
        self.tied = tied

    def losses(self) -> list[torch.Tensor]:
        batches = torch.tensor([[0, 3, 3], [3, 5, 0], [7, 5, 7]])
        hidden = [torch.tanh(self.layer(self.table(words))) for words in batches]
        losses = [h.square().sum() - (i * h).sum() for i, h in enumerate(hidden)]
        if self.tied:  # one loss gives the table a dense gradient
            losses[1] = losses[1] + (hidden[1] @ self.table.weight.T).logsumexp(-1).sum()
        return losses


def dense(model: Words) -> list[torch.Tensor]:
    return [p.grad.to_dense() for p in model.parameters()]


@pytest.mark.parametrize("granularity", ["global", "parameter"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("engine", ["grad", "accumulate", "reweight"])
def test_sparse_gradients_are_combined_like_dense_ones(engine, tied, granularity):
    if engine == "reweight":
        granularity = "global"
    twin, model = Words(sparse=False, tied=tied), Words(sparse=True, tied=tied)
    options = {"engine": engine, "granularity": granularity}
    expected = agsurgery.backward(twin.losses(), twin.parameters(), method, **options)
    for times in (1, 2):
        report = agsurgery.backward(model.losses(), model.parameters(), method, **options)
        torch.testing.assert_close(report.gramian, expected.gramian)
        for got, parameter in zip(dense(model), twin.parameters(), strict=True):
            torch.testing.assert_close(got, times * parameter.grad)
    assert (model.table.weight.grad.layout == torch.sparse_coo) == (not tied)


def test_the_gramian_of_sparse_gradients_is_that_of_explicit_ones():
    model = Words(sparse=True)
    rows = []
    for i in range(3):
        model.zero_grad()
        model.losses()[i].backward()
        rows.append(dense(model))
    expected = torch.stack([torch.stack([inner(a, b) for b in rows]) for a in rows])
    model.zero_grad()
    report = agsurgery.backward(model.losses(), model.parameters(), method)
    torch.testing.assert_close(report.gramian, expected)


def test_only_touched_rows_of_a_sparse_gradient_are_stored():
    table = nn.Embedding(1000, 2, sparse=True)
    losses = [table(torch.tensor([1, 2])).sum(), table(torch.tensor([2, 3])).square().sum()]
    agsurgery.backward(losses, table.parameters(), method)
    assert table.weight.grad._nnz() == 3


@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_a_sparse_gradient_of_a_single_loss_goes_by(heads):
    shared, table = nn.Parameter(torch.ones(2)), nn.Embedding(9, 2, sparse=True)
    first = (table(torch.tensor([1, 1, 4])) * shared).sum()
    agsurgery.backward(
        [first, (shared * 2).sum()],
        [shared, table.weight],
        lambda gramian: torch.tensor([2.0, 1.0], dtype=torch.float64),
        heads=heads,
    )
    factor = 2.0 if heads == "weighted" else 1.0
    expected = torch.zeros(9, 2)
    expected[1], expected[4] = 2 * factor, factor
    torch.testing.assert_close(table.weight.grad.to_dense(), expected)


def test_a_gradient_that_turns_sparse_in_the_second_task_moves_the_first(monkeypatch):
    """The first loss gives a dense gradient: rows are laid out for it before anybody knows."""
    monkeypatch.setattr("agsurgery.jacobian.LARGE", 1)
    results = []
    for sparse in (False, True):
        model = Words(sparse=sparse)
        hidden = model.table(torch.tensor([3, 5]))
        losses = [model.table.weight.square().sum() + model.layer.weight.sum()]
        losses.append(torch.tanh(model.layer(hidden)).sum())
        report = agsurgery.backward(losses, model.parameters(), method)
        results.append((report.gramian, *dense(model)[:2]))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_sparse_adam_trains_with_surgery():
    table = nn.Embedding(20, 3, sparse=True)
    optimizer = GradientSurgery(torch.optim.SparseAdam(table.parameters(), lr=0.1), AGS())
    before = table.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        words = table(torch.tensor([2, 4]))
        optimizer.backward([words.square().sum(), (words - 1).square().sum()])
        optimizer.step()
    moved = (table.weight != before).any(1)
    assert moved.nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_method_of_coordinates_takes_sparse_rows(sparse):
    model = Words(sparse=sparse)
    agsurgery.backward(model.losses(), model.parameters(), GradDrop(seed=1))
    touched = model.table.weight.grad.to_dense().abs().sum(1).nonzero().flatten()
    assert set(touched.tolist()) <= {0, 3, 5, 7}
    assert model.layer.weight.grad.abs().sum() > 0


# -- no waiting -------------------------------------------------------------------------------------


def build(kind: str) -> tuple[nn.Module, nn.ModuleList]:
    if kind == "mlp":
        trunk: nn.Module = nn.Sequential(nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 300))
        width = 300
    else:
        trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        width = 8 * 36
    return trunk, nn.ModuleList(nn.Linear(width, 2) for _ in range(3))


OPTIONS = [
    {},
    {"engine": "lean"},
    {"engine": "accumulate"},
    {"engine": "reweight"},
    {"every": 2},
    {"granularity": "parameter"},
    {"heads": "weighted"},
    {"buffer_dtype": torch.bfloat16},
]


CHOSEN = ["ags", "gradvac", "graddrop", "uw"]  # every method by itself: test_methods_laws.py


def steps(kind: str, chosen: str, options: dict) -> None:
    trunk, heads = build(kind)
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer = GradientSurgery(torch.optim.SGD(parameters, lr=0.1), chosen, **options)
    for _ in range(3):
        optimizer.zero_grad()
        hidden = trunk(torch.randn(4, 8) if kind == "mlp" else torch.randn(4, 3, 8, 8))
        optimizer.backward([head(hidden).square().mean() for head in heads])
        assert all(p.grad is not None for p in parameters)
        optimizer.step()


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_no_step_reads_a_value(kind, options, chosen):
    """Fake tensors have no values: whoever reads one gets an error."""
    if chosen in ("graddrop", "uw") and options not in ({}, {"engine": "accumulate"}):
        pytest.skip("refused, or the same as without the option")
    with FakeTensorMode():
        steps(kind, chosen, options)


@pytest.mark.parametrize("chosen", ["ags", "upgrad", "gradvac"])
def test_every_tensor_on_the_way_from_rows_to_gradients_is_on_the_device(chosen):
    """On a fake GPU a tensor left on the CPU is an error. Autograd, and changes of views, need a real one."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        parameters = [torch.empty(300, 300), torch.empty(7)]
        parameters.append(torch.empty(4, 3, 5, 5).to(memory_format=torch.channels_last))
        rows, rule = Rows(), resolve(chosen)
        for _ in range(2):
            rows.lay_out(parameters, 3, None)
            for task in range(3):
                rows.write(task, parameters, [torch.randn_like(p) for p in parameters])
            gramian = rows.gramian(3, parameters[0].device)
            rows.deliver(solve(rule, gramian).weights)
            for parameter in parameters:
                assert parameter.grad.device.type == "cuda"
                parameter.grad = None


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_no_step_through_features_reads_a_value(level):
    with FakeTensorMode():
        trunk, heads = build("mlp")
        parameters = [*trunk.parameters(), *heads.parameters()]
        optimizer = GradientSurgery(torch.optim.SGD(parameters, lr=0.1), "ags")
        for _ in range(2):
            hidden = trunk(torch.randn(4, 8))
            losses = [head(hidden).square().mean() for head in heads]
            optimizer.backward(losses, features=hidden, level=level)
        assert all(p.grad is not None for p in parameters)


def test_a_value_that_is_read_is_noticed():
    def reads(gramian):
        return gramian.diagonal() if gramian.sum() > 0 else gramian.sum(1)

    with FakeTensorMode():
        weight = nn.Parameter(torch.ones(3))
        with pytest.raises(DataDependentOutputException):
            agsurgery.backward([weight.sum(), weight.square().sum()], [weight], reads)


# -- compiled surgery -------------------------------------------------------------------------------


def test_a_compiled_method_gives_the_same_update():
    compiled = torch.compile(AGS(), backend="aot_eager", fullgraph=True)
    updates = []
    for chosen in (AGS(), compiled):
        weight = nn.Parameter(torch.linspace(-1, 2, 7, dtype=torch.float64))
        losses = [weight.square().sum(), -3 * weight.sum(), (weight - 1).pow(4).sum()]
        agsurgery.backward(losses[:2], [weight], chosen)
        updates.append(weight.grad)
    torch.testing.assert_close(*updates)
