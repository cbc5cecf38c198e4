"""The two passes over the data: accuracy against float64, layouts, 16-bit rows."""

import pytest
import torch

from agsurgery import kernels


@pytest.mark.parametrize("columns", [1, 15, 16, 4096, 4097, 100_000])
def test_padded_length_holds_the_columns_and_is_aligned(columns):
    length = kernels.padded_length(columns)
    assert length >= columns
    assert length % kernels.ALIGN == 0
    assert length <= kernels.CHUNK or length % kernels.CHUNK == 0


@pytest.mark.parametrize("columns", [16, 4096, 3 * 4096, 300 * 4096])
@pytest.mark.parametrize("tasks", [1, 2, 7])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)],
)
def test_gramian_is_that_of_the_stored_rows(columns, tasks, dtype, tolerance):
    rows = (torch.randn(tasks, columns) + 0.5).to(dtype)
    exact = rows.double() @ rows.double().T
    result = kernels.gramian(rows)
    norms = exact.diagonal().sqrt()
    assert result.dtype == torch.float64
    assert ((result - exact) / torch.outer(norms, norms)).abs().max() < tolerance
    assert torch.equal(result, result.T)


def test_gramian_of_ten_million_columns_keeps_six_digits():
    """A plain float32 product is wrong in the third digit here."""
    rows = torch.rand(2, kernels.padded_length(10_000_000))
    exact = torch.stack(
        [torch.stack([(a.double() * b.double()).sum() for b in rows]) for a in rows]
    )
    assert ((kernels.gramian(rows) - exact) / exact).abs().max() < 1e-6


def test_gramian_of_float16_rows_does_not_overflow():
    rows = torch.full((2, 64), 300.0, dtype=torch.float16)  # 300 ** 2 is more than float16 can hold
    assert torch.isfinite(kernels.gramian(rows)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [False, True])
def test_combination_is_the_weighted_sum_of_the_rows(dtype, accumulate):
    rows = torch.randn(3, 300 * 4096).to(dtype)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    before = torch.randn(rows.shape[1]).to(dtype)
    out = before.clone()
    kernels.combine(weights, rows, out, accumulate=accumulate)
    expected = weights @ rows.double() + (before.double() if accumulate else 0)
    torch.testing.assert_close(
        out.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_give_a_gramian_that_is_not_finite(poison):
    rows = torch.randn(2, 8192)
    rows[1, 5000] = poison
    assert not torch.isfinite(kernels.gramian(rows)[1, 1])
