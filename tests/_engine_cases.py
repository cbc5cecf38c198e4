"""Models whose losses share parameters in every way, and what each parameter must receive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot
from torch.utils.checkpoint import checkpoint

Losses = list[Tensor]


class Case(nn.Module):
    """A model that makes its own K losses; `features` holds what the last forward pass computed for the heads."""

    features: Tensor | tuple[Tensor, ...] | None = None

    def losses(self) -> Losses:
        """Losses of one fixed batch."""
        raise NotImplementedError

    def data(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        dtype = next(self.parameters()).dtype
        dtype = dtype.to_real() if dtype.is_complex else dtype
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def targets(self, outputs: Sequence[Tensor]) -> Losses:
        return [
            ((i + 1) * (output - 3 * (-1) ** i)).square().mean() for i, output in enumerate(outputs)
        ]


class MLP(Case):
    """A trunk under four heads."""

    rows, width = 5, 9

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(4, self.width), nn.Tanh(), nn.Linear(self.width, 6), nn.Tanh()
        )
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(4))
        self.idle = nn.Linear(2, 2)

    def losses(self) -> Losses:
        self.features = self.trunk(self.data(self.rows, 4))
        return self.targets([head(self.features) for head in self.heads])


class WideMLP(MLP):
    """Many rows, narrow layers: gradients are cheaper than pairs of rows."""

    rows, width = 40, 3


class NoBias(Case):
    """Matrix products without bias, and a layer whose input needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5, bias=False), nn.Linear(5, 4, bias=False)

    def losses(self) -> Losses:
        out = self.second(torch.relu(self.first(self.data(6, 3))))
        return [out[:, 0].square().sum(), -out[:, 1].sum(), (out.sum() - 2).square()]


class Twice(Case):
    """One layer used twice, and a weight used once more by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)

    def losses(self) -> Losses:
        hidden = torch.tanh(self.layer(torch.tanh(self.layer(self.data(6, 4)))))
        out = self.other(hidden) @ self.other.weight
        return [out[:, 0].square().mean(), -3 * out[:, 1].mean(), (out[:, 2] - 2).square().mean()]


class Scales(Case):
    """Losses that take features of several depths, and a parameter of the trunk besides."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def losses(self) -> Losses:
        depths = [self.data(5, 4)]
        for layer in self.layers:
            depths.append(torch.tanh(layer(depths[-1])))
        self.features = tuple(depths[1:])
        first, second, third = (head(d) for head, d in zip(self.heads, depths[1:], strict=True))
        decay = self.layers[0].weight.square().sum()
        return [
            *self.targets([first * second, second + third]),
            (first - third).square().mean() + 0.1 * decay,
        ]


class Tied(Case):
    """An embedding tied to the heads, which reach it past the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5, padding_idx=2)
        self.trunk = nn.Linear(5, 5)

    def losses(self) -> Losses:
        words = torch.tensor([[1, 3, 3, 2], [5, 1, 0, 9]])
        hidden = torch.tanh(self.trunk(self.table(words)))
        logits = hidden @ self.table.weight.T
        return [logits.logsumexp(-1).mean(), -logits[..., 4].mean(), hidden.square().sum()]


class Words(Case):
    """An embedding with repeated and padded words, fewer of them than the table holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 5, padding_idx=2)
        self.trunk = nn.Linear(5, 5)

    def losses(self) -> Losses:
        words = torch.tensor([[1, 3, 3, 2], [5, 1, 0, 2]])
        hidden = torch.tanh(self.trunk(self.table(words)))
        return self.targets([hidden[..., 0], hidden[..., 1], hidden.sum(-1)])


class Conv(Case):
    """Convolutions in channels_last, batch norm, pooling."""

    norm: Callable[[], nn.Module] = staticmethod(lambda: nn.BatchNorm2d(4))

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2),
            self.norm(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        ).to(memory_format=torch.channels_last)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def losses(self) -> Losses:
        image = self.data(4, 3, 8, 8).to(memory_format=torch.channels_last)
        self.features = self.trunk(image)
        return self.targets([head(self.features) for head in self.heads])


class GroupNorm(Conv):
    """Group norm in channels_last, whose backward pass torch cannot do for a batch."""

    norm = staticmethod(lambda: nn.GroupNorm(2, 4))


class Block(nn.Module):
    """A transformer layer by hand, with an MLP that may be checkpointed."""

    def __init__(self, width: int, checkpointed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width))
        self.down = nn.Linear(2 * width, width)
        self.checkpointed = checkpointed

    def _feed(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.mlp(x)))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + (
            checkpoint(self._feed, x, use_reentrant=False) if self.checkpointed else self._feed(x)
        )


class Transformer(Case):
    """Two layers with learned positions, and heads on one token each."""

    checkpointed = False

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(3, 4))
        self.blocks = nn.Sequential(*(Block(4, self.checkpointed) for _ in range(2)))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def losses(self) -> Losses:
        self.features = self.blocks(self.data(2, 3, 4) + self.positions)
        return self.targets([head(self.features[:, i]) for i, head in enumerate(self.heads)])


class Checkpointed(Transformer):
    """The same with non-reentrant checkpoints."""

    checkpointed = True


class Disjoint(Case):
    """One model, a forward pass of its own for each loss: nothing but leaves is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def losses(self) -> Losses:
        return self.targets([self.trunk(self.data(5, 4, seed=i)) for i in range(3)])


class Chained(Case):
    """The second loss contains the first; the third has nothing to do with them but one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(4)) for _ in range(3))

    def losses(self) -> Losses:
        first = (self.a * self.b).square().sum()
        return [first, first * self.c.sum() - self.a.sum(), (self.b - 2).square().sum()]


class Complex(Case):
    """A complex parameter beside real ones of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.randn(4, 5, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.randn(5, dtype=torch.float32))
        self.shift = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def losses(self) -> Losses:
        out = (self.data(3, 4).to(torch.complex128) @ self.wave).abs() * self.scale + self.shift
        return self.targets([out[:, 0], out[:, 1], out[:, 2:]])

    def double(self) -> Complex:
        return self


class Lookup(Case):
    """Gathered rows, a matrix used transposed, an einsum, a sum with a broadcast bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def losses(self) -> Losses:
        rows = self.table[torch.tensor([0, 2, 2, 5])]
        out = torch.einsum("bi,ij->bj", rows, self.mix) + self.bias
        out = torch.tanh(out) @ self.mix
        return self.targets([out[:, 0], (out * one_hot(torch.arange(4))).sum(1), out.sum(1)])


class NamedShared(MLP):
    """The user says that only the last layer of the trunk is shared."""

    def shared(self) -> list[nn.Parameter]:
        return list(self.trunk[2].parameters())


CASES: list[type[Case]] = [
    MLP,
    WideMLP,
    NoBias,
    Twice,
    Scales,
    Tied,
    Words,
    Conv,
    Transformer,
    Checkpointed,
    Disjoint,
    Chained,
    Complex,
    Lookup,
    NamedShared,
]


def make(case: type[Case]) -> Case:
    """A model in float64, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return case().double()


def task_gradients(model: Case, make_losses: Callable[[Case], Losses]) -> list[list[Tensor | None]]:
    """For each loss its gradient with respect to each parameter, by a separate forward and backward pass."""
    found = []
    for task in range(len(make_losses(copy_of(model)))):
        twin = copy_of(model)
        make_losses(twin)[task].backward()
        found.append([None if p.grad is None else p.grad.to_dense() for p in twin.parameters()])
    return found


def copy_of(model: Case) -> Case:
    """A copy that holds no graph."""
    model.features = None
    return copy.deepcopy(model)


def inner(left: list[Tensor | None], right: list[Tensor | None]) -> Tensor:
    """Real inner product in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(left, right, strict=True):
        if a is not None and b is not None:
            product = (a * b.conj()).real if a.is_complex() else a.double() * b.double()
            total = total + product.sum()
    return total


def reference(
    model: Case,
    method: Callable[[Tensor], Tensor],
    *,
    heads: str = "own",
    make_losses: Callable[[Case], Losses] = lambda model: model.losses(),
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Gramian, weights, and what every parameter must receive, from explicit gradients."""
    gradients = task_gradients(model, make_losses)
    named = {id(p) for p in model.shared()} if isinstance(model, NamedShared) else None
    shared = []
    for i, parameter in enumerate(model.parameters()):
        reached = sum(row[i] is not None for row in gradients)
        shared.append(id(parameter) in named if named is not None else reached > 1)
    rows = [[g if s else None for g, s in zip(row, shared, strict=True)] for row in gradients]
    gramian = torch.stack([torch.stack([inner(a, b) for b in rows]) for a in rows])
    weights = method(gramian)
    expected: list[Tensor | None] = []
    for i, is_shared in enumerate(shared):
        factors = weights if is_shared or heads == "weighted" else torch.ones_like(weights)
        parts = [
            f.item() * row[i]
            for f, row in zip(factors, gradients, strict=True)
            if row[i] is not None
        ]
        expected.append(sum(parts[1:], parts[0]) if parts else None)
    return gramian, weights, expected


def check(model: Case, expected: Sequence[Tensor | None], **tolerance: float) -> None:
    """Assert that every `.grad` is what it must be."""
    for (name, parameter), wanted in zip(model.named_parameters(), expected, strict=True):
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            assert parameter.grad.dtype == parameter.dtype
            got = parameter.grad.to_dense()
            torch.testing.assert_close(
                got, wanted.to(got.dtype), msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )
