"""The methods: functions from the Gramian of the task gradients to the weights of their combination."""

from __future__ import annotations

from agsurgery.methods._base import Method, Reduction, Solution, Weighting, solve
from agsurgery.methods._names import register, resolve
from agsurgery.methods.ags import AGS
from agsurgery.methods.aligned_mtl import AlignedMTL
from agsurgery.methods.cagrad import CAGrad
from agsurgery.methods.con_fig import ConFIG
from agsurgery.methods.dual_proj import DualProj
from agsurgery.methods.dwa import DWA
from agsurgery.methods.fair_grad import FairGrad
from agsurgery.methods.famo import FAMO
from agsurgery.methods.fixed_weights import Fixed
from agsurgery.methods.gls import GLS
from agsurgery.methods.grad_drop import GradDrop
from agsurgery.methods.grad_vac import GradVac
from agsurgery.methods.imtl_g import IMTLG
from agsurgery.methods.mgda import MGDA
from agsurgery.methods.nash_mtl import NashMTL
from agsurgery.methods.norm_restored import NormRestored
from agsurgery.methods.pcgrad import PCGrad
from agsurgery.methods.random_weights import Random
from agsurgery.methods.rlw import RLW
from agsurgery.methods.scalarization import Mean, Sum
from agsurgery.methods.smoothed import Smoothed
from agsurgery.methods.stch import STCH
from agsurgery.methods.trimmed_mean import TrimmedMean
from agsurgery.methods.up_grad import UPGrad
from agsurgery.methods.uw import UW

__all__ = [
    "AGS",
    "DWA",
    "FAMO",
    "GLS",
    "IMTLG",
    "MGDA",
    "RLW",
    "STCH",
    "UW",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "Fixed",
    "GradDrop",
    "GradVac",
    "Mean",
    "Method",
    "NashMTL",
    "NormRestored",
    "PCGrad",
    "Random",
    "Reduction",
    "Smoothed",
    "Solution",
    "Sum",
    "TrimmedMean",
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
    DWA,
    DualProj,
    FAMO,
    FairGrad,
    GLS,
    GradDrop,
    GradVac,
    IMTLG,
    MGDA,
    Mean,
    NashMTL,
    PCGrad,
    RLW,
    Random,
    STCH,
    Sum,
    TrimmedMean,
    UPGrad,
    UW,
)
