"""Pretraining in several processes: who works on which patches, and that all end with the same weights."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from examples.slam_ags_cytology import distributed as module
from examples.slam_ags_cytology.distributed import World, join, surgery_options
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.networks import load_encoder
from examples.slam_ags_cytology.run import RunConfig, run
from examples.slam_ags_cytology.training import view_seed
from tests.cytology._tiny import draw_tiny


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_parts_of_a_batch_are_disjoint_complete_and_even(size):
    rows = np.random.default_rng(0).permutation(23)
    parts = [World(rank, size).part(rows) for rank in range(size)]
    assert sorted(np.concatenate(parts)) == [*range(23)]
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_alone_nothing_is_joined_and_no_option_is_passed(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("cpu") == (World(), "cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cpu") == (World(), "cpu")
    assert not torch.distributed.is_initialized()
    assert surgery_options(World()) == {}
    World().wait()


def test_processes_draw_different_views_and_the_first_draws_those_of_a_single_one():
    seeds = [view_seed(7, 3, rank) for rank in range(4)]
    assert len(set(seeds)) == 4
    assert seeds[0] == 1_000_003 * 7 + 3


def test_statistics_are_averaged_over_the_processes(monkeypatch):
    model = torch.nn.BatchNorm1d(3)
    model.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))

    def add_that_of_the_other(buffer):
        buffer += torch.full_like(buffer, 5.0)

    monkeypatch.setattr(module.distributed, "all_reduce", add_that_of_the_other)
    module.average_statistics(model, World(0, 2))
    assert model.running_mean.tolist() == [3.0, 3.5, 4.0]
    assert model.running_var.tolist() == [3.0, 3.0, 3.0]
    assert int(model.num_batches_tracked) == 0


def test_a_whole_run_is_refused_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="Only the pretrain step works in several processes"):
        run(RunConfig(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from examples.slam_ags_cytology import training
from examples.slam_ags_cytology.pretrain import PretrainConfig, pretrain
out, stop, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
original, calls, models = training.Training._step, [], []
def step(self, *arguments):
    calls.append(None)
    models.append(self.model)
    if len(calls) == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
training.Training._step = step
pretrain(PretrainConfig(out, **settings))
flat = torch.cat([value.detach().double().flatten() for value in models[-1].state_dict().values()])
whole = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(whole, flat)
assert torch.equal(whole[0], whole[1]), "the processes ended with different weights"
assert bool(flat.isfinite().all())
Path(out, f"steps-{os.environ['RANK']}").write_text(str(len(calls)))
torch.distributed.destroy_process_group()
"""

SETTINGS = {
    **{"arm": "ags", "patch": 32, "crop": 28, "epochs": 2, "batch": 16},
    **{"hidden": 16, "outputs": 8, "lr": 0.02},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_tiny(tmp_path_factory.mktemp("drawn"))


def launch(out, stop=0, **changes):
    script = out / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(script), str(out), str(stop), json.dumps({**SETTINGS, **changes})]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*launcher, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["ags", "simclr", "sil"])
def test_two_processes_end_with_the_same_weights(drawn, tmp_path, arm):
    out = shutil.copytree(drawn, tmp_path / "run")
    ended = launch(out, arm=arm)
    assert ended.returncode == 0, ended.stderr
    assert [(out / f"steps-{rank}").read_text() for rank in range(2)] == ["10", "10"]
    folder = out / "pretrain" / arm
    assert {path.name for path in folder.iterdir()} == {
        *("encoder.pt", "log.csv", "status.json", "config.json")
    }
    assert pd.read_csv(folder / "log.csv")["step"].tolist() == [*range(10)]
    assert len(list(out.glob("cells-32.npy"))) == 1


@pytest.mark.slow
def test_two_processes_that_were_killed_end_as_if_they_had_not_been(drawn, tmp_path):
    whole, out = (shutil.copytree(drawn, tmp_path / name) for name in ("whole", "killed"))
    assert launch(whole).returncode == 0
    assert launch(out, stop=8).returncode != 0
    assert (out / "pretrain" / "ags" / "checkpoint.pt").exists()
    ended = launch(out)
    assert ended.returncode == 0, ended.stderr
    assert "Continuing after epoch 1 of 2." in ended.stdout
    states = [
        load_encoder(folder / "pretrain" / "ags" / "encoder.pt", level="projector")[0].state_dict()
        for folder in (whole, out)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
