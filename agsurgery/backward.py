"""From losses to `.grad`: per-task gradients, Gramian, weights, combination."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from agsurgery.jacobian import (
    Bucket,
    Reach,
    Root,
    Split,
    buckets,
    gradient_dtype,
    gradient_root,
    split,
    stacked_roots,
    walk,
)
from agsurgery.kernels import solver_dtype
from agsurgery.methods import AGS, Weighting, resolve, solve
from agsurgery.methods._base import RowMethod, uses
from agsurgery.report import SurgeryReport, detached_losses

Losses: TypeAlias = "Sequence[Tensor] | Mapping[str, Tensor] | Tensor"
"""K scalar losses: a list or tuple, a dict from task name to loss, or a 1-D tensor."""

Heads: TypeAlias = Literal["own", "weighted"]
"""What a parameter reached by a single loss receives: that loss's gradient, or this times the task's weight."""


class Engine:
    """Surgery with one method, and the storage it reuses from step to step.

    Args:
        method: see `agsurgery.backward`.
        heads: see `agsurgery.backward`.
        shared: see `agsurgery.backward`.
        outside: see `agsurgery.backward`.
    """

    def __init__(
        self,
        method: str | Weighting,
        *,
        heads: Heads | None = None,
        shared: Iterable[Tensor] | None = None,
        outside: Literal["error", "ignore"] = "error",
    ) -> None:
        if heads not in (None, "own", "weighted"):
            raise ValueError(f'`heads` must be "own", "weighted" or None. Got {heads!r}.')
        if outside not in ("error", "ignore"):
            raise ValueError(f'`outside` must be "error" or "ignore". Got {outside!r}.')
        self.method = resolve(method)
        if heads == "weighted" and uses(self.method) == "rows":
            raise ValueError(
                f'`heads` must be "own" for a method without weights. Got "weighted" for {self.method!r}.'
            )
        default: Heads = "weighted" if uses(self.method) == "losses" else "own"
        self.heads: Heads = heads or default
        self.shared = None if shared is None else _as_tensors(shared, "shared")
        self.outside = outside
        self.report: SurgeryReport | None = None
        # State entries as the optimizer last put them in its groups.
        self.published: dict[str, Tensor] = {}
        self._buckets: list[Bucket] = []
        self._layout: list[Any] = []
        self._place: dict[int, tuple[Bucket, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # The storage belongs to these very parameters; a copy makes its own.
        return self.__dict__ | {
            "_buckets": [],
            "_layout": [],
            "_place": {},
            "report": None,
            "published": {},
        }

    def __call__(
        self,
        losses: Losses,
        parameters: Sequence[Tensor] | None,
        *,
        retain_graph: bool = False,
        loss_scale: Tensor | None = None,
    ) -> SurgeryReport:
        """Add the combined gradient of `losses` to the `.grad` of `parameters`; see `agsurgery.backward`."""
        _refuse_several_processes()
        with torch.enable_grad():  # views of a loss made under no_grad would have no graph
            names, values, roots = _read_losses(losses)
        reach = walk(roots, parameters)
        self._check(names, roots, reach)
        parts = split(reach.leaves, None if self.shared is None else {id(p) for p in self.shared})
        for leaf in {id(leaf): leaf for leaves in reach.leaves for leaf in leaves}.values():
            _check_parameter(leaf)
        step = _Step(names, values, roots, reach, parts, retain_graph, loss_scale)
        with torch.no_grad(), _full_precision(values[0].device):
            # Weights that need no gradients leave one backward pass to do, if heads are weighted as well.
            single = uses(self.method) == "losses" and self.heads == "weighted"
            self.report = self._pass_once(step) if single else self._pass_by_task(step)
        return self.report

    def _pass_once(self, step: _Step) -> SurgeryReport:
        """One backward pass of the weighted losses."""
        losses = detached_losses(step.losses)
        tasks, dtype = len(step.tasks), solver_dtype(losses.device)
        gramian = torch.full((tasks, tasks), torch.nan, dtype=dtype, device=losses.device)
        weights, scale = solve(self.method, gramian, losses.to(dtype), step.tasks)
        leaves = list(
            {id(leaf): leaf for reached in step.reach.leaves for leaf in reached}.values()
        )
        roots, starts = [], []
        for root, loss, weight in zip(step.roots, step.losses, weights.unbind(), strict=True):
            if root is not None:
                roots.append(root)
                starts.append(weight.to(loss) * step.start(loss))
        gradients = _gradients(roots, leaves, starts, step.retain_graph)
        _deliver_own(leaves, gradients, None)
        return SurgeryReport(tuple(step.tasks), losses, gramian, weights, scale)

    def _pass_by_task(self, step: _Step) -> SurgeryReport:
        """One backward pass for each loss, and the combination of their rows."""
        losses = detached_losses(step.losses)
        active = self._prepare(step.parts.shared, len(step.tasks))
        own: list[list[Tensor | None]] = []
        for task, (loss, root) in enumerate(zip(step.losses, step.roots, strict=True)):
            leaves = step.reach.leaves[task]
            keep = step.retain_graph or step.reach.retain[task]
            gradients = () if root is None else _gradients([root], leaves, [step.start(loss)], keep)
            own.append(self._write_rows(active, task, leaves, gradients))
        gramian = _gramian(active, len(step.tasks), losses.device)
        if isinstance(self.method, RowMethod):
            _combine_columns(self.method, active, len(step.tasks))
            weights, scale = gramian.new_full(losses.shape, torch.nan), gramian.new_ones(())
        else:
            weights, scale = solve(self.method, gramian, losses.to(gramian), step.tasks)
            for bucket in active:
                bucket.deliver(weights)
        for task, head_gradients in enumerate(own):
            factor = None if self.heads == "own" else weights[task]
            _deliver_own(step.parts.own[task], head_gradients, factor)
        if step.loss_scale is not None:
            gramian = gramian / step.loss_scale.to(gramian).square()
        return SurgeryReport(tuple(step.tasks), losses, gramian, weights, scale)

    def _check(self, names: Sequence[str], roots: Sequence[Root | None], reach: Reach) -> None:
        if reach.reentrant:
            raise RuntimeError(
                "Per-task gradients cannot see through a reentrant checkpoint. Call "
                "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
            )
        if all(root is None for root in roots):
            raise RuntimeError(
                "At least one loss must depend on a parameter. None of them has a graph: were they computed "
                "under `torch.no_grad()`, or detached?"
            )
        strangers = [
            leaf
            for leaf in reach.others
            if isinstance(leaf, torch.nn.Parameter) and leaf.requires_grad
        ]
        for name, root, leaves in zip(names, roots, reach.leaves, strict=True):
            if root is not None and not leaves:
                raise ValueError(
                    f"The loss of task {name!r} must reach at least one of the parameters. It has a graph, but reaches "
                    f"none of them ({len(strangers)} other parameters). Give the optimizer the parameters of this "
                    "model (sharded ones, FSDP2, are out of reach of per-task gradients). For a task that is absent "
                    "pass `torch.zeros(())`."
                )
        if strangers and self.outside == "error":
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in strangers[:5])
            raise ValueError(
                f"The losses must reach only parameters that this optimizer holds. They reach {len(strangers)} others "
                f"(shapes {shapes}{', ...' if len(strangers) > 5 else ''}), which would stay without gradient. "
                'Add them, freeze them with `requires_grad_(False)`, or pass `outside="ignore"`.'
            )

    def _prepare(self, shared: list[Tensor], tasks: int) -> list[Bucket]:
        """Storage for this step; kept from the last one as long as the same parameters are shared."""
        if not shared:
            return []  # but keep the storage: a batch without one of two tasks shares nothing
        # `model.double()` and `model.to(device)` keep the identity of the parameters.
        layout = [(id(p), p.device, gradient_dtype(p), p.shape, p.stride()) for p in shared]
        if layout != self._layout:
            self._buckets, self._layout = buckets(shared), layout
            self._place = {
                id(parameter): (bucket, position)
                for bucket in self._buckets
                for position, parameter in enumerate(bucket.parameters)
            }
        for bucket in self._buckets:
            bucket.reserve(tasks)
        return self._buckets

    def _write_rows(
        self,
        active: Sequence[Bucket],
        task: int,
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Write row `task` of the active buckets; return the gradients of the loss's own parameters."""
        own: list[Tensor | None] = []
        # A constant loss reaches no leaf, and writes rows of zeros.
        rows: dict[Bucket, dict[int, Tensor]] = {bucket: {} for bucket in active}
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if not active or id(leaf) not in self._place:
                own.append(gradient)
            elif gradient is not None:
                bucket, position = self._place[id(leaf)]
                rows[bucket][position] = gradient
        for bucket, row in rows.items():
            bucket.write(task, row)
        return own


class _Step(NamedTuple):
    """What one call works on: the losses with where their backward passes start, and what these reach."""

    tasks: list[str]
    losses: list[Tensor]
    roots: list[Root | None]
    reach: Reach
    parts: Split
    retain_graph: bool
    loss_scale: Tensor | None

    def start(self, loss: Tensor) -> Tensor:
        """Gradient of the scaled loss with respect to the loss."""
        return torch.ones_like(loss) if self.loss_scale is None else self.loss_scale.to(loss)


def _combine_columns(method: RowMethod, active: Sequence[Bucket], tasks: int) -> None:
    """Deliver the update of a method without weights."""
    start = 0
    for bucket in active:
        if start == 0:
            method.begin(bucket.device)
        start = bucket.deliver_columns(method.combine, tasks, start)


def _gramian(active: Sequence[Bucket], tasks: int, device: torch.device) -> Tensor:
    """Sum over the buckets, on the device of the first one; zero where nothing is shared."""
    if not active:
        return torch.zeros(tasks, tasks, dtype=solver_dtype(device), device=device)
    parts = [bucket.gramian(tasks) for bucket in active]
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total)
    return total


def backward(
    losses: Losses,
    params: Iterable[Tensor] | None = None,
    method: str | Weighting | None = None,
    *,
    heads: Heads | None = None,
    shared: Iterable[Tensor] | None = None,
    outside: Literal["error", "ignore"] = "error",
    retain_graph: bool = False,
) -> SurgeryReport:
    r"""Add the combined gradient of several losses to `.grad`, in place of `sum(losses).backward()`.

    A parameter that two or more losses reach is shared: with the rows of J the K gradients over all shared
    parameters and :math:`w = \mathrm{method}(J J^\top)`, it receives its part of :math:`J^\top w`. A parameter
    that one loss reaches receives that loss's gradient. A parameter that no loss reaches keeps its `.grad`.

    Args:
        losses: K scalar losses: list, tuple, dict from task name to loss, or a 1-D tensor. A loss without a graph
            (a constant, such as the zero of an absent task) has a zero gradient. Heads of a 1-D tensor are told from
            shared parameters only if it comes straight from `torch.stack`; its elements, by index or `unbind`,
            all seem to reach everything.
        params: leaf tensors to give gradients to. None: all that the losses reach.
        method: an instance such as `AGS()`, a name such as `"cagrad"`, or any callable from a `(K, K)` float64
            Gramian to `(K,)` weights. None: `AGS()`. Pass the same instance in every step if it has a state.
        heads: `"own"`: a parameter of a single loss receives that loss's gradient unchanged. `"weighted"`: times
            the weight of the task, as when the weighted losses are summed. None: `"own"`, but `"weighted"` for
            methods that weigh losses by their values, which then need a single backward pass.
        shared: parameters to treat as shared, where the graph does not tell (a model compiled as a whole reaches
            everything from every loss). All others receive the plain sum of their gradients.
        outside: what to do when the losses reach an `nn.Parameter` that is not in `params`.
        retain_graph: keep the graphs for another backward pass.

    Returns:
        The `SurgeryReport` of this step.

    Raises:
        TypeError: losses or parameters of a wrong kind.
        ValueError: a loss is not a scalar or reaches no parameter; no loss; an unknown option.
        RuntimeError: no loss has a graph; a reentrant checkpoint is in the way.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> report = backward([(x[0] - x[1]).square() + x[0], -x[0]], [x], "pcgrad")
        >>> x.grad
        tensor([0., 0.])
        >>> report.conflict
        tensor(True)
    """
    engine = Engine(
        AGS() if method is None else method, heads=heads, shared=shared, outside=outside
    )
    unique = None
    if params is not None:
        tensors = _as_tensors(params, "params")
        unique = list({id(p): p for p in tensors if p.requires_grad}.values())
    return engine(losses, unique, retain_graph=retain_graph)


def _as_tensors(params: Iterable[Tensor], name: str) -> list[Tensor]:
    if isinstance(params, Tensor | torch.nn.Module):
        raise TypeError(
            f"`{name}` must be an iterable of tensors, such as `model.parameters()`. Got {type(params).__name__}."
        )
    tensors = list(params)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}[{i}]` must be a tensor. Got {type(tensor).__name__}.")
        if not tensor.is_leaf:
            raise ValueError(
                f"`{name}[{i}]` must be a leaf of the graph. Got the result of {tensor.grad_fn}; "
                "pass the parameters it was computed from."
            )
    return tensors


def _read_losses(losses: Losses) -> tuple[list[str], list[Tensor], list[Root | None]]:
    """Task names, scalar losses and where their backward passes start."""
    if isinstance(losses, Tensor):
        if losses.dim() != 1 or losses.shape[0] == 0:
            raise ValueError(
                f"A tensor of losses must have shape (K,), K >= 1. Got shape {tuple(losses.shape)}. "
                "Pass a list of scalars, or `loss.unsqueeze(0)` for a single one."
            )
        values = list(losses.unbind())
        return [str(i) for i in range(len(values))], values, stacked_roots(losses)
    if isinstance(losses, Mapping):
        names, values = [str(name) for name in losses], list(losses.values())
        labels = [f"losses[{name!r}]" for name in losses]
    elif isinstance(losses, list | tuple):
        names, values = [str(i) for i in range(len(losses))], list(losses)
        labels = [f"losses[{i}]" for i in range(len(losses))]
    else:
        raise TypeError(
            "`losses` must be a list, tuple or dict of scalar tensors, or a 1-D tensor. "
            f"Got {type(losses).__name__}."
        )
    if not values:
        raise ValueError("`losses` must hold at least one loss. Got none.")
    if len(set(names)) < len(names):
        raise ValueError(f"Task names must differ as text. Got {names}.")
    for label, value in zip(labels, values, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`{label}` must be a scalar tensor. Got {type(value).__name__}. "
                "For a task without a loss in this batch pass `torch.zeros(())` or leave it out."
            )
        if value.numel() != 1:
            raise ValueError(
                f"`{label}` must be a scalar. Got shape {tuple(value.shape)}. Reduce it, for instance with `.mean()`."
            )
        if value.is_complex() or not value.is_floating_point():
            raise TypeError(f"`{label}` must be real floating point. Got {value.dtype}.")
    values = [value if value.dim() == 0 else value.reshape(()) for value in values]
    return names, values, [gradient_root(value) for value in values]


def _gradients(
    roots: Sequence[Root],
    leaves: Sequence[Tensor],
    starts: Sequence[Tensor],
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(
            list(roots),
            list(leaves),
            list(starts),
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "Several backward passes through a compiled model need its graph kept, but it was compiled for a "
            "single one. Set `torch._functorch.config.donated_buffer = False` before compiling."
        ) from error


def _check_parameter(parameter: Tensor) -> None:
    if hasattr(parameter, "_in_backward_optimizers"):
        raise RuntimeError(
            "A parameter must not have its optimizer in the backward pass (`_apply_optimizer_in_backward`): per-task "
            "gradients never reach that hook, so the parameter would not be updated. Remove it."
        )
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise RuntimeError(
            "A parameter must not have post-accumulate-grad hooks: per-task gradients never reach them. Remove the "
            "hook, and act on `.grad` after `backward`."
        )
    if hasattr(parameter, "placements"):
        raise TypeError(
            "Parameters must be plain tensors. Got a DTensor (FSDP2 or tensor parallel), whose gradients "
            "`torch.autograd.grad` does not see."
        )


def _refuse_several_processes() -> None:
    distributed = torch.distributed
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            "Surgery must act on the gradients of all processes together, which is not supported yet: each process "
            "would step on its own batch, and the parameters would drift apart."
        )


def _deliver_own(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], factor: Tensor | None
) -> None:
    """Add a loss's own gradients to `.grad`; None stays None."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        gradient = gradient.to(gradient_dtype(parameter))
        if factor is not None:
            gradient = gradient * factor.to(gradient.device, gradient.real.dtype)
        if parameter.grad is None:
            # A copy: autograd may hand out one tensor twice, or one that the user's code still holds, and
            # its strides may differ from the parameter's, which fused optimizers do not notice.
            dense = gradient.layout == torch.strided
            parameter.grad = (
                torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
                if dense
                else gradient.clone()
            )
        else:
            parameter.grad.add_(gradient)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: inside its region it would compute the Gramian, and parts of the backward pass, in 16 bits."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
