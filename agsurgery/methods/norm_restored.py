"""NormRestored: the direction of any method, with the length of the plain sum."""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._base import Problem, Reduction, Solution, Weighting
from agsurgery.methods._cosine import NOISE, Cosines
from agsurgery.methods._wrapper import Wrapper


def norm_restoring_scale(weights: Tensor, split: Cosines, max_scale: float | None) -> Tensor:
    r"""Factor that gives :math:`J^\top w` the norm of the plain sum, :math:`\sqrt{1^\top G 1 / w^\top G w}`.

    Args:
        weights: `(..., K)`.
        split: norms and cosines of the Gramian.
        max_scale: upper limit of the factor; None for no limit.

    Returns:
        `(...)`; 1 where the update is rounding noise (see `NOISE`).
    """
    # Lengths along the unit gradients, of the plain sum and of the update, and both squared norms in one product.
    lengths = torch.stack((split.norms, weights * split.norms), -2)
    plain, projected = (lengths * (lengths @ split.matrix)).sum(-1).clamp(min=0).unbind(-1)
    noise = NOISE * lengths.select(-2, 1).abs().sum(-1).square()
    scale = torch.where(projected <= noise, 1.0, (plain / projected).sqrt())
    return scale if max_scale is None else scale.clamp(max=max_scale)


class NormRestored(Wrapper):
    r"""Update of `method`, stretched to the norm of the plain sum.

    .. math:: w = s\,w_m, \qquad s = |J^\top 1| / |J^\top w_m|.

    Methods differ in direction and in length of step. With the length restored the learning rate of the plain sum
    stays right for all of them, and a comparison shows what the direction is worth.

    Guarantees: those of the method inside that do not depend on the length, such as opposing no task; the
    update has the norm of the plain sum (unless `max_scale` binds, or only rounding noise is left to stretch).

    Args:
        method: the method inside: an instance, a name, or any callable from Gramian to weights. Its `reduction` has no
            effect, unless `max_scale` binds.
        max_scale: upper limit of s; None for no limit. s grows without bound where the gradients cancel in the
            update but not in the sum.
        reduction: `"mean"` gives the update the norm of the mean gradient.

    Raises:
        ValueError: `max_scale` is not positive.
        TypeError: the method inside works on coordinates and has no weights.

    Example:
        >>> import torch
        >>> from agsurgery import PCGrad
        >>> NormRestored(PCGrad())(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)

    References:
        The norm restoring of AGS (see `AGS`), applied to any method.
    """

    def __init__(
        self,
        method: str | Weighting,
        *,
        max_scale: float | None = 10.0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(method, reduction=reduction)
        if max_scale is not None and not max_scale > 0:
            raise ValueError(
                f"`max_scale` must be positive, or None for no limit. Got {max_scale}."
            )
        self.max_scale = max_scale

    def _solve_sum(self, problem: Problem) -> Solution:
        weights = self._solve_inner(problem).weights
        scale = norm_restoring_scale(weights, problem.split, self.max_scale)
        return Solution(scale.unsqueeze(-1) * weights, scale)
