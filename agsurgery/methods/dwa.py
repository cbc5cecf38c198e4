"""DWA: weigh losses by how slowly they fell over the last epochs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agsurgery.methods._base import LossMethod, Reduction
from agsurgery.methods._state import TaskState


class DWA(LossMethod):
    r"""Dynamic weight average: :math:`w = K\,\mathrm{softmax}(r / T)`, :math:`r_i = \bar l_i(t - 1) / \bar l_i(t - 2)`.

    :math:`\bar l_i(t)` is the mean of loss i over epoch t. **Call `end_epoch()` at the end of each epoch.** Until a
    task has two of them behind it, its r is 1.

    Args:
        temperature: T, positive; larger makes the weights more even. The paper uses 2.
        reduction: `"mean"` divides by K; the paper's weights sum to K.

    Raises:
        ValueError: `temperature` is not positive.

    Note:
        An epoch in which a task never occurred does not count for it. Losses that are not finite do not enter the
        means.

    Example:
        >>> import torch
        >>> method = DWA()
        >>> for loss in (4.0, 2.0):
        ...     weights = method(torch.tensor([1.0, loss]))
        ...     method.end_epoch()
        >>> weights  # in the second epoch still
        tensor([1., 1.])
        >>> method(torch.tensor([1.0, 1.0]))  # r = 1, 1/2: weights 2 softmax(1/2, 1/4)
        tensor([1.1244, 0.8756])

    References:
        Liu, Johns and Davison, [End-to-End Multi-Task Learning with Attention](https://arxiv.org/abs/1803.10704), 2019,
        equation 7.
    """

    def __init__(self, temperature: float = 2.0, *, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive. Got {temperature}.")
        self.temperature = temperature
        self._memory = TaskState(
            total=(1, 0.0), count=(1, 0.0), last=(1, 0.0), before=(1, 0.0), epochs=(1, 0.0)
        )

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        memory = self._memory.read(tasks, losses)
        ratio = torch.where(memory["epochs"] >= 2, memory["last"] / memory["before"], 1.0)
        new = {"total": memory["total"] + losses, "count": memory["count"] + 1}
        self._memory.write(tasks, losses, new, torch.isfinite(losses).all())
        return len(tasks) * (ratio / self.temperature).softmax(0)

    def end_epoch(self) -> None:
        """Close the current epoch: its means are what the next epochs compare."""
        memory = self._memory.tensors()
        if not memory:
            return
        seen = memory["count"] > 0
        mean = memory["total"] / memory["count"]
        memory["before"].copy_(torch.where(seen, memory["last"], memory["before"]))
        memory["last"].copy_(torch.where(seen, mean, memory["last"]))
        memory["epochs"].add_(seen)
        memory["total"].zero_()
        memory["count"].zero_()

    def state(self) -> Mapping[str, Tensor]:
        """Sums of the current epoch, and means of the last two, by task."""
        return self._memory.tensors()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state."""
        self._memory.load(state_dict)
