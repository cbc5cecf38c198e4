"""AlignedMTL, ConFIG, IMTLG and their decomposition: 60 digits, explicit vectors, the devices without LAPACK."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from agsurgery.methods import IMTLG, AlignedMTL, ConFIG
from agsurgery.methods._cosine import cosines
from agsurgery.methods._spectral import Spectrum, _next_round, jacobi_svd, least_squares
from tests.samplers import SAMPLERS, imbalanced, low_rank, opposite, pair, random

METHODS = {
    "aligned": AlignedMTL,
    "aligned median": lambda: AlignedMTL(scale="median"),
    "aligned rmse": lambda: AlignedMTL(scale="rmse"),
    "config": ConFIG,
    "config geometric": lambda: ConFIG(length="geometric"),
    "imtlg": IMTLG,
}
LENGTHS = ("projection", "min", "max", "harmonic", "arithmetic", "geometric")
every_method = pytest.mark.parametrize("name", METHODS)


def gramian(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def units(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def update(name: str, rows: Tensor) -> Tensor:
    return METHODS[name]()(gramian(rows)) @ rows


def without_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agsurgery.methods.aligned_mtl.svd", jacobi_svd)
    monkeypatch.setattr("agsurgery.methods._spectral.symmetric", lambda m: jacobi_svd(m)[:2])


def with_sixty_digits(matrix: Tensor) -> dict[str, Tensor]:
    """Weights from the definitions on the Gramian itself, by mpmath, which torch brings along."""
    import mpmath

    with mpmath.workdps(60):
        tasks = len(matrix)
        exact = mpmath.matrix(matrix.tolist())
        values, vectors = mpmath.eigsy(exact)
        ones = mpmath.ones(tasks, 1)
        root = vectors * mpmath.diag([1 / mpmath.sqrt(v) for v in values]) * vectors.T * ones
        sigmas = {
            "aligned": min(values),
            "aligned median": sorted(values)[(tasks - 1) // 2],
            "aligned rmse": sum(values) / tasks,
        }
        weights = {name: mpmath.sqrt(sigma) * root for name, sigma in sigmas.items()}
        norms = mpmath.matrix([mpmath.sqrt(exact[i, i]) for i in range(tasks)])
        point = mpmath.lu_solve(exact, norms)
        gains = exact * point
        squared = (point.T * gains)[0]
        weights["imtlg"] = tasks * point / sum(point)
        weights["config"] = sum(gains) / squared * point
        shares = sum(gains[i] / norms[i] for i in range(tasks))
        mean = mpmath.exp(sum(mpmath.log(n) for n in norms) / tasks)
        weights["config geometric"] = mean * shares / squared * point
        return {
            name: torch.tensor([float(w) for w in value], dtype=torch.float64)
            for name, value in weights.items()
        }


@pytest.mark.parametrize("tasks", [2, 3, 5, 10])
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("lapack", [True, False])
def test_every_weight_is_right_to_eight_digits(monkeypatch, tasks, ratio, lapack):
    if not lapack:
        without_lapack(monkeypatch)
    generator = torch.Generator().manual_seed(tasks)
    for seed in range(2):
        order = torch.randperm(tasks, generator=generator)  # the norms come in no order
        matrix = gramian(imbalanced(tasks, ratio, seed=seed)[order])
        for name, expected in with_sixty_digits(matrix).items():
            torch.testing.assert_close(METHODS[name]()(matrix), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("columns", [20, 2])
@pytest.mark.parametrize("preference", [None, [1.0, 3.0, 0.5, 2.0]])
def test_config_is_its_definition_on_explicit_vectors(length, columns, preference):
    for seed in range(5):
        rows = imbalanced(4, 30.0, columns, seed)
        norms = rows.norm(dim=1)
        target = torch.tensor(preference or [1.0] * 4, dtype=torch.float64)
        direction = units(torch.linalg.pinv(units(rows)) @ target)
        mean = {
            "projection": norms,
            "min": norms.min(),
            "max": norms.max(),
            "harmonic": 4 / (1 / norms).sum(),
            "arithmetic": norms.mean(),
            "geometric": norms.prod() ** 0.25,
        }[length]
        expected = (mean * (units(rows) @ direction)).sum() * direction
        method = ConFIG(length=length, preference=preference)
        torch.testing.assert_close(method(gramian(rows)) @ rows, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("columns", [20, 3])
def test_config_agrees_with_torchjd(columns):
    import torchjd.aggregation

    for seed in range(5):
        rows = imbalanced(4, 10.0, columns, seed)
        torch.testing.assert_close(update("config", rows), torchjd.aggregation.ConFIG()(rows))


@pytest.mark.parametrize("preference", [[1.0, 1.0], [1.0, 3.0]])
@pytest.mark.parametrize("cosine", [-1.0, -0.9, 0.0, 0.9, 1.0])
def test_closed_form_for_two_is_the_general_one(preference, cosine):
    target = torch.tensor(preference, dtype=torch.float64)
    for rows in (pair(cosine, 1.0, 50.0), pair(cosine, 0.0, 1.0)):
        split = cosines(gramian(rows))
        expected = Spectrum(split).least_squares(target * split.present)
        torch.testing.assert_close(least_squares(split, target * split.present), expected)


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_projection_length_projects_the_plain_sum_on_the_direction(tasks):
    """So the update never opposes the plain sum, even where dependent gradients make it oppose some."""
    for seed in range(20):
        rows = low_rank(tasks, seed=seed)
        step, plain = update("config", rows), rows.sum(0)
        torch.testing.assert_close(step @ plain, step @ step)
        assert step.norm() <= (1 + 1e-9) * plain.norm()


def test_dependent_gradients_may_be_opposed_by_every_one_of_the_three():
    for name in ("aligned", "config", "imtlg"):
        rows = [low_rank(4, 3, seed) for seed in range(30)]
        assert min((units(r) @ update(name, r)).min() for r in rows) < -0.01


@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
@pytest.mark.parametrize("ratio", [1.0, 1e6])
def test_config_opposes_no_independent_task(tasks, ratio):
    for seed in range(5):
        rows = imbalanced(tasks, ratio, seed=seed)
        assert (units(rows) @ update("config", rows)).min() > 0


def test_imtlg_opposes_all_tasks_exactly_where_the_weights_would_sum_to_a_negative_number():
    seen = set()
    for seed in range(60):
        rows = imbalanced(3, 100.0, 3, seed)
        total = torch.linalg.solve(gramian(rows), rows.norm(dim=1)).sum()
        projections = units(rows) @ update("imtlg", rows)
        assert ((projections > 0) == (total > 0)).all()
        seen.add(bool(total > 0))
    assert seen == {True, False}


@pytest.mark.parametrize("name", ["imtlg", "aligned"])
def test_no_task_is_opposed_where_two_gradients_are_equally_long(name):
    for cosine in (-0.999, -0.9, 0.0, 0.9):
        rows = pair(cosine)
        assert (units(rows) @ update(name, rows)).min() >= 0


def test_imtlg_serves_all_tasks_where_gradients_are_equally_long_and_independent():
    for seed in range(20):
        rows = units(random(5, 5, seed))
        assert (rows @ update("imtlg", rows)).min() > 0


def test_imtlg_does_nothing_where_no_weights_have_a_sum():
    # The first gradient is nearly the bisector of the others, so the point of equal projections lies behind it.
    rows = units(torch.tensor([[1.0, 0, 0.2], [1.0, 1, 0], [1.0, -1, 0]], dtype=torch.float64))
    point = torch.linalg.solve(gramian(rows), torch.ones(3, dtype=torch.float64))
    assert point[0] < 0 < point[1]
    rows[0] *= -point[0] / (point[1] + point[2])
    assert IMTLG()(gramian(rows)).tolist() == [0.0] * 3


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("rows", [low_rank(5), low_rank(6, 3), SAMPLERS["duplicated"](4)])
def test_aligned_gradients_of_dependent_ones_are_a_projection(scale, rows):
    tasks, ones = len(rows), torch.ones(len(rows), dtype=torch.float64)
    matrix, base = gramian(rows), AlignedMTL(scale=scale)(gramian(rows))
    balance = torch.stack(
        [
            AlignedMTL(scale=scale, preference=(ones + torch.eye(tasks)[i]).tolist())(matrix) - base
            for i in range(tasks)
        ]
    )
    values = torch.linalg.svdvals(rows).square()
    values = values[values > 1e-9 * values[0]]
    sigma = {"min": values[-1], "median": values[len(values) // 2], "rmse": values.mean()}[scale]
    projection = rows @ torch.linalg.pinv(rows)
    torch.testing.assert_close(balance @ matrix @ balance.T / sigma, projection, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_length_of_the_aligned_update_is_that_of_the_preference(scale):
    rows = imbalanced(4, 100.0)
    values = torch.linalg.svdvals(rows).square()
    sigma = {"min": values[-1], "median": values[2], "rmse": values.mean()}[scale]
    weights = AlignedMTL(scale=scale, preference=[1.0, 2.0, 2.0, 4.0])(gramian(rows))
    torch.testing.assert_close((weights @ rows).norm(), 5 * sigma.sqrt())


@every_method
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 32])
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_weights_do_not_depend_on_the_scale_of_the_losses(name, sampler, tasks, factor):
    if tasks == 1 and sampler == "opposite":
        pytest.skip("needs two tasks")
    rows = SAMPLERS[sampler](tasks)
    expected, weights = METHODS[name]()(gramian(rows)), METHODS[name]()(gramian(factor * rows))
    assert torch.isfinite(weights).all()
    assert ((weights - expected) @ rows).norm() <= 1e-7 * rows.norm(dim=1).sum()


@every_method
def test_one_task_has_weight_one_and_an_absent_one_too(name):
    method = METHODS[name]()
    torch.testing.assert_close(method(gramian(random(1))), torch.ones(1, dtype=torch.float64))
    assert method(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [1.0] * 3
    assert method(gramian(SAMPLERS["zero row"](4)))[-1] == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_an_absent_task_changes_no_length_of_config(length):
    rows = imbalanced(3, 10.0)
    method, padded = ConFIG(length=length), torch.nn.functional.pad(rows, (0, 0, 0, 1))
    torch.testing.assert_close(method(gramian(padded))[:3], method(gramian(rows)))


@every_method
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_an_absent_task_changes_no_weight_of_the_others(name, tasks):
    rows = random(tasks)
    padded = torch.nn.functional.pad(rows, (0, 0, 1, 0))
    torch.testing.assert_close(METHODS[name]()(gramian(padded))[1:], METHODS[name]()(gramian(rows)))


@every_method
@pytest.mark.parametrize("tasks", [2, 3])
def test_blocks_are_solved_each_on_its_own(name, tasks):
    samples = [
        imbalanced(tasks, 1e6),
        opposite(tasks),
        SAMPLERS["zero row"](tasks),
        SAMPLERS["rank one"](tasks),
        torch.nan * random(tasks),
        random(tasks),
    ]
    blocks = torch.stack([gramian(rows) for rows in samples]).view(2, 3, tasks, tasks)
    weights = METHODS[name]()(blocks).view(6, tasks)
    for block, rows in enumerate(samples):
        # Of rank-one gradients only the update is defined to all digits.
        expected = METHODS[name]()(gramian(rows))
        torch.testing.assert_close(weights[block], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert weights[4].isnan().all()
    assert weights[5].isfinite().all()


def with_noise(matrix: Tensor) -> Tensor:
    """The Gramian as float32 sums leave it."""
    noise = random(len(matrix), len(matrix), seed=9).clamp(-1, 1)
    return matrix * (1 + 2e-7 * (noise + noise.T) / 2)


@every_method
@pytest.mark.parametrize("tasks", [2, 3, 9])
def test_float32_noise_of_duplicates_is_not_taken_for_a_direction(name, tasks):
    rows = SAMPLERS["duplicated"](tasks)
    step = METHODS[name]()(with_noise(gramian(rows))) @ rows
    assert (step - update(name, rows)).norm() <= 1e-4 * rows.norm()


@pytest.mark.parametrize("name", ["config", "config geometric", "imtlg"])
@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_nothing_is_done_where_each_gradient_has_its_opposite(name, pairs):
    rows = imbalanced(pairs, 10.0)
    rows = torch.cat((rows, -2 * rows))
    for matrix in (gramian(rows), with_noise(gramian(rows))):
        assert METHODS[name]()(matrix).abs().max() == 0


@every_method
def test_copies_and_pickles_give_the_same_weights(name):
    method, matrix = METHODS[name](), gramian(random(3))
    expected = method(matrix)
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert torch.equal(twin(matrix), expected)


@pytest.mark.parametrize("method", [AlignedMTL, ConFIG])
def test_preference_goes_by_the_name_of_the_task(method):
    matrix = gramian(random(2))
    expected = method(preference=[1.0, 3.0])(matrix)
    named = method(preference={"b": 3.0, "a": 1.0}).solve(matrix, tasks=("a", "b")).weights
    assert torch.equal(named, expected)


class HostTensors(TorchDispatchMode):
    """Records the operations that start from a tensor on the host: a CUDA graph cannot capture them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(a, Tensor) and a.device.type == "cpu" for a in args):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@every_method
@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
def test_nothing_is_copied_to_or_read_from_an_accelerator(monkeypatch, name, tasks):
    method = METHODS[name]()
    # Preferences are copied once, in the first step; under a fake device they are not remembered.
    monkeypatch.setattr(
        "agsurgery.methods._preference.PerTask.tensor", lambda _, __, like: torch.ones_like(like)
    )
    with FakeTensorMode():
        matrix = torch.empty(2, tasks, tasks, dtype=torch.float64, device="cuda")
        with HostTensors() as host:
            weights = method(matrix)
    assert weights.device.type == "cuda"
    assert weights.shape == (2, tasks)
    assert host.seen == []


@pytest.mark.parametrize(
    ("name", "lapack"), [*((name, True) for name in METHODS), ("aligned", False)]
)
def test_compiled_whole_gives_the_same_weights(monkeypatch, name, lapack):
    if not lapack:
        without_lapack(monkeypatch)
    method, matrix = METHODS[name](), gramian(random(3))
    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(matrix), method(matrix))


@pytest.mark.parametrize("width", [2, 4, 6, 8, 34])
def test_every_two_columns_meet_once_in_a_sweep(width):
    seats, met = torch.arange(width), []
    for _ in range(width - 1):
        first, second = seats.chunk(2)
        met += [frozenset(two) for two in zip(first.tolist(), second.tolist(), strict=True)]
        seats = _next_round(first, second)
    assert len(set(met)) == len(met) == width * (width - 1) // 2
    assert seats.tolist() == list(range(width))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 16, 32, 33])
def test_jacobi_converges_for_what_converges_last(size):
    """Gradients that are nearly equal, in a batch beside zeros and dependent ones."""
    spread = torch.logspace(-1, -2, 30, dtype=torch.float64).view(30, 1, 1)
    near = units(random(1, size) + spread * random(30 * size, size, 1).view(30, size, size))
    dependent = units(random(size, max(1, size // 2)))
    products = [*gramian(near), gramian(dependent), torch.zeros(size, size, dtype=torch.float64)]
    matrices = torch.stack(products)
    left, values, right = jacobi_svd(matrices)
    torch.testing.assert_close((left * values.unsqueeze(-2)) @ right, matrices, rtol=0, atol=1e-12)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrices), rtol=0, atol=1e-12)
    kept = (values > 1e-6 * values[:, :1]).unsqueeze(-2)
    left = torch.where(kept, left, 0.0)
    # What C itself gives: 1e-16 of the largest value, beside values 1e-6 of it.
    identity = torch.diag_embed(kept.squeeze(-2).double())
    torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [2, 3, 9, 32])
def test_jacobi_keeps_the_digits_of_short_columns_in_any_order(size):
    lengths = torch.logspace(0, 6, size, dtype=torch.float64)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    matrix = torch.eye(size, dtype=torch.float64) + random(size, size) / (3 * math.sqrt(size))
    left, values, right = jacobi_svd(matrix * lengths[order])
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=1e-11)
    torch.testing.assert_close(right @ right.mT, identity, rtol=0, atol=1e-12)
    # LAPACK on the inverse is accurate for what is small in the matrix.
    inverse = torch.diag(1 / lengths[order]) @ torch.linalg.inv(matrix)
    torch.testing.assert_close(1 / values[-1], torch.linalg.svdvals(inverse)[0], rtol=1e-12, atol=0)
