"""Models with several losses, on which steps are measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.torchvision_import import import_torchvision


class MultiTask(nn.Module):
    """A shared trunk, and one head per task; without heads the trunk is all there is."""

    def __init__(self, trunk: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)

    def reached(self, task: int) -> list[nn.Parameter]:
        """Parameters that the loss of `task` depends on."""
        head = self.heads[task].parameters() if len(self.heads) else ()
        return [*self.trunk.parameters(), *head]


class Outcome(NamedTuple):
    """K scalar losses, and the features all heads read; None if each loss had a forward pass of its own."""

    losses: list[Tensor]
    features: Tensor | None


Forward = Callable[[MultiTask], Outcome]


class Problem(NamedTuple):
    """A model with its initial weights, and the forward pass on fixed data."""

    model: MultiTask
    forward: Forward


@dataclass(frozen=True)
class Case:
    """One row of the table; `build` makes its `Problem` on a device, the same at each call."""

    title: str
    tasks: int
    build: Callable[[torch.device], Problem]


def heads_case(
    trunk: Callable[[], nn.Module],
    shape: tuple[int, ...],
    features: int,
    outputs: int,
    tasks: int,
    device: torch.device,
) -> Problem:
    """K linear heads on the features of one trunk; with one output the loss is binary cross-entropy."""
    torch.manual_seed(0)
    model = MultiTask(trunk(), [nn.Linear(features, outputs) for _ in range(tasks)]).to(device)
    inputs = torch.randn(shape).to(device)
    if outputs == 1:
        targets = torch.rand(tasks, shape[0], 1).round().to(device)
        loss: Callable[..., Tensor] = F.binary_cross_entropy_with_logits
    else:
        targets = torch.randint(outputs, (tasks, shape[0])).to(device)
        loss = F.cross_entropy

    def forward(model: MultiTask) -> Outcome:
        shared = model.trunk(inputs)
        pairs = zip(model.heads, targets, strict=True)
        return Outcome([loss(head(shared), target) for head, target in pairs], shared)

    return Problem(model, forward)


def disjoint_resnet(device: torch.device, batch: int = 16, pixels: int = 64) -> Problem:
    """Two losses on ResNet-18, each on a batch of its own: classes of one, likeness within the other."""
    resnet18 = import_torchvision().models.resnet18
    torch.manual_seed(0)
    model = MultiTask(resnet18(num_classes=128), []).to(device)
    first, second = torch.randn(2, batch, 3, pixels, pixels).to(device)
    classes = torch.randint(128, (batch,)).to(device)

    def forward(model: MultiTask) -> Outcome:
        contrast = F.cross_entropy(model.trunk(first), classes)
        unit = F.normalize(model.trunk(second))
        return Outcome([contrast, 1 - (unit @ unit.T).mean()], None)

    return Problem(model, forward)


def mlp(inputs: int, width: int, layers: int) -> nn.Module:
    """Linear layers, each followed by a ReLU."""
    sizes = [inputs] + [width] * layers
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())))


def convolutions() -> nn.Module:
    """Four convolutions with batch norm, 3 to 128 channels, averaged over the picture."""
    channels = (3, 32, 64, 128, 128)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in itertools.pairwise(channels)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Encoder(nn.Module):
    """A transformer over tokens, averaged over them; written out, since torch's own layer hides its parts."""

    def __init__(self, words: int, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(EncoderBlock(width) for _ in range(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, T)` tokens to `(B, width)`."""
        mean: Tensor = self.blocks(self.table(tokens)).mean(1)
        return mean


class EncoderBlock(nn.Module):
    """Attention and a network of two layers, normalised before."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, width)` to the same."""
        batch, tokens, width = x.shape
        mixed = self.attend(self.norms[0](x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = mixed.permute(2, 0, 3, 1, 4).unbind()
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.project(found.reshape(batch, tokens, width))
        wide: Tensor = self.narrow(F.gelu(self.widen(self.norms[1](x))))
        return x + wide


def transformer(
    tasks: int, device: torch.device, layers: int = 4, batch: int = 8, tokens: int = 32
) -> Problem:
    """K classifiers on the mean token of a transformer of width 256."""
    torch.manual_seed(0)
    words, width = 1000, 256
    heads = [nn.Linear(width, 10) for _ in range(tasks)]
    model = MultiTask(Encoder(words, width, layers), heads).to(device)
    inputs = torch.randint(words, (batch, tokens)).to(device)
    targets = torch.randint(10, (tasks, batch)).to(device)

    def forward(model: MultiTask) -> Outcome:
        shared = model.trunk(inputs)
        pairs = zip(model.heads, targets, strict=True)
        return Outcome([F.cross_entropy(head(shared), target) for head, target in pairs], shared)

    return Problem(model, forward)


def _transformer(tasks: int) -> Case:
    title = f"transformer (4 layers, width 256), batch 8 x 32 tokens, {tasks} heads"
    return Case(title, tasks, partial(transformer, tasks))


def _wide(tasks: int) -> Case:
    build = partial(heads_case, partial(mlp, 1024, 1024, 4), (64, 1024), 1024, 10, tasks)
    return Case(f"4 x 1024 MLP, batch 64, {tasks} heads", tasks, build)


def _toy(tasks: int) -> Case:
    build = partial(heads_case, partial(mlp, 20, 64, 2), (32, 20), 64, 1, tasks)
    return Case(f"toy MLP (20-64-64), batch 32, {tasks} heads", tasks, build)


CASES: dict[str, Case] = {
    "resnet18": Case("ResNet-18, 64 px, two batches of 16, 2 disjoint losses", 2, disjoint_resnet),
    "mlp_2": _wide(2),
    "mlp_8": _wide(8),
    "conv_40": Case(
        "4 convolutions, 64 px, batch 32, 40 heads",
        40,
        partial(heads_case, convolutions, (32, 3, 64, 64), 128, 1, 40),
    ),
    "transformer_4": _transformer(4),
    "toy_2": _toy(2),
    "toy_8": _toy(8),
}
