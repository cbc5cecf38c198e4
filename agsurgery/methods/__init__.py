"""The methods: functions from the Gramian of the task gradients to the weights of their combination."""

from __future__ import annotations

from agsurgery.methods._base import Method, Reduction, Solution, Weighting, solve
from agsurgery.methods._names import register, resolve
from agsurgery.methods.ags import AGS
from agsurgery.methods.aligned_mtl import AlignedMTL
from agsurgery.methods.cagrad import CAGrad
from agsurgery.methods.con_fig import ConFIG
from agsurgery.methods.dual_proj import DualProj
from agsurgery.methods.fair_grad import FairGrad
from agsurgery.methods.grad_vac import GradVac
from agsurgery.methods.imtl_g import IMTLG
from agsurgery.methods.mgda import MGDA
from agsurgery.methods.nash_mtl import NashMTL
from agsurgery.methods.norm_restored import NormRestored
from agsurgery.methods.pcgrad import PCGrad
from agsurgery.methods.scalarization import Mean, Sum
from agsurgery.methods.smoothed import Smoothed
from agsurgery.methods.up_grad import UPGrad

__all__ = [
    "AGS",
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradVac",
    "Mean",
    "Method",
    "NashMTL",
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

register(
    AGS,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    IMTLG,
    NashMTL,
    MGDA,
    Mean,
    PCGrad,
    Sum,
    UPGrad,
)
