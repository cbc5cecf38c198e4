"""A user who checks types strictly sees those that the documentation promises, and is told of mistakes."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USER = """
from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

import torch
from torch import Tensor

from agsurgery import (
    AGS,
    CAGrad,
    ConflictMonitor,
    GradientSurgery,
    MonitorSummary,
    Replicas,
    SurgeryReport,
    UPGrad,
    backward,
    unwrap,
)


def inverse_norm(gramian: Tensor) -> Tensor:
    return gramian.diagonal().rsqrt()


class Remembering:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gramian: Tensor) -> Tensor:
        self.calls += 1
        return torch.ones_like(gramian.diagonal())


# What `method=` takes needs no name of ours.
methods: list[str | Callable[[Tensor], Tensor]] = [inverse_norm, Remembering(), AGS(), "upgrad"]

model = torch.nn.Linear(2, 2)
base = torch.optim.AdamW(model.parameters())
optimizer = GradientSurgery(base, AGS())
GradientSurgery(base)
GradientSurgery(base, "pcgrad", every=5, granularity="group", heads="own", tasks=["a", "b"])
GradientSurgery(base, methods[0])
GradientSurgery(base, inverse_norm, process_group=Replicas(agree="once"))
GradientSurgery(base, UPGrad(preference={"a": 1.0, "b": 2.0}), granularity={"all": [model.weight]})

outputs = model(torch.ones(3, 2))
losses = {"a": outputs[:, 0].sum(), "b": outputs[:, 1].sum()}
assert_type(optimizer.backward(losses), SurgeryReport)
assert_type(optimizer.backward(list(losses.values()), combine=True), SurgeryReport)
assert_type(optimizer.backward(torch.stack(list(losses.values()))), SurgeryReport)
last: bool = bool(torch.rand(()) > 0.5)
assert_type(optimizer.backward(losses, combine=last), "SurgeryReport | None")
assert_type(optimizer.combine(), SurgeryReport)
assert_type(optimizer.report, "SurgeryReport | None")
with optimizer.task("a"):
    losses["a"].backward()
assert_type(backward(losses, model.parameters(), "cagrad"), SurgeryReport)
assert_type(unwrap(optimizer), GradientSurgery)


def closure() -> float:
    return 1.0


assert_type(optimizer.step(), None)
assert_type(optimizer.step(closure), float)

schedulers: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
plain: torch.optim.Optimizer = optimizer

report = optimizer.backward(losses)
assert_type(report.tasks, tuple[str, ...])
assert_type(report.cosines, Tensor)
assert_type(report.first_order_change(0.1), Tensor)
assert_type(report.to_dict(), dict[str, float])
assert_type(AGS()(torch.eye(2)), Tensor)
monitor = ConflictMonitor()
monitor.update(report)
assert_type(monitor.to_dict(), dict[str, float])
assert_type(monitor.summary(), MonitorSummary)
assert_type(monitor.summary().answer, str)
Replicas(group=torch.distributed.group.WORLD)
scaler = torch.amp.GradScaler("cpu")
assert_type(backward(losses, scaler=scaler), SurgeryReport)

# Mistakes: `--strict` complains of an ignore that nothing needs.
GradientSurgery(model)  # type: ignore[arg-type]
GradientSurgery(base, heads="shared")  # type: ignore[arg-type]
GradientSurgery(base, engine="vmap")  # type: ignore[arg-type]
optimizer.backward(3.0)  # type: ignore[call-overload]
optimizer.backward(losses, combine="no")  # type: ignore[call-overload]
Replicas(group=3)  # type: ignore[arg-type]
AGS(2.0)  # type: ignore[call-arg]
CAGrad(rescale="cubic")  # type: ignore[arg-type]
"""


@pytest.mark.slow  # the stubs of torch take a minute
def test_a_script_of_a_user_passes_strict_type_checks(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    script = tmp_path / "user.py"
    script.write_text(USER, encoding="utf-8")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    options = ["--strict", f"--config-file={os.devnull}", f"--cache-dir={tmp_path / 'cache'}"]
    # As for an installed package, errors inside it are not reported.
    output, errors, status = api.run([*options, "--follow-imports=silent", str(script)])
    assert status == 0, output + errors
