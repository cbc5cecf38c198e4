"""A bag classifier that attends through prototypes: PAMIL, with what is wrong in its published code put right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["PrototypeAttention", "Terms", "first_prototypes"]

MOST_CELLS = 20_000
"""Cells on which k-means is run, at most; a random choice of so many does not move its centres."""


@dataclass(frozen=True)
class Terms:
    """Weights of the terms that are added to the loss of the bag; 0 leaves one out."""

    clustering: float = 0.005
    """Every cell close to one prototype, and every prototype close to one cell. Published: 0.005."""
    prototype: float = 0.0
    """Divergence of the prototype branch from the bag branch; above 0 the branch takes part in the bag's logit.
    Published: 0.1 with --proto_pred, which its default command leaves out."""
    instance: float = 0.0
    """Cells of highest and lowest attention against each other. Published: 0.5 with --inst_pred, left out likewise."""
    instances: int = 8
    """Cells at either end for that term; at most half the bag."""


@dataclass(frozen=True)
class _Pass:
    """What a bag of n cells leads to on its way through the network; p prototypes, h hidden units."""

    cells: Tensor
    """(n, h) unit rows."""
    affinity: Tensor
    """(n, p) of cells to prototypes."""
    attention: Tensor
    """(2, n), each row sums to one: where the evidence for either class is looked for."""
    bag: Tensor
    """(2,) logits of the bag branch."""
    prototype: Tensor | None
    """(2,) logits of the prototype branch, where there is one."""


class PrototypeAttention(nn.Module):
    r"""Bag logit by attention to prototypes.

    With standardised features x_i, prototypes p_k in the same space, f a linear layer and a ReLU, rows of unit length

    .. math::
        h_i = f(x_i) / |f(x_i)|, \quad q_k = f(p_k) / |f(p_k)|, \quad
        A_{ik} = \sigma(W h_i) \cdot \tanh(V q_k)

    each of the two classes c attends with weights of its own,
    :math:`a_c = \mathrm{softmax}_i(A w_c)`, and has a logit :math:`l_c = g_c \cdot m_c / |m_c| + b_c` from
    :math:`m_c = \sum_i a_{ci} h_i`. The logit of the bag is :math:`l_1 - l_0`, so that cross entropy of two classes
    and the binary one agree. The attention that ranks cells is a_1. Which way high attention points is fixed by nothing
    but the data: see `mil.py`; the score of single cells, the logit of a bag of this cell, is oriented.

    With the prototype branch, the prototypes weighted by :math:`\mathrm{softmax}_k \max_i A_{ik}` give logits of their
    own, and the bag has the mean of both.

    Note:
        Differences from the published code: prototypes start from k-means centres of training cells, not from
        normal noise of another scale than the features; the scores of the prototype branch are not divided by their
        maximum, which turns their order round when all are negative; the instance term takes the cells that the row of
        its own class attends to, not the last row for both classes; dropout is not tied to a flag.

    References:
        Liu et al., Pathology-knowledge prototype attention MIL (PAMIL), MICCAI 2024, as SLAM-AGS uses it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        prototypes: Tensor,
        hidden: int = 128,
        dropout: float = 0.25,
        terms: Terms | None = None,
    ) -> None:
        """Make an untrained network.

        Args:
            mean: Mean of the train features, (d,).
            std: Their standard deviation, (d,); entries of zero count as one.
            prototypes: First prototypes in standardised features, (p, d).
            hidden: Width of f.
            dropout: Dropout rate on f.
            terms: Terms of the loss. None: as published.
        """
        super().__init__()
        self.terms = terms or Terms()
        self.register_buffer("mean", mean)
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))
        self.prototypes = nn.Parameter(prototypes.clone())
        self.embed = nn.Sequential(nn.Linear(len(mean), hidden), nn.ReLU(), nn.Dropout(dropout))
        self.of_cell = nn.Linear(hidden, hidden // 2)
        self.of_prototype = nn.Linear(hidden, hidden // 2)
        self.attend = nn.Linear(len(prototypes), 2)
        self.classify = nn.ModuleList(weight_norm(nn.Linear(hidden, 1)) for _ in range(2))
        # Made in any case: settings of the loss must not change the first weights of the rest.
        self.by_prototypes = nn.Linear(hidden, 2)
        self.by_cell = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(2))

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names under which they can be frozen."""
        attention = (self.of_cell, self.of_prototype, self.attend)
        classifiers = (self.classify, self.by_prototypes, self.by_cell)
        return {
            "prototypes": [self.prototypes],
            "embed": list(self.embed.parameters()),
            "attention": [p for module in attention for p in module.parameters()],
            "classifier": [p for module in classifiers for p in module.parameters()],
        }

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logit of the bag (), attention (n,) that sums to one, logit of each cell alone (n,)."""
        found, prototypes = self._pass(features)
        # In a bag of one cell the attention is 1, and the maximum over cells is that cell's.
        alone = torch.cat([head(found.cells) for head in self.classify], dim=1)
        if found.prototype is not None:
            alone = (alone + self.by_prototypes(found.affinity.softmax(1) @ prototypes)) / 2
        return _difference(self._logits(found)), found.attention[1], _difference(alone)

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        r"""Loss of one bag, its label 0 or 1 as a float tensor ().

        Cross entropy, plus `clustering` times :math:`(1 - \mathrm{mean}_i \max_k s_{ik}) + (1 - \mathrm{mean}_k \max_i
        s_{ik})` with :math:`s = \mathrm{softmax}_k A`, plus `prototype` times KL(prototype branch || bag branch), plus
        `instance` times the cross entropy of the cells that the row of the bag's own class attends to most (label 1)
        and least (label 0).
        """
        found, _ = self._pass(features)
        total = F.binary_cross_entropy_with_logits(_difference(self._logits(found)), target)
        terms = self.terms
        if terms.clustering:
            share = found.affinity.softmax(1)
            near = (1 - share.amax(1).mean()) + (1 - share.amax(0).mean())
            total = total + terms.clustering * near
        if found.prototype is not None:
            # `kl_div(log q, log p)` is KL(p || q).
            bag, prototype = found.bag.log_softmax(0), found.prototype.log_softmax(0)
            total = total + terms.prototype * F.kl_div(
                bag, prototype, log_target=True, reduction="sum"
            )
        if terms.instance:
            total = total + terms.instance * self._instance_loss(found, int(target))
        return total

    def _instance_loss(self, found: _Pass, label: int) -> Tensor:
        count = min(self.terms.instances, len(found.cells) // 2)
        if not count:  # a bag of one cell has no two ends
            return found.cells.new_zeros(())
        order = found.attention[label].detach().argsort(descending=True)
        chosen = torch.cat((order[:count], order[-count:]))
        truth = torch.tensor([1] * count + [0] * count, device=chosen.device)
        return F.cross_entropy(self.by_cell[label](found.cells[chosen]), truth)

    def _pass(self, features: Tensor) -> tuple[_Pass, Tensor]:
        """The way of a bag, and the embedded prototypes (p, h)."""
        cells = F.normalize(self.embed((features - self.mean) / self.std), dim=1)
        prototypes = F.normalize(self.embed(self.prototypes), dim=1)
        affinity = torch.sigmoid(self.of_cell(cells)) @ torch.tanh(self.of_prototype(prototypes)).T
        attention = self.attend(affinity).softmax(0).T
        pooled = F.normalize(attention @ cells, dim=1)
        bag = torch.cat([head(pooled[c]) for c, head in enumerate(self.classify)])
        branch = None
        if self.terms.prototype:
            branch = self.by_prototypes(affinity.amax(0).softmax(0) @ prototypes)
        return _Pass(cells, affinity, attention, bag, branch), prototypes

    def _logits(self, found: _Pass) -> Tensor:
        return found.bag if found.prototype is None else (found.bag + found.prototype) / 2


def _difference(logits: Tensor) -> Tensor:
    """Logit of class 1 against class 0 from the last dimension."""
    return logits[..., 1] - logits[..., 0]


def first_prototypes(cells: NDArray[np.float64], count: int, seed: int) -> Tensor:
    """Centres of k-means on standardised train cells (n, d), float32 (count, d)."""
    generator = np.random.default_rng(seed)
    if len(cells) > MOST_CELLS:
        cells = cells[generator.choice(len(cells), MOST_CELLS, replace=False)]
    different = np.unique(cells, axis=0)
    if len(different) <= count:  # as after a collapse: nothing to cluster
        centres = different[np.arange(count) % len(different)]
    else:
        centres = KMeans(count, n_init=4, random_state=seed).fit(cells).cluster_centers_
    return torch.from_numpy(centres).float()
