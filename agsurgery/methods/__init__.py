"""The methods: functions from the Gramian of the task gradients to the weights of their combination."""

from __future__ import annotations

from agsurgery.methods._base import Method, Reduction, Solution, Weighting, solve
from agsurgery.methods._names import register, resolve
from agsurgery.methods.ags import AGS
from agsurgery.methods.cagrad import CAGrad
from agsurgery.methods.dual_proj import DualProj
from agsurgery.methods.mgda import MGDA
from agsurgery.methods.norm_restored import NormRestored
from agsurgery.methods.pcgrad import PCGrad
from agsurgery.methods.scalarization import Mean, Sum
from agsurgery.methods.smoothed import Smoothed
from agsurgery.methods.up_grad import UPGrad

__all__ = [
    "AGS",
    "MGDA",
    "CAGrad",
    "DualProj",
    "Mean",
    "Method",
    "NormRestored",
    "PCGrad",
    "Reduction",
    "Smoothed",
    "Solution",
    "Sum",
    "UPGrad",
    "Weighting",
    "resolve",
    "solve",
]

register(AGS, CAGrad, DualProj, MGDA, Mean, PCGrad, Sum, UPGrad)
