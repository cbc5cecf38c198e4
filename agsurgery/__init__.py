"""Gradient surgery for training on several losses: a drop-in wrapper for `torch.optim` optimizers.

Example:
    >>> import torch
    >>> from agsurgery import AGS, GradientSurgery
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-3), AGS())
    >>> outputs = model(torch.ones(4, 3))
    >>> losses = [outputs[:, 0].square().mean(), (outputs[:, 1] - 1).square().mean()]
    >>> optimizer.zero_grad()
    >>> report = optimizer.backward(losses)
    >>> optimizer.step()
"""

from agsurgery.backward import backward
from agsurgery.distributed import Replicas
from agsurgery.methods import (
    AGS,
    DWA,
    FAMO,
    GLS,
    IMTLG,
    MGDA,
    RLW,
    STCH,
    UW,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    Fixed,
    GradDrop,
    GradVac,
    Mean,
    NashMTL,
    NormRestored,
    PCGrad,
    Random,
    Smoothed,
    Sum,
    TrimmedMean,
    UPGrad,
)
from agsurgery.monitor import ConflictMonitor
from agsurgery.optimizer import GradientSurgery, unwrap
from agsurgery.report import SurgeryReport
from agsurgery.verdict import MonitorSummary

__version__ = "0.1.0"

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
    "ConflictMonitor",
    "DualProj",
    "FairGrad",
    "Fixed",
    "GradDrop",
    "GradVac",
    "GradientSurgery",
    "Mean",
    "MonitorSummary",
    "NashMTL",
    "NormRestored",
    "PCGrad",
    "Random",
    "Replicas",
    "Smoothed",
    "Sum",
    "SurgeryReport",
    "TrimmedMean",
    "UPGrad",
    "backward",
    "unwrap",
]
