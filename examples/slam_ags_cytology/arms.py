"""The pretrainings that can be compared: by which objectives an encoder is trained, and how these are reconciled."""

from __future__ import annotations

import math
from typing import Any

import torch

from agsurgery import AGS, GradientSurgery, Sum

from .balance import CappedShare, Priority
from .errors import UserError
from .objectives import Contrast, ContrastAndLabels, Labels, Objectives, PullAndPush

ARMS = (
    *("random", "sil", "simclr", "sum", "pcgrad", "cagrad", "ags", "priority"),
    *("sum-labels", "ags-labels", "priority-labels"),
)
"""Those worth naming in a help text. An arm may also be any other method of agsurgery, by its name."""

SINGLE = ("sil", "simclr")
"""Arms with one objective, where nothing is reconciled."""

LABELS = "-labels"
"""After the name of a method: the objectives are contrast on all patches and the labels of their slides."""


def check_arm(arm: str, *, limited: bool = False) -> None:
    """Refuse an arm that nobody knows, or that cannot have its similarity gradient limited.

    Raises:
        UserError: naming all arms, or the settings that go with this one.
    """
    if arm in ARMS:
        return
    method = _method(arm)
    uses = getattr(method, "uses", "gramian")
    if limited and uses != "gramian" and not arm.endswith(LABELS):
        raise UserError(
            f"arm {arm!r} looks at {uses}, not at inner products of gradients, so that the similarity gradient cannot "
            "be limited for it. Set similarity_share to None and similarity_start to 0."
        )


def objectives(arm: str, config: Any) -> Objectives:
    """The objectives of an arm.

    Args:
        arm: a checked name.
        config: a `PretrainConfig`.
    """
    if arm == "sil":
        return Labels(config.outputs, config.statistics)
    if arm == "simclr":
        return Contrast(config.temperature)
    if arm.endswith(LABELS):
        return ContrastAndLabels(config.temperature, config.outputs)
    return PullAndPush(config.temperature, config.similarity_temperature, config.statistics)


def reconcile(arm: str, share: float | None, max_scale: float | None) -> Any:
    """The method by which an arm combines its gradients; a `CappedShare` where it can limit a similarity gradient.

    Args:
        arm: a checked name.
        share: greatest length of the similarity gradient relative to the contrastive one; None: no limit.
        max_scale: upper limit of the norm-restoring factor of AGS; None: no limit.
    """
    if arm in SINGLE or arm == "random":
        return Sum()
    method: Any = _method(arm)
    if isinstance(method, AGS):
        method = AGS(max_scale=max_scale)
    if arm.endswith(LABELS) or getattr(method, "uses", "gramian") != "gramian":
        return method
    return CappedShare(method, math.inf if share is None else share)


def _method(arm: str) -> Any:
    name = arm.removesuffix(LABELS)
    if name == "priority":
        return Priority()
    if name == "random":
        name = arm  # the untrained encoder has no objectives, and is not the method of that name
    try:
        return GradientSurgery(torch.optim.SGD([torch.zeros(1)], lr=1.0), name).method
    except ValueError as error:
        known = str(error).partition("[")[2].partition("]")[0].replace("'", "")
        others = ", ".join(word for word in known.split(", ") if word not in ARMS)
        raise UserError(
            f"arm must be one of {', '.join(ARMS)}, or another method of agsurgery ({others}), with {LABELS} behind it "
            f"or without. Got {arm!r}."
        ) from None
