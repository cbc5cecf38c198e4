"""GradVac: raise the cosine of each pair of task gradients to what it usually is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agsurgery.methods._base import Problem, Reduction, Solution, known
from agsurgery.methods._cosine import NOISE, Cosines
from agsurgery.methods._random import RandomlyOrdered
from agsurgery.methods._state import TaskState

_LIMIT = (1 - NOISE) ** 0.5  # of a target's size: beyond, cosines differ by rounding only


def vaccinate(split: Cosines, targets: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weights of the summed GradVac update, and the cosines that were met on the way.

    As in `pcgrad_weights`, all tasks advance together, and row i of `change` holds what has been added to
    :math:`g_i`, in units of :math:`|g_i|` on unit vectors. In the same units the current :math:`g_i'` has the length
    `length` and, along :math:`g_j`, the component `along`; `across` is what is left beside it and stays as it is.

    Args:
        split: norms and cosines of the Gramian.
        targets: `(..., K, K)`, the cosine to which :math:`g_i'` is raised against :math:`g_j`.
        orders: `(K, K - 1)` indices, row i an order of the tasks other than i.

    Returns:
        `(..., K)` weights, and `(..., K, K)` cosines, equal to `targets` where there was none to measure.
    """
    present = split.present.unsqueeze(-1) * split.present.unsqueeze(-2) > 0
    change, met = torch.zeros_like(split.matrix), targets.clone()
    length = torch.ones_like(split.norms).unsqueeze(-1)
    for against in orders.unbind(1):
        place = against.unsqueeze(1).expand(*split.norms.shape, 1)
        columns = split.matrix.index_select(-2, against)
        along = split.matrix.gather(-1, place) + (change * columns).sum(-1, keepdim=True)
        across = ((length - along) * (length + along)).clamp(min=0).sqrt()
        parts = 1 + change.abs().sum(-1, keepdim=True)
        noise = NOISE**0.5 * parts
        there, old = present.gather(-1, place), targets.gather(-1, place)
        # The raise is in proportion to what is across g_j. Where that is rounding noise, it would be blown up:
        # only what points against g_j is taken away, as in PCGrad.
        target = torch.where(there & (across > noise), old.clamp(-_LIMIT, _LIMIT), 0.0)
        raised = there & (along < target * length)
        sine = (1 - target.square()).sqrt()
        added = torch.where(raised, target / sine * across - along, 0.0)
        met.scatter_(
            -1, place, torch.where(there & (length > noise), (along / length).clamp(-1, 1), old)
        )
        change.scatter_add_(-1, place, added)
        length = torch.where(raised, across / sine, length)
    weights = 1 + (split.norms.unsqueeze(-1) * change).sum(-2) * split.reciprocals
    return weights, met


class GradVac(RandomlyOrdered):
    r"""Gradient vaccine: PCGrad with a target cosine for each pair of tasks, learned on the way.

    For each task i, :math:`g_i' = g_i`; then for each other j in random order, with
    :math:`\phi = \cos(g_i', g_j)` and the target :math:`\hat\phi_{ij}`, if :math:`\phi < \hat\phi_{ij}`,

    .. math:: g_i' \leftarrow g_i' + \frac{|g_i'|}{|g_j|}\,
        \frac{\hat\phi_{ij}\sqrt{1 - \phi^2} - \phi\sqrt{1 - \hat\phi_{ij}^2}}{\sqrt{1 - \hat\phi_{ij}^2}}\; g_j,

    which makes the cosine :math:`\hat\phi_{ij}`; and in either case, conflict or not,
    :math:`\hat\phi_{ij} \leftarrow (1 - \beta)\,\hat\phi_{ij} + \beta\,\phi`. The update is :math:`\sum_i g_i'`.
    Targets start from 0, where the method is PCGrad, and are kept by task name, for each block of parameters by itself.

    Guarantees: with `beta=0`, and in the first step, those of PCGrad and its weights to the last bit. Later none:
    a negative target lets the update of two tasks oppose one of them, and a positive one changes
    gradients that do not conflict. The more :math:`\phi` falls below a target near 1, the longer the update.

    A task without a gradient changes nothing for the others of that step but the random orders, and
    its targets stay as they are. Where two gradients are opposite and cancel, the noise that is left has no
    cosine: it changes no target.

    Args:
        beta: weight of the newest cosine in the targets, between 0 and 1.
        seed: of the random orders (three tasks and more). Equal seeds give equal orders on every rank.
        reduction: `"mean"` divides by K; the paper sums.

    Raises:
        ValueError: `beta` is outside [0, 1].

    Note:
        Targets are used up to :math:`\sqrt{1 - 10^{-6}}` in size: for equal gradients the formula would otherwise
        divide the rounding of one step by that of another. The constant `beta` is reported to be 0.01 in the paper's
        experiments (not checked against the text); LibMTL and TorchJD have 0.5. Cosines of a
        step with a gradient that is not finite do not enter the targets.

    Example:
        >>> import torch
        >>> method = GradVac(beta=0.5)
        >>> cosine = lambda c: torch.tensor([[1.0, c], [c, 1.0]], dtype=torch.float64)
        >>> method(cosine(0.96))  # targets 0, then 0.48
        tensor([1., 1.], dtype=torch.float64)
        >>> method(cosine(0.72))  # targets 0.48, then 0.6
        tensor([1., 1.], dtype=torch.float64)
        >>> method(cosine(0.0))  # raised to 0.6: 1 + 0.6 / 0.8
        tensor([1.7500, 1.7500], dtype=torch.float64)

    References:
        Wang et al., [Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
        Models](https://arxiv.org/abs/2010.05874), 2021, Algorithm 1.
    """

    def __init__(self, beta: float = 1e-2, *, seed: int = 0, reduction: Reduction = "sum") -> None:
        super().__init__(seed=seed, reduction=reduction)
        if not 0 <= beta <= 1:
            raise ValueError(f"`beta` must be between 0 and 1. Got {beta}.")
        self.beta = beta
        self._targets = TaskState(target=(2, 0.0))

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        like = split.norms
        if like.shape[-1] == 1:
            return Solution(torch.ones_like(like), torch.ones_like(like.squeeze(-1)))
        orders = self._orders(problem.gramian)
        if orders is None:  # two tasks: each meets the other
            orders = torch.arange(1, -1, -1, device=like.device).unsqueeze(1)
        targets = self._targets.read(problem.tasks, like)["target"]
        weights, met = vaccinate(split, targets, orders)
        new = {"target": targets.lerp(met, self.beta)}  # exact where both are equal
        finite = known(self, problem.gramian, problem.losses)
        self._targets.write(problem.tasks, like, new, finite)
        return Solution(weights, torch.ones_like(like.narrow(-1, 0, 1).squeeze(-1)))

    def state(self) -> Mapping[str, Tensor]:
        """Those of the random orders, and `target` `(..., K, K)` with the names of the `tasks`."""
        return {**super().state(), **self._targets.tensors()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            KeyError: an entry of the random orders is missing.
        """
        targets = TaskState(target=(2, 0.0))
        targets.load(state_dict)
        super().load_state_dict({**state_dict, **self._targets.tensors()})
        self._targets = targets  # none, if the saved method had taken no step
