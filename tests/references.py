"""Slow references on explicit gradient vectors, written from the definitions, sharing no code with the library."""

import math
import warnings

import torch
from torch import Tensor


def pcgrad(rows: Tensor, orders: list[list[int]]) -> Tensor:
    """Update of PCGrad: project each gradient on the normal plane of every other one that it conflicts with."""
    update = torch.zeros_like(rows[0])
    for i, gradient in enumerate(rows):
        projected = gradient.clone()
        for j in orders[i]:
            inner = torch.dot(projected, rows[j])
            if inner < 0:
                projected = projected - inner / torch.dot(rows[j], rows[j]) * rows[j]
        update = update + projected
    return update


def ags(rows: Tensor, orders: list[list[int]]) -> Tensor:
    """PCGrad's direction with the norm of the plain sum."""
    update = pcgrad(rows, orders)
    return rows.sum(0).norm() / update.norm() * update


def cagrad(rows: Tensor, c: float) -> Tensor:
    """Best worst case in the ball around the mean gradient, times K, by a conic solver."""
    import cvxpy

    basis, triangle = torch.linalg.qr(rows.T)  # at most K dimensions matter
    flat = triangle.T.numpy()
    norms = (flat**2).sum(1) ** 0.5
    mean = flat.mean(0)
    size = math.sqrt((mean**2).sum())
    step = cvxpy.Variable(flat.shape[1])
    worst = cvxpy.Variable()
    constraints = [
        (flat / norms[:, None]) @ step >= cvxpy.multiply(worst, norms.min() / norms),
        cvxpy.norm(step - mean / size) <= c,
    ]
    problem = cvxpy.Problem(cvxpy.Maximize(worst), constraints)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Solution may be inaccurate"
        )  # it asks for more than it can prove
        problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return basis @ torch.from_numpy(step.value) * size * rows.shape[0]
