"""`backward`: the engine as a function, for those who own their loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from agsurgery.blocks import Granularity
from agsurgery.checks import as_tensors
from agsurgery.distributed import ProcessGroup, as_replicas
from agsurgery.engine import Engine
from agsurgery.losses import Losses
from agsurgery.methods import AGS, Weighting
from agsurgery.options import EngineName, Features, Heads, Level, Options, Outside
from agsurgery.report import SurgeryReport


def backward(
    losses: Losses,
    params: Iterable[Tensor] | None = None,
    method: str | Weighting | None = None,
    *,
    engine: EngineName = "grad",
    granularity: Granularity = "global",
    heads: Heads | None = None,
    shared: Iterable[Tensor] | None = None,
    outside: Outside = "error",
    buffer_dtype: torch.dtype | None = None,
    process_group: ProcessGroup | None = None,
    features: Features | None = None,
    level: Level = "parameters",
    scaler: torch.amp.GradScaler | None = None,
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
        engine: how the task gradients are computed. `"grad"`: one `torch.autograd.grad` per loss, the K gradients held
            side by side. `"lean"`: all tasks together, no two parameters' K gradients held at once, and one ordinary
            pass for the result; every operation of the shared part must have a batching rule (`torch.vmap`).
            `"accumulate"`: one `.backward()` per loss, chosen by itself where `torch.autograd.grad` is blind (DTensor
            parameters, reentrant checkpoints). `"reweight"`: the weights as `"grad"` finds them, then one ordinary
            `.backward()` of the weighted losses, which every hook sees (two where `shared` is named).
        granularity: `"global"`: one Gramian over all shared parameters. `"parameter"`: one for each tensor. Or a
            partition: a list of lists of parameters, or a dict of them by name; those not listed form the block
            `"rest"`. The method solves each block by itself.
        heads: `"own"`: a parameter of a single loss receives that loss's gradient unchanged. `"weighted"`: times
            the weight of the task, as when the weighted losses are summed. None: `"own"`, but `"weighted"` for
            methods that weigh losses by their values, which then need a single backward pass.
        shared: parameters to treat as shared, where the graph does not tell (a model compiled as a whole reaches
            everything from every loss). All others receive the plain sum of their gradients.
        outside: what to do when the losses reach an `nn.Parameter` that is not in `params`.
        buffer_dtype: dtype in which the rows of J are held; None: that of the gradients. `torch.bfloat16` halves
            their memory and rounds each entry to 3 digits.
        process_group: where several processes compute gradients on batches of their own: True for the default group, a
            `torch.distributed.ProcessGroup`, or `Replicas` for how to exchange. All pass the same tasks, in the same
            order; the task gradients, and the losses of the report, are averaged over them. Needs `params`.
        features: the tensor (or tensors) through which the losses depend on what they share, as computed in this
            forward pass. Heads are then differentiated, and freed, one by one before the trunk.
        level: `"features"`: surgery on the gradients with respect to `features`, flattened, instead of those of the
            parameters, then one pass through the trunk for any K (MGDA-UB: Sener and Koltun 2018, section 3.3). A
            surrogate: what does not conflict at the features may conflict in the parameters, and the other way round.
        scaler: scale the gradients with this `GradScaler`, in place of `scaler.scale(loss).backward()`; the losses are
            given unscaled, and the report has the scale divided out.
        retain_graph: keep the graphs for another backward pass.

    Returns:
        The `SurgeryReport` of this step.

    Raises:
        TypeError: losses, parameters or features of a wrong kind.
        ValueError: a loss is not a scalar or reaches no parameter; no loss; an unknown option, or two that contradict
            each other.
        RuntimeError: no loss has a graph; a parameter has hooks that would not fire; a compiled model keeps no graph.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> report = backward([(x[0] - x[1]).square() + x[0], -x[0]], [x], "pcgrad")
        >>> x.grad
        tensor([0., 0.])
        >>> report.conflict
        tensor(True)
    """
    options = Options(
        engine=engine,
        granularity=granularity,
        heads=heads,
        shared=shared,
        outside=outside,
        buffer_dtype=buffer_dtype,
        replicas=as_replicas(process_group),
    )
    surgery = Engine(AGS() if method is None else method, options)
    unique = None
    if params is not None:
        tensors = as_tensors(params, "params")
        unique = list({id(p): p for p in tensors if p.requires_grad}.values())
    report = surgery(
        losses, unique, features=features, level=level, retain_graph=retain_graph, scaler=scaler
    )
    assert report is not None  # it is for `combine=False` only
    return report
