"""What is refused before anything is changed, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from agsurgery.graph import Reach, Root, entry
from agsurgery.options import Features, Options, Outside

_ROWLESS = ("lean", "reweight")
"""Engines that do not keep one gradient for each task."""


def as_tensors(params: Iterable[Tensor], name: str) -> list[Tensor]:
    """Leaf tensors as a list.

    Raises:
        TypeError: a single tensor, a module, or something else than tensors.
        ValueError: a tensor that is no leaf.
    """
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


def feature_nodes(features: Features) -> set[Node]:
    """Nodes of the graph that computed the features.

    Raises:
        TypeError: something else than tensors.
        ValueError: no tensor, or one that was not computed from parameters.
    """
    tensors = [features] if isinstance(features, Tensor) else list(features)
    if not tensors:
        raise ValueError("`features` must hold at least one tensor. Got none.")
    nodes: set[Node] = set()
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`features[{i}]` must be a tensor. Got {type(tensor).__name__}.")
        if tensor.grad_fn is None:
            raise ValueError(
                f"`features[{i}]` must be computed from parameters. Got a tensor without graph, of shape "
                f"{tuple(tensor.shape)}: pass the output of the trunk itself, not detached."
            )
        nodes.add(entry(get_gradient_edge(tensor)).node)
    return nodes


def check_features(passed: bool) -> None:
    """Refuse features that no loss passes through.

    Raises:
        ValueError: none does.
    """
    if not passed:
        raise ValueError(
            "The losses must depend on the parameters through `features`. None of them passes through these tensors: "
            "pass the very tensors that the heads were given, from the same forward pass."
        )


def check_options(options: Options, kind: str, method: object) -> None:
    """Refuse choices that contradict each other.

    Args:
        options: the choices.
        kind: what the method looks at.
        method: for the message.

    Raises:
        ValueError: they do.
    """
    if options.replicas is not None and options.engine == "lean":
        raise ValueError(
            '`engine="lean"` never holds the task gradients, and the inner products of averaged gradients do not '
            'follow from those of each process. With `process_group` use `engine="grad"`, and `buffer_dtype` to save '
            "memory."
        )
    if kind == "rows":
        if options.heads == "weighted":
            raise ValueError(
                f'`heads` must be "own" for a method without weights. Got "weighted" for {method!r}.'
            )
        if options.engine not in ("grad", "accumulate"):
            raise ValueError(
                f'`engine` must be "grad" or "accumulate" for a method without weights. Got "{options.engine}" for '
                f"{method!r}, which works on all coordinates of all task gradients."
            )
    if options.accumulation == "tasks" and kind == "losses":
        raise ValueError(
            '`accumulation` must be "gradients" for a method that weighs losses, whose weighted gradients simply add '
            f'up. Got "tasks" for {method!r}.'
        )
    if options.accumulation == "tasks" and (options.engine in _ROWLESS or options.every > 1):
        raise ValueError(
            '`accumulation="tasks"` keeps the gradients of each task, so `engine` must be "grad" or "accumulate" and '
            f'`every` 1. Got engine="{options.engine}", every={options.every}.'
        )
    if options.every > 1 and kind != "gramian":
        raise ValueError(
            "`every` must be 1 for a method that does not look at the Gramian: there is nothing to save. "
            f"Got {options.every} for {method!r}."
        )
    if options.granularity == "global":
        return
    if kind != "gramian":
        raise ValueError(
            f'`granularity` must be "global" for a method that does not look at the Gramian. Got {method!r}.'
        )
    if options.heads == "weighted":
        raise ValueError(
            'Each block has its own weights, so `heads="weighted"` needs `granularity="global"`.'
        )
    if options.engine in ("lean", "reweight") or options.every > 1:
        raise ValueError(
            'One weighted backward pass has one weight for each task, so `engine="lean"`, `engine="reweight"` and '
            '`every > 1` need `granularity="global"`.'
        )


def check_rows_kept(options: Options, kind: str, method: object, asked: str) -> None:
    """Refuse what needs the gradients of each task where nobody keeps them.

    Args:
        options: the choices.
        kind: what the method looks at.
        method: for the message.
        asked: what needs them, for the message.

    Raises:
        RuntimeError: the method looks at losses, or the engine runs passes of its own.
    """
    if kind == "losses":
        raise RuntimeError(
            f"A method that looks at the losses cannot be used with {asked}, which holds gradients only. Pass all "
            f"losses to one `backward`. Got {method!r}."
        )
    if options.engine in _ROWLESS or options.every > 1:
        raise RuntimeError(
            f'{asked} holds the gradients of each task, so `engine` must be "grad" or "accumulate" and '
            f'`every` 1. Got engine="{options.engine}", every={options.every}.'
        )


def check_collected(
    parameters: Sequence[Tensor] | None, border: Collection[Node] | None, options: Options
) -> None:
    """Refuse what `.backward()` calls cannot do.

    Args:
        parameters: those that may get a gradient; None if they were not given.
        border: nodes of the features; None without.
        options: the choices.

    Raises:
        ValueError: the parameters are not given, or parts of the graph are to be differentiated.
    """
    if parameters is None:
        raise ValueError(
            "The parameters must be given where the graph does not show them (a reentrant checkpoint, or "
            '`engine="accumulate"`). Pass `params`, or call '
            "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
        )
    if options.engine == "lean" or border is not None:
        raise ValueError(
            '`engine="lean"` and `features=` differentiate parts of the graph, which a reentrant checkpoint, '
            'sharded parameters and `engine="accumulate"` do not allow. Leave them out, or call '
            "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
        )


def check_reach(
    names: Sequence[str], roots: Sequence[Root | None], reach: Reach, outside: Outside
) -> None:
    """Refuse losses that do not belong to the parameters.

    Args:
        names: of the tasks.
        roots: see `walk`.
        reach: see `walk`.
        outside: see `agsurgery.backward`.

    Raises:
        ValueError: a loss reaches no parameter, or one that was not given.
    """
    strangers = [
        leaf for leaf in reach.others if isinstance(leaf, torch.nn.Parameter) and leaf.requires_grad
    ]
    for name, root, leaves in zip(names, roots, reach.leaves, strict=True):
        if root is not None and not leaves:
            raise ValueError(
                f"The loss of task {name!r} must reach at least one of the parameters. It has a graph, but reaches "
                f"none of them ({len(strangers)} other parameters). Give the optimizer the parameters of this "
                "model, made after it was sharded (FSDP2). For a task that is absent pass `torch.zeros(())`."
            )
    if strangers and outside == "error":
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in strangers[:5])
        raise ValueError(
            f"The losses must reach only parameters that this optimizer holds. They reach {len(strangers)} others "
            f"(shapes {shapes}{', ...' if len(strangers) > 5 else ''}), which would stay without gradient. "
            'Add them, freeze them with `requires_grad_(False)`, or pass `outside="ignore"`.'
        )


def check_hooks(parameters: Sequence[Tensor]) -> None:
    """Refuse hooks that per-task gradients would never reach, or reach K times.

    Raises:
        RuntimeError: a parameter has one.
    """
    for parameter in parameters:
        if hasattr(parameter, "_in_backward_optimizers"):
            raise RuntimeError(
                "A parameter must not have its optimizer in the backward pass (`_apply_optimizer_in_backward`): "
                "per-task gradients never reach that hook, so the parameter would not be updated. Remove it."
            )
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                "A parameter must not have post-accumulate-grad hooks: per-task gradients never reach them. Pass "
                '`engine="reweight"`, whose last pass is an ordinary one, or remove the hook and act on `.grad` after '
                "`backward`."
            )
