"""FAMO: weights under which all losses improve at the same relative rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agsurgery.methods._adam import ENTRIES, adam_step
from agsurgery.methods._base import LossMethod, Reduction
from agsurgery.methods._preference import PerTask, Preference
from agsurgery.methods._state import TaskState


class FAMO(LossMethod):
    r"""Fast adaptive multitask optimisation: :math:`w_i \propto z_i / (l_i - b_i)` with :math:`z =
    \mathrm{softmax}(\xi)`.

    After the optimizer's step, on the same batch, **call `update(losses)`**: with
    :math:`\delta_i = \log(l_i - b_i) - \log(l_i' - b_i)`, how much each loss improved, :math:`\xi` takes an Adam step
    along :math:`-J^\top_{\mathrm{softmax}}\,\delta`, which moves weight to the tasks that improved least. Without these
    calls the weights are those of the logarithms of the losses.

    Args:
        lr: learning rate of :math:`\xi`; 0.025 in the paper.
        weight_decay: pulls :math:`\xi` to 0; 1e-3 in the paper's algorithm, 1e-2 or 1e-5 in official code.
        lower_bound: K numbers b, by place or task name, below every value of the losses; None: zeros.
        reduction: `"mean"` divides by K. The paper's weights sum to 1, which is the scale of the mean.

    Raises:
        TypeError, ValueError: `lr` is not positive and finite, `weight_decay` negative, or `lower_bound` not K numbers.

    Note:
        Weights are NaN where a loss is not above its bound. Improvements that are not finite do not move the weights.

    Example:
        >>> import torch
        >>> method = FAMO()
        >>> method(torch.tensor([1.0, 3.0]))
        tensor([1.5000, 0.5000])
        >>> method.update(torch.tensor([0.5, 3.0]))  # the first improved: its share falls
        >>> bool(method(torch.tensor([1.0, 3.0]))[0] < 1.5)
        True

    References:
        Liu et al., [FAMO: Fast Adaptive Multitask Optimization](https://arxiv.org/abs/2306.03792), 2023, Algorithm 1.
    """

    def __init__(
        self,
        lr: float = 0.025,
        *,
        weight_decay: float = 1e-3,
        lower_bound: Preference = None,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        if not 0 < lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite. Got {lr}.")
        if not weight_decay >= 0:
            raise ValueError(f"`weight_decay` must not be negative. Got {weight_decay}.")
        self.lr = lr
        self.weight_decay = weight_decay
        bound = None if lower_bound is None else PerTask(lower_bound, "lower_bound", positive=False)
        self.lower_bound = bound
        self._memory = TaskState(value=(1, 0.0), before=(1, 0.0), **ENTRIES)
        self._weighed: tuple[str, ...] = ()

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        logarithms = self._logarithms(losses, tasks)
        value = self._memory.read(tasks, losses)["value"]
        finite = torch.isfinite(logarithms).all()
        self._memory.write(tasks, losses, {"before": logarithms}, finite)
        self._weighed = tasks
        return len(tasks) * (value - logarithms).softmax(0)  # z / (l - b), normalised

    def update(self, losses: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> None:
        """Move the weights by how much the losses improved.

        Args:
            losses: K values after the optimizer's step, on the batch of the last `backward` and in its order, or by
                name.

        Raises:
            RuntimeError: there was no `backward` before.
            ValueError: not the tasks of the last `backward`.
        """
        if not self._weighed:
            raise RuntimeError(
                "`update` must follow a `backward` with this method. There was none."
            )
        named = isinstance(losses, Mapping)
        tasks = tuple(str(name) for name in losses) if named else self._weighed
        values = list(losses.values()) if isinstance(losses, Mapping) else list(losses)
        if sorted(tasks) != sorted(self._weighed) or len(values) != len(tasks):
            raise ValueError(
                f"`losses` must be those of the last `backward`, {list(self._weighed)}. Got "
                f"{list(tasks) if named else len(values)}."
            )
        like = self._memory.tensors()["value"]
        after = self._logarithms(torch.stack([v.detach().to(like) for v in values]), tasks)
        memory = self._memory.read(tasks, after)
        improved = memory["before"] - after
        share = memory["value"].softmax(0)
        gradient = (
            share * (improved - (share * improved).sum()) + self.weight_decay * memory["value"]
        )
        new = adam_step(memory["value"], gradient, memory, self.lr)
        self._memory.write(tasks, after, new, torch.isfinite(improved).all())

    def _logarithms(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        if self.lower_bound is not None:
            losses = losses - self.lower_bound.tensor(tasks, losses)
        return torch.where(losses > 0, losses, torch.nan).log()

    def state(self) -> Mapping[str, Tensor]:
        """Logits (`value`), Adam's moments and logarithms of the last losses, by task."""
        return self._memory.tensors()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state."""
        self._memory.load(state_dict)
