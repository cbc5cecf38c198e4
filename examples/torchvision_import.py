"""torchvision, also beside a CPU build of torch.

The torchvision wheel of the package index is linked against CUDA. Beside a CPU build of torch its native operators
do not load, and importing it fails where it describes two of them. Nothing here uses these operators: so
when, and only when, the import fails in this way, their signatures are declared and it is tried once more.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_MISSING = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """Import and return torchvision.

    Raises:
        ImportError: it is not installed.
        RuntimeError: its import fails for another reason than the missing operators.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    for name, signature in _MISSING.items():
        torch.library.define(f"torchvision::{name}", signature)
    return importlib.import_module("torchvision")
