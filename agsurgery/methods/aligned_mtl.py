"""AlignedMTL: make the task gradients orthogonal and equally long, and sum them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._preference import PerTask, Preference
from agsurgery.methods._spectral import Spectrum, svd

Scale: TypeAlias = Literal["min", "median", "rmse"]


class AlignedMTL(Method):
    r"""Sum of the aligned gradients: the nearest to the gradients that are orthogonal and equally long.

    .. math:: w = B p, \qquad B = \sqrt\sigma\, V \Lambda^{-1/2} V^\top, \qquad G = V \Lambda V^\top

    with only the nonzero eigenvalues, of which :math:`\sigma` is the least, the median or the mean. The aligned
    gradients :math:`B J` satisfy :math:`B G B = \sigma P` with a projection P: their condition number is 1.

    Guarantees: the length of the update is :math:`\sqrt{\sigma}\,|p|` for independent gradients, however they
    conflict. It does *not* guarantee that no task is opposed: of two tasks at cosine -c with norms 1 and r, the
    shorter one is as soon as :math:`1 + r \sqrt{1 - c^2} < r c`.

    Args:
        scale: :math:`\sigma` is the `"min"`, `"median"` (the lower of two) or mean (`"rmse"`) nonzero eigenvalue.
        preference: K positive numbers p, by place or task name; None: ones.
        reduction: `"mean"` divides by K. The paper sums.

    Raises:
        TypeError, ValueError: `scale` unknown, `preference` not K positive numbers.

    Note:
        The rank is decided on the cosines (eigenvalues above 1e-6 of the largest), and the decomposition computed from
        a factor of the Gramian: from the Gramian itself, the least eigenvalue would lose four digits to each factor of
        a hundred between the norms. With that eigenvalue the step shrinks as the gradients become dependent, down to
        the threshold. A task with a zero gradient is absent.

    Example:
        >>> import torch
        >>> AlignedMTL()(torch.tensor([[1.0, 0.0], [0.0, 16.0]], dtype=torch.float64))
        tensor([1.0000, 0.2500], dtype=torch.float64)

    References:
        Senushkin et al., [Independent Component Alignment for Multi-Task
        Learning](https://arxiv.org/abs/2305.19000), 2023, the stability criterion and its solution.
    """

    def __init__(
        self,
        *,
        scale: Scale = "min",
        preference: Preference = None,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        if scale not in ("min", "median", "rmse"):
            raise ValueError(f'`scale` must be "min", "median" or "rmse". Got {scale!r}.')
        self.scale: Scale = scale
        self.preference = PerTask(preference, "preference")

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        longest = split.norms.amax(-1, keepdim=True)
        norms = split.norms / torch.where(longest == 0, 1.0, longest)
        spectrum = Spectrum(split)
        # G = F F^T with F = D V L^(1/2), whose singular values are square roots of the eigenvalues, at twice the
        # digits. F is transposed so that the norms grade columns, which Jacobi's method is exact for.
        roots = spectrum.vectors * spectrum.values.sqrt().unsqueeze(-2)
        _, values, left = svd((norms.unsqueeze(-1) * roots).mT)
        left = left.mT
        rank = spectrum.kept.sum(-1, keepdim=True)
        kept = torch.arange(values.shape[-1], device=values.device) < rank
        inverse = torch.where(kept & (values > 0), 1 / values, 0.0)
        target = (split.present * self.preference.tensor(problem.tasks, norms)).unsqueeze(-1)
        aligned = (left @ (inverse.unsqueeze(-1) * (left.mT @ target))).squeeze(-1)
        weights = self._sigma(values, rank, kept) * aligned
        weights = torch.where(split.norms == 0, 1.0, weights)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))

    def _sigma(self, values: Tensor, rank: Tensor, kept: Tensor) -> Tensor:
        """`(..., 1)` square root of sigma, from descending square roots of eigenvalues."""
        if self.scale == "rmse":
            mean = torch.where(kept, values, 0.0).square().sum(-1, keepdim=True) / rank
            return mean.sqrt()
        # Among r values in descending order: the last, or for even r the lower one of the two in the middle.
        place = rank - 1 if self.scale == "min" else rank.div(2, rounding_mode="floor")
        return values.gather(-1, place.clamp(min=0).long())
