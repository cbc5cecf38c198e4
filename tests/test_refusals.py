"""Everything that is refused: what was asked, the kind of error, and what its message says to do.

(Arguments of the methods are refused in the tests of the methods, a model compiled for one backward pass in
`test_integrations_torch.py`, changed gradients in `test_accumulation.py`.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import agsurgery
from agsurgery import (
    AGS,
    FAMO,
    UW,
    Fixed,
    GradDrop,
    GradientSurgery,
    UPGrad,
    unwrap,
)
from tests._optimizer_cases import losses, make

Case = tuple[Callable[[], Any], type[Exception], str]

# -- what the rows work on -------------------------------------------------------------------------


def leaf(size: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([leaf()], lr=0.1)


def wrapped(method: Any = None, **options: Any) -> GradientSurgery:
    return GradientSurgery(sgd(), method, **options)


def call(build: Callable[[nn.Parameter], Any], **options: Any) -> Callable[[], Any]:
    """`backward` on what `build` makes of one parameter."""

    def run() -> Any:
        weight = leaf()
        return agsurgery.backward(build(weight), [weight], **options)

    return run


def pair(weight: Tensor) -> list[Tensor]:
    return [weight.sum(), weight.square().sum()]


def step_of(
    build: Callable[[nn.Module], Any] = losses, method: Any = "pcgrad", **options: Any
) -> Callable[[], Any]:
    """A step of a wrapper with these options."""

    def run() -> Any:
        model, optimizer = make("sgd", method, **options)
        return optimizer.backward(build(model))

    return run


def after(
    *actions: Callable[[Any, GradientSurgery], Any], method: Any = "pcgrad", **options: Any
) -> Callable[[], Any]:
    """Some calls on one wrapper, one after the other."""

    def run() -> None:
        model, optimizer = make("sgd", method, **options)
        for action in actions:
            action(model, optimizer)

    return run


def take(model: Any, optimizer: GradientSurgery) -> None:
    with optimizer.task("a"):
        losses(model)[0].backward()


def hold(model: Any, optimizer: GradientSurgery) -> None:
    optimizer.backward(losses(model), combine=False)


def backward(model: Any, optimizer: GradientSurgery) -> None:
    optimizer.backward(losses(model))


def with_hook(attribute: str, part: str = "trunk") -> Callable[[], Any]:
    def run() -> None:
        model, optimizer = make("sgd")
        parameter = model.get_parameter(f"{part}.weight")
        if attribute == "in backward":
            parameter._in_backward_optimizers = []
        else:
            parameter.register_post_accumulate_grad_hook(lambda parameter: None)
        optimizer.backward(losses(model))

    return run


def reentrant(weight: Tensor) -> Tensor:
    return checkpoint(lambda w: w.square().sum(), weight, use_reentrant=True)


def through_features(what: str) -> Callable[[], Any]:
    def run() -> Any:
        weight, second = leaf(), leaf()
        features = weight * second
        other = weight * 3
        terms = [features.sum(), features.square().sum()]
        given: Any = {
            "none": [],
            "number": [3.0],
            "leaf": weight,
            "detached": features.detach(),
            "another": other,
            "around": features,
        }[what]
        if what == "around":
            terms = [features.sum() + weight.sum(), features.square().sum() - weight.sum()]
        level = "features" if what == "around" else "parameters"
        return agsurgery.backward(terms, [weight, second], features=given, level=level)

    return run


def partition(build: Callable[[nn.Parameter], Any]) -> Callable[[], Any]:
    def run() -> Any:
        weight = leaf()
        return agsurgery.backward(pair(weight), [weight], granularity=build(weight))

    return run


def famo(names: list[str] | None) -> Callable[[], Any]:
    def run() -> None:
        method = FAMO()
        model, optimizer = make("sgd", method)
        if names is not None:
            optimizer.backward(dict(zip(names, losses(model), strict=True)))
        method.update({"a": torch.ones(()), "z": torch.ones(())})

    return run


def frozen(scaler: torch.amp.GradScaler | None) -> None:
    model, optimizer = make("sgd")
    model.requires_grad_(False)
    x = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    optimizer.backward([output.sum() for output in model(x)], scaler=scaler)


def freed() -> None:
    model, optimizer = make("sgd")
    terms = losses(model)
    optimizer.backward(terms)
    optimizer.backward(terms)


def nonsense_from_hook() -> None:
    optimizer = wrapped()
    optimizer.register_step_pre_hook(lambda *_: "nonsense")
    optimizer.step()


NO_GRAPH = [torch.ones(()), torch.ones(())]

# -- the table -------------------------------------------------------------------------------------

CONSTRUCTION: dict[str, Case] = {
    "optimizer class": (lambda: GradientSurgery(torch.optim.SGD), TypeError, "the class SGD"),
    "plain object": (lambda: GradientSurgery(object()), TypeError, "instance of torch.optim"),
    "parameters": (lambda: GradientSurgery([leaf()]), TypeError, "Got list"),
    "None": (lambda: GradientSurgery(None), TypeError, "Got NoneType"),
    "a wrapper": (lambda: GradientSurgery(wrapped()), TypeError, "Wrap its `base_optimizer`"),
    "method name": (lambda: wrapped("agz"), ValueError, "'pcgrad'.*Got 'agz'"),
    "method class": (lambda: wrapped(AGS), TypeError, r"write AGS\(\)"),
    "method number": (lambda: wrapped(3), TypeError, "Got int"),
    "positional option": (lambda: GradientSurgery(sgd(), "ags", "own"), TypeError, "positional"),
    "heads": (lambda: wrapped(heads="mine"), ValueError, "`heads`.*None. Got 'mine'"),
    "outside": (lambda: wrapped(outside="x"), ValueError, "\"ignore\". Got 'x'"),
    "engine": (lambda: wrapped(engine="fast"), ValueError, "\"reweight\". Got 'fast'"),
    "accumulation": (lambda: wrapped(accumulation=2), ValueError, '"tasks". Got 2'),
    "every zero": (lambda: wrapped(every=0), ValueError, "integer >= 1. Got 0"),
    "every True": (lambda: wrapped(every=True), ValueError, "integer >= 1. Got True"),
    "buffer": (lambda: wrapped(buffer_dtype="bf16"), TypeError, "`torch.bfloat16`. Got 'bf16'"),
    "integers": (lambda: wrapped(buffer_dtype=torch.int8), ValueError, "floating point dtype"),
    "shared module": (lambda: wrapped(shared=nn.Linear(2, 2)), TypeError, "such as `model.param"),
    "shared names": (
        lambda: wrapped(shared=nn.Linear(2, 2).named_parameters()),
        TypeError,
        r"`shared\[0\]` must be a tensor. Got tuple",
    ),
    "granularity": (lambda: wrapped(granularity="layer"), ValueError, "Got 'layer'"),
    "weightless heads": (
        lambda: wrapped(GradDrop(), heads="weighted"),
        ValueError,
        '`heads` must be "own"',
    ),
    "weightless lean": (lambda: wrapped(GradDrop(), engine="lean"), ValueError, "all coordinates"),
    "losses every": (lambda: wrapped(UW(), every=2), ValueError, "nothing to save"),
    "losses blocks": (lambda: wrapped(UW(), granularity="group"), ValueError, 'must be "global"'),
    "losses tasks": (
        lambda: wrapped(UW(), accumulation="tasks"),
        ValueError,
        '`accumulation` must be "gradients"',
    ),
    "lean tasks": (
        lambda: wrapped(engine="lean", accumulation="tasks"),
        ValueError,
        'must be "grad" or "accumulate" and `every` 1. Got engine="lean"',
    ),
    "every tasks": (lambda: wrapped(every=3, accumulation="tasks"), ValueError, "every=3"),
    "heads in blocks": (
        lambda: wrapped(granularity="group", heads="weighted"),
        ValueError,
        "Each block has its own weights",
    ),
    "lean blocks": (
        lambda: wrapped(granularity="group", engine="lean"),
        ValueError,
        "one weight for each task",
    ),
}

LOSSES: dict[str, Case] = {
    "vector": (call(lambda w: [w.square()]), ValueError, r"must be a scalar. Got shape \(3,\)"),
    "matrix": (call(lambda w: torch.ones(2, 2)), ValueError, r"must have shape \(K,\)"),
    "number": (call(lambda w: [w.sum(), 0.0]), TypeError, r"`torch.zeros\(\(\)\)` or leave it out"),
    "none": (call(lambda w: []), ValueError, "at least one loss"),
    "empty tensor": (call(lambda w: w[:0]), ValueError, "K >= 1"),
    "one scalar": (call(lambda w: w.sum()), ValueError, r"`loss.unsqueeze\(0\)` for a single one"),
    "generator": (call(lambda w: (x for x in pair(w))), TypeError, "Got generator"),
    "integer": (call(lambda w: [torch.tensor(1)]), TypeError, "real floating point"),
    "complex": (call(lambda w: [w.sum() * 1j]), TypeError, "Got torch.complex64"),
    "same names": (
        call(lambda w: {1: w.sum(), "1": w.sum()}),
        ValueError,
        "must differ as text",
    ),
    "no graph": (call(lambda w: NO_GRAPH), RuntimeError, r"under `torch.no_grad\(\)`, or detached"),
    "unreached": (
        call(lambda w: [w.sum(), leaf().sum()]),
        ValueError,
        "task '1' must reach at least one.*Give the optimizer the parameters",
    ),
    "unreached by engine accumulate": (
        call(lambda w: [reentrant(w), leaf().sum()]),
        ValueError,
        "task '1' must reach at least one.*left no gradient",
    ),
    "outside": (
        call(lambda w: [(w * leaf()).sum(), w.sum()]),
        ValueError,
        r'Add them, freeze them.*outside="ignore"',
    ),
    "frozen": (lambda: frozen(None), ValueError, "must reach at least one of the parameters"),
    "frozen, scaled": (
        lambda: frozen(torch.amp.GradScaler("cpu")),
        ValueError,
        "must reach at least one of the parameters",
    ),
    "freed graph": (freed, RuntimeError, "second time"),
    "preference": (
        step_of(lambda m: dict(zip("wxyz", losses(m), strict=True)), UPGrad(preference={"a": 1.0})),
        ValueError,
        r"none for \['w', 'x', 'y', 'z'\]",
    ),
    "numbers of weights": (step_of(method=Fixed([1.0, 2.0])), ValueError, "Got 2 for 4 tasks"),
    "FAMO without backward": (famo(None), RuntimeError, "must follow a `backward`"),
    "FAMO other tasks": (famo(list("abcd")), ValueError, r"those of the last.*\['a', 'z'\]"),
}

PARAMETERS: dict[str, Case] = {
    "module": (
        lambda: agsurgery.backward([leaf().sum()], nn.Linear(2, 2)),
        TypeError,
        r"such as `model.parameters\(\)`. Got Linear",
    ),
    "not a leaf": (
        lambda: agsurgery.backward([leaf().sum()], [leaf() * 2]),
        ValueError,
        "pass the parameters it was computed from",
    ),
    "not a tensor": (
        lambda: agsurgery.backward([leaf().sum()], ["weight"]),
        TypeError,
        "must be a tensor. Got str",
    ),
    "reentrant without parameters": (
        lambda: agsurgery.backward([reentrant(leaf()), leaf().sum()]),
        ValueError,
        "use_reentrant=False",
    ),
    "accumulate without parameters": (
        lambda: agsurgery.backward(pair(leaf()), engine="accumulate"),
        ValueError,
        "Pass `params`",
    ),
    "lean through a reentrant checkpoint": (
        call(lambda w: [reentrant(w), w.sum()], engine="lean"),
        ValueError,
        "use_reentrant=False",
    ),
    "reweighted through a reentrant checkpoint": (
        call(lambda w: [reentrant(w), w.sum()], method=UW(), heads="own"),
        RuntimeError,
        'heads="weighted"',
    ),
    "group without optimizer": (
        call(pair, granularity="group"),
        ValueError,
        "Use `GradientSurgery`",
    ),
    "partition of a parameter": (partition(lambda w: w), TypeError, "Got Parameter"),
    "partition of a module": (partition(lambda w: nn.Linear(2, 2)), TypeError, "Got Linear"),
    "partition without lists": (partition(lambda w: [w]), TypeError, "list of lists.*Got Param"),
    "partition of a number": (partition(lambda w: 3), TypeError, "Got int"),
    "partition of text": (partition(lambda w: [["w"]]), TypeError, "must hold tensors. Got str"),
    "partition that overlaps": (
        partition(lambda w: {"a": [w], "b": [w]}),
        ValueError,
        "must be in one block.*'a' and 'b'",
    ),
    "empty partition": (partition(lambda w: []), ValueError, "at least one block"),
    "in backward": (with_hook("in backward"), RuntimeError, "in the backward pass.*Remove it"),
    "post-accumulate": (with_hook("post"), RuntimeError, 'Pass `engine="reweight"`'),
    "post-accumulate of a head": (with_hook("post", "heads.1"), RuntimeError, "act on `.grad`"),
}

FEATURES: dict[str, Case] = {
    "none": (through_features("none"), ValueError, "at least one tensor"),
    "number": (through_features("number"), TypeError, "Got float"),
    "leaf": (through_features("leaf"), ValueError, "not detached"),
    "detached": (through_features("detached"), ValueError, "not detached"),
    "another": (through_features("another"), ValueError, "from the same forward pass"),
    "around": (through_features("around"), ValueError, "reached around them"),
    "level alone": (call(pair, level="features"), ValueError, "needs `features="),
    "unknown level": (call(pair, level="layers"), ValueError, "Got 'layers'"),
    "through accumulate": (
        lambda: (lambda w: agsurgery.backward(pair(w * 2), [w], engine="accumulate", features=w))(
            leaf()
        ),
        ValueError,
        "not detached",
    ),
}

ORDER: dict[str, Case] = {
    "step before combine": (
        after(take, lambda m, o: o.step()),
        RuntimeError,
        r"\['a'\] wait.*`combine\(\)` before `step\(\)`, or `zero_grad\(\)`",
    ),
    "step before the last micro-batch": (
        after(hold, lambda m, o: o.step()),
        RuntimeError,
        r"wait to be combined. Call `combine\(\)` before",
    ),
    "combine without tasks": (
        after(lambda m, o: o.combine()),
        RuntimeError,
        r"Compute them inside `with optimizer.task\(name\):`.*combine=False",
    ),
    "combine twice": (
        after(take, lambda m, o: o.combine(), lambda m, o: o.combine()),
        RuntimeError,
        "needs gradients",
    ),
    "combine twice, keeping tasks": (
        after(take, lambda m, o: o.combine(), lambda m, o: o.combine(), accumulation="tasks"),
        RuntimeError,
        "needs gradients",
    ),
    "backward after task": (after(take, backward), RuntimeError, r"Call `combine\(\)` first"),
    "task by losses": (after(take, method=UW()), RuntimeError, "Pass all losses to one `backward`"),
    "task lean": (after(take, engine="lean"), RuntimeError, '`task.*Got engine="lean"'),
    "task every": (after(take, every=2), RuntimeError, "every=2"),
    "hold by losses": (after(hold, method=UW()), RuntimeError, "Pass all losses to one `backward`"),
    "hold reweight": (
        after(hold, engine="reweight"),
        RuntimeError,
        '`combine=False` holds.*Got engine="reweight"',
    ),
    "hold every": (after(hold, every=2), RuntimeError, "every=2"),
    "nonsense from a step hook": (nonsense_from_hook, RuntimeError, "None or a tuple"),
    "unwrap None": (lambda: unwrap(None), TypeError, "Got NoneType"),
    "unwrap bare": (lambda: unwrap(sgd()), TypeError, "Got SGD"),
    "unwrap class": (lambda: unwrap(GradientSurgery), TypeError, "the class GradientSurgery"),
}


def hold_features(accumulation: str) -> None:
    weight = leaf()
    optimizer = GradientSurgery(torch.optim.SGD([weight], lr=0.1), accumulation=accumulation)
    features = weight * 2
    optimizer.backward(
        [features.sum(), -features.sum()],
        features=features,
        level="features",
        combine=accumulation == "tasks",
    )


ORDER |= {
    f"features differ ({mode})": (
        lambda mode=mode: hold_features(mode),
        ValueError,
        "Features differ from one micro-batch",
    )
    for mode in ("gradients", "tasks")
}

TABLE = {
    f"{part}: {name}": case
    for part, cases in {
        "construction": CONSTRUCTION,
        "losses": LOSSES,
        "parameters": PARAMETERS,
        "features": FEATURES,
        "order": ORDER,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", TABLE)
def test_what_cannot_be_is_refused_with_what_to_do(case):
    run, error, message = TABLE[case]
    with pytest.raises(error, match=re.compile(message, re.DOTALL)) as caught:
        run()
    assert type(caught.value) is error
    assert (
        str(caught.value).endswith((".", "`")) or "positional" in message or case.endswith("graph")
    )


@pytest.mark.parametrize("case", [name for name in TABLE if not name.startswith("construction")])
def test_a_refused_call_leaves_gradients_alone(case, monkeypatch):
    made: list[Any] = []
    original = torch.optim.SGD.__init__

    def remember(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        made.extend(p for p in params if isinstance(p, Tensor))
        original(self, params, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "__init__", remember)
    run, error, _ = TABLE[case]
    with pytest.raises(error):
        run()
    allowed = {"losses: freed graph", "losses: FAMO other tasks", "order: combine twice"}
    allowed.add("order: combine twice, keeping tasks")
    if case not in allowed:  # there an earlier call was right
        assert all(parameter.grad is None for parameter in made)
