"""The methods: functions from the Gramian of the task gradients to the weights of their combination."""

from __future__ import annotations

from agsurgery.methods._base import Method, Reduction, Solution, Weighting, solve
from agsurgery.methods._names import register, resolve
from agsurgery.methods.ags import AGS
from agsurgery.methods.cagrad import CAGrad
from agsurgery.methods.norm_restored import NormRestored
from agsurgery.methods.pcgrad import PCGrad
from agsurgery.methods.scalarization import Mean, Sum
from agsurgery.methods.smoothed import Smoothed

__all__ = [
    "AGS",
    "CAGrad",
    "Mean",
    "Method",
    "NormRestored",
    "PCGrad",
    "Reduction",
    "Smoothed",
    "Solution",
    "Sum",
    "Weighting",
    "resolve",
    "solve",
]

register(AGS, CAGrad, Mean, PCGrad, Sum)
