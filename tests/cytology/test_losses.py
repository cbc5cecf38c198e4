"""The two objectives, the balance between their gradients, and the signs of collapse."""

import math
import re

import pytest
import torch
from torch.nn import functional

from agsurgery import AGS, CAGrad, PCGrad, Sum, backward
from examples.slam_ags_cytology.balance import CappedShare
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.indicators import (
    COLLAPSED_LOSS,
    COLLAPSED_RANK,
    WEAK_LOSS,
    WEAK_RANK,
    spread,
    verdict,
)
from examples.slam_ags_cytology.losses import chance, contrastive_loss, similarity_loss
from examples.slam_ags_cytology.networks import (
    ENCODERS,
    Encoder,
    Pretrained,
    load_encoder,
    projector,
    save_encoder,
)
from examples.slam_ags_cytology.views import RandomViews, centre, to_float


def rows(count, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


# --- contrastive loss ----------------------------------------------------------------------------


def slow_contrastive(first, second, temperature):
    """Equation 1 of Chen et al. in Python floats."""
    units = [(row / row.norm()).tolist() for row in (*first, *second)]
    count = len(first)

    def similarity(a, k):
        return sum(x * y for x, y in zip(units[a], units[k], strict=True)) / temperature

    total = 0.0
    for a in range(2 * count):
        others = [math.exp(similarity(a, k)) for k in range(2 * count) if k != a]
        total -= math.log(math.exp(similarity(a, (a + count) % (2 * count))) / sum(others))
    return total / (2 * count)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_contrastive_loss_is_the_double_loop_of_the_paper(count, temperature):
    first, second = rows(count), rows(count, seed=1)
    expected = slow_contrastive(first, second, temperature)
    assert float(contrastive_loss(first, second, temperature)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 16, 128])
def test_contrastive_loss_of_equal_rows_is_chance(count):
    same = rows(1).expand(count, -1)
    assert float(contrastive_loss(same, same, 0.2)) == pytest.approx(math.log(2 * count - 1))
    assert chance(count) == pytest.approx(math.log(2 * count - 1))  # float32 in the last digits


def test_contrastive_loss_does_not_depend_on_the_order_of_the_pairs():
    first, second = rows(6), rows(6, seed=1)
    order = torch.randperm(6)
    expected = contrastive_loss(first, second, 0.2)
    torch.testing.assert_close(contrastive_loss(first[order], second[order], 0.2), expected)
    torch.testing.assert_close(contrastive_loss(second, first, 0.2), expected)


def test_contrastive_loss_depends_on_which_views_belong_together():
    first = rows(6)
    second = first + 0.01 * rows(6, seed=1)
    assert contrastive_loss(first, second, 0.2) + 1 < contrastive_loss(
        first, second.roll(1, 0), 0.2
    )


# --- similarity loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_similarity_loss_is_the_mean_distance_over_all_pairs(count, temperature):
    data = rows(count)
    cosines = [
        float(functional.cosine_similarity(data[a], data[b], dim=0))
        for a in range(count)
        for b in range(count)
        if a != b
    ]
    expected = (1 - sum(cosines) / len(cosines)) / temperature
    assert float(similarity_loss(data, temperature)) == pytest.approx(expected, rel=1e-10)


def test_similarity_loss_lies_between_equal_and_opposite_rows():
    one = rows(1)
    assert float(similarity_loss(one.expand(6, -1), 0.07)) == pytest.approx(0, abs=1e-12)
    assert float(similarity_loss(torch.cat((one, -one)), 0.07)) == pytest.approx(2 / 0.07)
    for seed in range(20):
        assert 0 <= float(similarity_loss(rows(4, seed=seed), 1.0)) <= 2


def test_similarity_temperature_only_divides():
    data = rows(5).requires_grad_()
    (plain,) = torch.autograd.grad(similarity_loss(data, 1.0), data)
    (divided,) = torch.autograd.grad(similarity_loss(data, 0.07), data)
    torch.testing.assert_close(divided, plain / 0.07)


@pytest.mark.parametrize("name", ["random", "equal", "tiny", "zero"])
@pytest.mark.parametrize("loss", ["contrastive", "similarity"])
def test_gradients_are_finite(name, loss):
    # Collapse makes rows equal, dead ReLUs make them zero: a NaN there would end the training.
    data = {
        "random": rows(6),
        "equal": rows(1).repeat(6, 1),
        "tiny": 1e-20 * rows(6),
        "zero": torch.zeros(6, 5, dtype=torch.float64),
    }[name].float()
    data.requires_grad_()
    value = (
        contrastive_loss(*data.chunk(2), 0.07)
        if loss == "contrastive"
        else similarity_loss(data, 0.07)
    )
    (gradient,) = torch.autograd.grad(value, data)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
    if name == "random":
        assert gradient.norm() > 0


# --- balance -------------------------------------------------------------------------------------

METHODS = {"ags": AGS, "pcgrad": PCGrad, "cagrad": CAGrad, "sum": Sum}
CONFLICT = ([2.0, 0.0, 1.0], [-3.0, 4.0, 0.0])
ALIGNED = ([2.0, 0.0, 1.0], [3.0, 4.0, 0.0])


def combine(method, first, second):
    """Report of the surgery, and the update, for two given gradients."""
    point = torch.zeros(len(first), dtype=torch.float64, requires_grad=True)
    losses = {
        "contrastive": point @ torch.tensor(first, dtype=torch.float64),
        "similarity": point @ torch.tensor(second, dtype=torch.float64),
    }
    report = backward(losses, [point], method)
    return report, point.grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("vectors", [CONFLICT, ALIGNED], ids=["conflict", "aligned"])
@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_capping_equals_the_inner_method_on_a_shortened_second_gradient(method, vectors, share):
    first, second = (torch.tensor(vector, dtype=torch.float64) for vector in vectors)
    shrink = min(1.0, share * float(first.norm()) / float(second.norm()))
    assert shrink < 1
    expected_report, expected = combine(METHODS[method](), vectors[0], (shrink * second).tolist())
    report, update = combine(CappedShare(METHODS[method](), share), *vectors)
    torch.testing.assert_close(update, expected)
    factors = torch.tensor([1.0, shrink], dtype=torch.float64)
    torch.testing.assert_close(report.weights, expected_report.weights * factors)
    torch.testing.assert_close(report.scale, expected_report.scale)


def test_capped_sum_and_pcgrad_by_hand():
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([-8.0, 6.0])  # lengths 3 and 10
    _, update = combine(CappedShare(Sum(), 0.1), first.tolist(), second.tolist())
    torch.testing.assert_close(update, torch.tensor([3 - 0.24, 0.18], dtype=torch.float64))
    # The second becomes (-0.24, 0.18): without its part along the first (0, 0.18). Of the first, its part along the
    # second, 3 * 0.8 = 2.4 in the direction (-0.8, 0.6), is removed: (3 - 1.92, 1.44).
    _, update = combine(CappedShare(PCGrad(), 0.1), first.tolist(), second.tolist())
    torch.testing.assert_close(update, torch.tensor([1.08, 1.44 + 0.18], dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("share", "second"),
    [(math.inf, CONFLICT[1]), (0.1, [-0.03, 0.04, 0.0])],
    ids=["no limit", "short"],
)
def test_a_second_gradient_within_the_limit_is_left_alone(method, share, second):
    expected_report, expected = combine(METHODS[method](), CONFLICT[0], second)
    report, update = combine(CappedShare(METHODS[method](), share), CONFLICT[0], second)
    torch.testing.assert_close(update, expected, rtol=0, atol=0)
    torch.testing.assert_close(report.scale, expected_report.scale, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.1, math.inf])
@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (0, 0)])
def test_zero_gradients_give_the_answer_of_the_inner_method(method, share, first, second):
    # A zero first gradient leaves no room for the second, a zero second one nothing to shorten.
    vectors = ([first * x for x in CONFLICT[0]], [second * x for x in CONFLICT[1]])
    seen = [0.0] * 3 if first == 0 and share < math.inf else vectors[1]
    _, expected = combine(METHODS[method](), vectors[0], seen)
    _, update = combine(CappedShare(METHODS[method](), share), *vectors)
    assert torch.isfinite(update).all()
    torch.testing.assert_close(update, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("position", [0, 1])
def test_a_gradient_that_is_not_finite_is_not_hidden(method, active, position):
    vectors = [list(vector) for vector in CONFLICT]
    vectors[position][0] = math.nan
    report, update = combine(CappedShare(METHODS[method](), 0.1, active), *vectors)
    assert update.isnan().all()
    assert report.weights.isnan().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.1, math.inf])
def test_an_inactive_second_task_has_no_weight(method, share):
    report, update = combine(CappedShare(METHODS[method](), share, active=False), *CONFLICT)
    assert report.weights[1] == 0
    assert report.weights[0] > 0
    if method != "cagrad":  # which lengthens the step of a task that is alone
        torch.testing.assert_close(update, torch.tensor(CONFLICT[0], dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_limit_does_not_depend_on_the_scale_of_the_losses(method, factor):
    report, _ = combine(CappedShare(METHODS[method](), 0.1), *CONFLICT)
    scaled, _ = combine(
        CappedShare(METHODS[method](), 0.1), *([factor * x for x in vector] for vector in CONFLICT)
    )
    torch.testing.assert_close(scaled.weights, report.weights)


def test_the_scale_of_ags_reaches_the_report():
    # Unequal lengths and a conflict, so that AGS stretches the step: 1 would be the answer of any other method.
    report, update = combine(CappedShare(AGS(), 0.5), *CONFLICT)
    assert float(report.scale) != 1
    second = torch.tensor(CONFLICT[1], dtype=torch.float64)
    first = torch.tensor(CONFLICT[0], dtype=torch.float64)
    plain = first + 0.5 * first.norm() / second.norm() * second
    torch.testing.assert_close(update.norm(), plain.norm())


# --- signs of collapse ---------------------------------------------------------------------------


def test_equal_rows_have_no_spread():
    found = spread(rows(1).repeat(32, 1))
    assert found.std == pytest.approx(0, abs=1e-6)
    assert found.effective_rank == pytest.approx(1, abs=1e-4)


def test_orthogonal_rows_have_full_rank():
    found = spread(torch.eye(8).repeat(4, 1) * torch.arange(1, 33)[:, None])
    assert found.effective_rank == pytest.approx(8, rel=1e-5)
    # Each column holds four ones among 32: standard deviation sqrt(4 / 32 * 28 / 31), times sqrt(8).
    assert found.std == pytest.approx(math.sqrt(28 / 31), rel=1e-5)


def test_two_directions_with_unequal_shares_have_the_rank_of_their_entropy():
    rank = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    found = spread(torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 5.0]] * 2))
    assert found.effective_rank == pytest.approx(rank, rel=1e-5)


def test_random_rows_are_spread_over_the_sphere():
    found = spread(rows(4000, 16))
    assert found.std == pytest.approx(1, abs=0.01)
    assert found.effective_rank == pytest.approx(16, abs=0.1)


def test_the_common_part_of_the_rows_counts_as_collapse():
    # Noise around one point: after subtracting the mean it would have full rank.
    found = spread(torch.ones(500, 16, dtype=torch.float64) + 0.01 * rows(500, 16))
    assert found.effective_rank < 1.01
    assert found.std < 0.05


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_spread_of_rows_that_are_not_finite_is_nan(value):
    data = rows(6)
    data[2, 3] = value
    found = spread(data)
    assert math.isnan(found.std)
    assert math.isnan(found.effective_rank)


def log_of(loss, rank, steps=40):
    return [{"loss_contrastive": loss, "effective_rank": rank} for _ in range(steps)]


@pytest.mark.parametrize(
    ("loss", "rank", "collapsed", "weak", "reason"),
    [
        (4.0, 1.001, True, False, "look alike.* 4.00 .*chance is 4.00.*rank .* 1.00"),
        (3.94, 1.12, True, False, "look alike"),
        (4.02, 1.0, True, False, "look alike"),  # worse than chance
        (1.0, 1.001, False, True, "learnt little"),  # rank alone: all but a few cells are equal
        (3.96, 9.0, False, True, "learnt little"),  # loss alone: an untrained, scattered network
        (3.6, 2.0, False, True, "learnt little"),
        (3.0, 1.5, False, True, "learnt little"),
        (3.3, 1.7, False, False, "^$"),
        (0.5, 12.0, False, False, "^$"),
        (math.nan, 3.0, True, False, "not finite"),
        (1.0, math.nan, True, False, "not finite"),
        (math.inf, 1.0, True, False, "not finite"),
    ],
)
def test_verdicts(loss, rank, collapsed, weak, reason):
    found = verdict(log_of(loss, rank), chance=4.0)
    assert (found.collapsed, found.weak) == (collapsed, weak)
    assert re.search(reason, found.reason)


def test_bounds_of_the_verdict_leave_room_between_collapsed_and_healthy():
    assert 1 < COLLAPSED_RANK < WEAK_RANK
    assert 1 > COLLAPSED_LOSS > WEAK_LOSS > 0


def test_the_verdict_reads_the_last_tenth_of_the_log():
    log = [*log_of(4.0, 1.0, 36), *log_of(1.0, 5.0, 4)]
    assert verdict(log, 4.0).reason == ""
    assert verdict(log[::-1], 4.0).collapsed
    assert verdict(log_of(4.0, 1.0, 1), 4.0).collapsed  # shorter than ten steps


# --- views ---------------------------------------------------------------------------------------


def patches(count=6, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_to_float_maps_bytes_to_the_unit_interval():
    stored = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8).numpy()
    stored[0, 0, 0] = (0, 51, 255)
    found = to_float(stored)
    assert found.shape == (4, 3, 5, 6)
    assert found.dtype == torch.float32
    assert found[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    expected = torch.from_numpy(stored)[2, 3, 4].float() / 255
    torch.testing.assert_close(found[2, :, 3, 4], expected)


@pytest.mark.parametrize(("size", "first"), [(32, 0), (28, 2), (27, 2), (1, 15)])
def test_centre_cuts_the_middle(size, first):
    images = patches()
    found = centre(images, size)
    assert found.shape == (6, 3, size, size)
    torch.testing.assert_close(found, images[:, :, first : first + size, first : first + size])


def test_views_follow_the_seed():
    augment = RandomViews(28, jitter=0.4, stain=0.1)
    images = patches()
    first, other = augment(images), augment(images)
    torch.manual_seed(0)
    again = augment(images)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    torch.testing.assert_close(augment(images), again, rtol=0, atol=0)


@pytest.mark.parametrize(("jitter", "stain"), [(0.0, 0.0), (0.4, 0.1), (1.0, 1.0)])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_views_keep_range_and_have_the_size_of_the_crop(jitter, stain, size):
    found = RandomViews(size, jitter=jitter, stain=stain)(patches())
    assert found.shape == (6, 3, size, size)
    assert 0 <= float(found.min()) < float(found.max()) <= 1


@pytest.mark.parametrize(("jitter", "size"), [(0.4, 32), (0.0, 24)], ids=["colour", "crop"])
def test_each_image_has_its_own_draw(jitter, size):
    same = patches(1).repeat(16, 1, 1, 1)
    found = RandomViews(size, jitter=jitter, stain=jitter)(same)
    assert len({tuple(image.flatten().tolist()) for image in found}) > 8


def test_views_without_colour_are_turned_or_mirrored_copies():
    image = patches(1)
    turned = [torch.rot90(image, k, (2, 3)) for k in range(4)]
    eight = [*turned, *(x.flip(3) for x in turned)]
    found = RandomViews(32, jitter=0.0, stain=0.0)(image.repeat(64, 1, 1, 1))
    seen = set()
    for view in found:
        errors = [float((view - candidate[0]).abs().max()) for candidate in eight]
        assert min(errors) < 1e-4  # rotation resamples, in float32
        seen.add(errors.index(min(errors)))
    assert seen == set(range(8))


def test_views_need_no_gradient():
    images = patches().requires_grad_()
    assert not RandomViews(28, jitter=0.4, stain=0.1)(images).requires_grad


# --- networks ------------------------------------------------------------------------------------


def pretrained(encoder="small", batch_norm=False):
    return Pretrained(encoder, 16, 8, batch_norm=batch_norm)


@pytest.mark.parametrize(("encoder", "features"), [("small", 128), ("resnet18", 512)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_saved_encoder_gives_the_same_outputs(tmp_path, encoder, features, batch_norm):
    model = pretrained(encoder, batch_norm)
    model.encoder.mean.fill_(0.3)
    model.encoder.std.fill_(0.1)
    model.train()(patches())  # running statistics other than the initial ones
    save_encoder(model, tmp_path / "encoder.pt", arm="ags", crop=28)
    model.eval()
    images = patches(seed=1)
    network, extra = load_encoder(tmp_path / "encoder.pt")
    assert not network.training
    assert extra == {"arm": "ags", "crop": 28}
    assert network(images).shape == (6, features)
    with torch.no_grad():
        torch.testing.assert_close(network(images), model.encoder(images), rtol=0, atol=0)
        whole, _ = load_encoder(tmp_path / "encoder.pt", level="projector")
        assert whole(images).shape == (6, 8)
        torch.testing.assert_close(whole(images), model(images), rtol=0, atol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.pt"]


def test_colours_are_standardised_by_the_buffers():
    encoder = Encoder("small").eval()
    images = patches()
    with torch.no_grad():
        expected = encoder(images)
        shift, width = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), 3.0
        encoder.mean.mul_(width).add_(shift)
        encoder.std.mul_(width)
        torch.testing.assert_close(encoder(images * width + shift), expected, rtol=1e-3, atol=1e-4)


def test_the_projector_of_the_paper_has_two_layers_and_no_batch_norm():
    kinds = [type(layer).__name__ for layer in projector(512, 512, 512, batch_norm=False)]
    assert kinds == ["Linear", "ReLU", "Linear"]
    assert sum(p.numel() for p in projector(512, 512, 512, batch_norm=False).parameters()) == 525312


def test_an_unknown_encoder_is_refused():
    with pytest.raises(UserError, match=f"encoder must be one of {', '.join(ENCODERS)}.*vgg"):
        Encoder("vgg")


def no_encoder(kind, path):
    """A file that is none of ours."""
    settings = {"encoder": "small", "hidden": 16, "outputs": 8, "batch_norm": False}
    content = {
        "tensor": torch.zeros(3),
        "list": [1, 2],
        "other dict": {"state_dict": {}},
        "other settings": {"settings": {"depth": 3}, "state": {}, "extra": {}},
        "other weights": {"settings": settings, "state": {"a": torch.zeros(1)}, "extra": {}},
        "no extra": {"settings": settings, "state": pretrained().state_dict()},
        "class": torch.nn.Linear(2, 2),  # arbitrary objects are never unpickled
    }
    if kind in content:
        torch.save(content[kind], path)
    elif kind == "truncated":
        save_encoder(pretrained(), path)
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.write_bytes(
            {"empty": b"", "random": bytes(range(256)) * 20, "text": b"abc" * 99}[kind]
        )


@pytest.mark.filterwarnings("default")  # torch comments on what it is made to read
@pytest.mark.parametrize(
    "kind",
    [
        *("tensor", "list", "other dict", "other settings", "other weights", "no extra", "class"),
        *("truncated", "empty", "random", "text"),
    ],
)
def test_a_file_that_is_no_encoder_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "encoder.pt"
    no_encoder(kind, path)
    with pytest.raises(UserError, match=r"encoder\.pt must be an encoder written by") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


def test_a_missing_encoder_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"Found none; run `pretrain` first"):
        load_encoder(tmp_path / "encoder.pt")
