"""`GradientSurgery`: an optimizer that is its base optimizer in every respect, and adds `backward(losses)`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from agsurgery.blocks import Granularity
from agsurgery.distributed import ProcessGroup, as_replicas
from agsurgery.engine import Engine
from agsurgery.losses import Losses
from agsurgery.methods import AGS, Weighting
from agsurgery.options import (
    Accumulation,
    EngineName,
    Features,
    Heads,
    Level,
    Options,
    Outside,
    as_names,
)
from agsurgery.report import SurgeryReport
from agsurgery.sharding import Resharding

_STATE_PREFIX = "agsurgery_"
"""State of the method is kept in `param_groups[0]` under this prefix: the one place that every checkpoint
format carries along, and that the bare optimizer ignores when it loads such a checkpoint."""


class GradientSurgery(Optimizer):
    r"""A `torch.optim` optimizer whose `backward(losses)` reconciles the gradients of several losses.

    Everything but `backward` is the base optimizer: `param_groups`, `state` and `defaults` are its own objects, so
    schedulers, checkpoints, clipping, `GradScaler` and hooks work as before, and a checkpoint of the bare optimizer
    loads into the wrapper and back.

    Args:
        optimizer: any instance of `torch.optim.Optimizer`, afterwards found as `base_optimizer`.
        method: how the task gradients are combined; see `agsurgery.backward`. None: `AGS()`.
        engine: see `agsurgery.backward`.
        every: number of steps that one set of weights serves. Those between take one ordinary backward pass of the
            weighted losses and report no Gramian. An approximation; tasks are followed by name, and new weights are
            computed as soon as other tasks are active than before.
        granularity: see `agsurgery.backward`; or `"group"`: one Gramian for each parameter group.
        heads: see `agsurgery.backward`.
        shared: see `agsurgery.backward`.
        outside: see `agsurgery.backward`.
        buffer_dtype: see `agsurgery.backward`.
        accumulation: what several calls of `backward` between two steps add up. `"gradients"`: each adds its update to
            `.grad`, as autograd does. `"tasks"`: each adds to the gradients of its tasks, by name, and sets `.grad` to
            the combination of all so far, so that micro-batches come to exactly what the full batch comes to. Ends
            with `step`, with `zero_grad`, and when every `.grad` is None. For loops that do not say which
            micro-batch is the last; where yours does, `backward(losses, combine=False)` saves work.
        tasks: names of the tasks, where they are known before the first step. What the method remembers of them, and
            the weights of `every`, then have their place in the state from the start, which distributed checkpoints
            need: they restore only what is there already, in the size it has.
        process_group: see `agsurgery.backward`.
        fsdp_model: a model under `torch.distributed.fsdp.fully_shard`. Its parameters then stay gathered between the
            backward passes of a step, which saves all but one of K all-gathers for the memory of one full set of
            parameters.

    Raises:
        TypeError: `optimizer` is not an instance of `torch.optim.Optimizer`, or is a `GradientSurgery` itself.
        ValueError: unknown method or option, or options that contradict each other.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = GradientSurgery(torch.optim.SGD([w], lr=0.1), "pcgrad")
        >>> losses = {"a": w[0] + w[1], "b": w[0] - 2 * w[1]}
        >>> optimizer.zero_grad()
        >>> report = optimizer.backward(losses)
        >>> w.grad
        tensor([ 2.7000, -0.9000])
        >>> optimizer.step()

    Note:
        The method's state is kept in the base's first parameter group. A base that already carries such a state (a
        checkpoint was loaded into it) hands it on, and the seed given to a new method has no effect then. A
        distributed checkpoint of the *bare* optimizer in flattened form lacks these entries: load it into
        the bare optimizer, then wrap that.

        `.grad` of shared parameters are views of one buffer. Clone one before saving or keeping it alone.

        Clip after `backward`: clipping the gradients of each task first would change the direction. A plain
        `.backward()` into the same `.grad` belongs after `optimizer.backward`, or pass its loss as a task.
    """

    # `GradScaler` must unscale `.grad` itself even when the base is fused. The class attribute keeps `__getattr__`
    # from handing out the base's True, after which the base would step with gradients that nobody unscales.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        method: str | Weighting | None = None,
        *,
        engine: EngineName = "grad",
        every: int = 1,
        granularity: Granularity = "global",
        heads: Heads | None = None,
        shared: Iterable[Tensor] | None = None,
        outside: Outside = "error",
        buffer_dtype: torch.dtype | None = None,
        accumulation: Accumulation = "gradients",
        tasks: Iterable[str] = (),
        process_group: ProcessGroup | None = None,
        fsdp_model: torch.nn.Module | None = None,
    ) -> None:
        # `Optimizer.__init__` is not called: it would make param groups and state of its own, which go stale.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "`optimizer` must be an instance of torch.optim.Optimizer, such as "
                f"`torch.optim.AdamW(model.parameters())`. Got {_kind(optimizer)}."
            )
        if isinstance(optimizer, GradientSurgery):
            raise TypeError(
                "`optimizer` must not be a GradientSurgery itself. Wrap its `base_optimizer`."
            )
        self.base_optimizer = optimizer
        options = Options(
            engine=engine,
            every=every,
            granularity=granularity,
            heads=heads,
            shared=shared,
            outside=outside,
            buffer_dtype=buffer_dtype,
            accumulation=accumulation,
            tasks=as_names(tasks),
            replicas=as_replicas(process_group),
            resharding=None if fsdp_model is None else Resharding(fsdp_model),
        )
        self._engine = Engine(AGS() if method is None else method, options)
        self._engine.expect(self._parameters(), self.param_groups)
        self._make_hook_tables()
        self._synchronise_state()

    def _make_hook_tables(self) -> None:
        self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_state_dict_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_state_dict_post_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks: OrderedDict[int, Any] = OrderedDict()
        self._optimizer_load_state_dict_post_hooks: OrderedDict[int, Any] = OrderedDict()

    # -- surgery ----------------------------------------------------------------------------------

    @overload
    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        level: Level = "parameters",
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        combine: Literal[True] = True,
    ) -> SurgeryReport: ...

    @overload
    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        level: Level = "parameters",
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        combine: bool,
    ) -> SurgeryReport | None: ...

    def backward(
        self,
        losses: Losses,
        *,
        features: Features | None = None,
        level: Level = "parameters",
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        combine: bool = True,
    ) -> SurgeryReport | None:
        """Add the combined gradient of `losses` to `.grad`, in place of `sum(losses).backward()`.

        Args:
            losses: K scalar losses: list, tuple, dict from task name to loss, or a 1-D tensor; unscaled.
            features: see `agsurgery.backward`.
            level: see `agsurgery.backward`.
            scaler: see `agsurgery.backward`.
            retain_graph: keep the graphs for another backward pass.
            combine: False for all micro-batches of a step but the last: the gradients of each task are held, `.grad`
                stays as it is, and the next call adds its own to them before it combines. The result is that of the
                full batch, if each loss is divided as for plain accumulation.

        Returns:
            The `SurgeryReport` of this step, also kept as `report`, with the sums of the micro-batches' losses; None
            if `combine` is False.

        Raises:
            TypeError, ValueError, RuntimeError: see `agsurgery.backward`. RuntimeError too if gradients are to be held
                and the engine or the method keeps none, or if `.grad` was changed between micro-batches.

        Example:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = GradientSurgery(torch.optim.SGD([w], lr=0.1), "pcgrad")
            >>> optimizer.backward({"a": w[0]}, combine=False)
            >>> report = optimizer.backward({"a": w[1], "b": w[0] - 2 * w[1]})
            >>> w.grad
            tensor([ 2.7000, -0.9000])
        """
        self._synchronise_state()
        report = self._engine(
            losses,
            self._parameters(),
            groups=self.param_groups,
            features=features,
            level=level,
            retain_graph=retain_graph,
            scaler=scaler,
            combine=combine,
        )
        self._synchronise_state()
        return report

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Take the gradient of one task from a backward pass that somebody else runs (a framework, for instance).

        Inside, `.grad` of all parameters is empty; what is left there at the end is the gradient of this task. After
        the last task call `combine`. A name that comes again adds to what it has. After an error nothing is taken.

        Args:
            name: of the task.

        Raises:
            RuntimeError: the method looks at losses, or the engine runs passes of its own (`"lean"`, `"reweight"`,
                `every`).

        Example:
            >>> import torch
            >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            >>> optimizer = GradientSurgery(torch.optim.SGD([w], lr=0.1), "pcgrad")
            >>> with optimizer.task("a"):
            ...     (w[0] + w[1]).backward()
            >>> with optimizer.task("b"):
            ...     (w[0] - 2 * w[1]).backward()
            >>> report = optimizer.combine()
            >>> w.grad
            tensor([ 2.7000, -0.9000])
        """
        with self._engine.taking(str(name), self._parameters()):
            yield

    def combine(self, *, scaler: torch.amp.GradScaler | None = None) -> SurgeryReport:
        """Add the combined gradient of the tasks seen since the last call to `.grad`; see also `accumulation`.

        Args:
            scaler: the `GradScaler` that scaled the losses, for the numbers of the report.

        Returns:
            The `SurgeryReport`. Losses of gradients from `task` are NaN: nobody saw them.

        Raises:
            RuntimeError: nothing has come, from `task` or `backward(losses, combine=False)`.
        """
        self._synchronise_state()
        report = self._engine.combine(self._parameters(), self.param_groups, scaler)
        self._synchronise_state()
        return report

    @property
    def report(self) -> SurgeryReport | None:
        """The report of the last `backward`; None before the first."""
        return self._engine.report

    @property
    def method(self) -> Weighting:
        """The method that combines the task gradients."""
        return self._engine.method

    def _parameters(self) -> list[Tensor]:
        unique = {id(p): p for group in self.param_groups for p in group["params"]}
        return [p for p in unique.values() if p.requires_grad]

    def _synchronise_state(self) -> None:
        """Keep the method's live state tensors in `param_groups[0]`, and take over what was loaded there.

        Loading a checkpoint, through the wrapper or behind its back through the base, replaces the group and
        what is in it; an entry that is not the one put here last is therefore newer than the method's.
        """
        engine, group = self._engine, self.param_groups[0]
        stored = {key: value for key, value in group.items() if key.startswith(_STATE_PREFIX)}
        if any(engine.published.get(key) is not value for key, value in stored.items()):
            engine.load_state({k.removeprefix(_STATE_PREFIX): v for k, v in stored.items()})
        state = engine.state()
        if state or stored:
            stored |= {_STATE_PREFIX + name: value for name, value in state.items()}
            group.update(stored)
        engine.published = stored

    # -- the base optimizer -----------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        # Only for names not found here: `train` and `eval` of schedule-free optimizers, for instance.
        if name == "base_optimizer" or (name.startswith("__") and name.endswith("__")):
            # Not yet set, while unpickling: looking it up on the base would recurse.
            raise AttributeError(name)
        return getattr(self.base_optimizer, name)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the base optimizer, with the step hooks registered here around it."""
        # As torch does it: hooks see the positional arguments with the optimizer in front.
        if self._engine.pending:
            raise RuntimeError(
                f"The gradients of the tasks {self._engine.pending} wait to be combined. Call `combine()` "
                "before `step()`, or `zero_grad()` to drop them."
            )
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for hook in list(self._optimizer_step_pre_hooks.values()):
            result = hook(self, args, kwargs)
            if result is None:
                continue
            if not (isinstance(result, tuple) and len(result) == 2):
                raise RuntimeError(
                    f"A step pre-hook must return None or a tuple of new args and kwargs. Got {result!r}."
                )
            args, kwargs = result
        loss: float | None = self.base_optimizer.step(*args[1:], **kwargs)  # runs the global hooks
        self._engine.drop()
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, args, kwargs)
        return loss

    # torch wraps `step` of every optimizer class that lacks this mark in a function that runs all hooks again.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, also those of tasks not yet combined; see `torch.optim.Optimizer.zero_grad`."""
        self._engine.drop()
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """State of the base optimizer, with the method's state among the entries of its first group."""
        for hook in list(self._optimizer_state_dict_pre_hooks.values()):
            hook(self)
        self._synchronise_state()
        state_dict = self.base_optimizer.state_dict()
        for hook in list(self._optimizer_state_dict_post_hooks.values()):
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this wrapper or of the bare optimizer."""
        state_dict = state_dict.copy()  # hooks may change it, as in torch
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.base_optimizer.load_state_dict(state_dict)
        self._synchronise_state()
        for hook in list(self._optimizer_load_state_dict_post_hooks.values()):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, hooks are left out; so is a `step` that a scheduler put on this very instance.
        return {"base_optimizer": self.base_optimizer, "_engine": self._engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_optimizer_step_pre_hooks" not in self.__dict__:
            self._make_hook_tables()

    def __repr__(self) -> str:
        return f"GradientSurgery({self._engine.method!r}, {self.base_optimizer!r})"


_INSIDE = ("base_optimizer", "_base_optimizer", "_optimizer", "optimizer")


def unwrap(optimizer: Any) -> GradientSurgery:
    """Return the `GradientSurgery` inside the wrappers of a framework, for its `backward`.

    Follows the attributes `optimizer`, `_optimizer`, `base_optimizer` and `_base_optimizer` (Accelerate, Lightning,
    timm).

    Raises:
        TypeError: there is none.
    """
    seen: set[int] = set()
    pending = [optimizer]
    while pending:
        current = pending.pop()
        content = getattr(current, "__dict__", {})
        # Lightning's proxy is an instance of our class too, but one without contents of its own.
        if isinstance(current, GradientSurgery) and "base_optimizer" in content:
            return current
        seen.add(id(current))
        inner = [content.get(name) for name in _INSIDE]
        pending += [value for value in inner if value is not None and id(value) not in seen]
    raise TypeError(f"`optimizer` must wrap a GradientSurgery. Got {_kind(optimizer)}.")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
