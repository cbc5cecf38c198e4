"""Settings for all tests: reproducible, and gentle to a machine with two cores."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads would only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
