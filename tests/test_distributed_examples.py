"""The examples for several processes, started as their first lines say, come to what one process comes to."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from agsurgery import AGS, GradientSurgery

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "integrations"


def _printed(example: str) -> list[list[float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / example)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        # DDP keeps its gloo group alive after destroy_process_group, with torch alone as well (2.13). When the
        # interpreter ends, the group's threads abort some runs (2 of 32 were seen), after all work is done.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    # In older versions of torch gloo announces its connections there, from both processes at once.
    lines = [line for line in done.stdout.splitlines() if re.fullmatch(r"[-+.e\d ]+", line)]
    return [[float(word) for word in line.split()] for line in lines]


def _in_one_process(epochs: int = 10) -> list[float]:
    """What `ddp.py` trains, on whole batches and without a group."""
    example = runpy.run_path(str(FOLDER / "ddp.py"), run_name="example")
    torch.manual_seed(0)
    model = example["Model"]()
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.05), AGS())
    for _ in range(epochs):
        for x, *targets in DataLoader(example["dataset"](), batch_size=example["BATCH"]):
            outputs = model(x)
            losses = {
                name: (output - target).square().mean()
                for (name, output), target in zip(outputs.items(), targets, strict=True)
            }
            optimizer.zero_grad()
            report = optimizer.backward(losses)
            optimizer.step()
    return report.losses.tolist()


def test_ddp_trains_as_one_process_does():
    # float32, 80 steps.
    assert _printed("ddp.py") == [pytest.approx(_in_one_process(), rel=1e-3)]


def test_fsdp_goes_on_from_a_checkpoint_as_if_nothing_had_happened():
    straight, resumed = _printed("fsdp2.py")
    assert len(straight) == 2
    assert resumed == straight


def test_examples_say_how_they_are_started():
    for example in ("ddp.py", "fsdp2.py"):
        text = (FOLDER / example).read_text(encoding="utf-8")
        assert f"torchrun --nproc-per-node 2 examples/integrations/{example}" in text
