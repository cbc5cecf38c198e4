"""What the benchmark `needs` counts, against a count by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import needs
from examples.slam_ags_cytology.networks import Pretrained
from examples.slam_ags_cytology.pretrain_config import PretrainConfig

SMALL = PretrainConfig(Path(), arm="ags", crop=32, batch=8, hidden=24, outputs=16)


def forward_flop_by_hand(config):
    """Two operations for every weight and place of an output, over both views of the batch."""
    model = Pretrained(config.encoder, config.hidden, config.outputs, batch_norm=False)
    counted = []

    def add(layer, _, output):
        places = output.numel() // output.shape[1]  # of all channels at once
        counted.append(2 * layer.weight.numel() * places)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(add)
    with torch.no_grad():
        model(torch.rand(2 * config.batch, 3, config.crop, config.crop))
    return sum(counted)


def test_operations_of_a_forward_pass_are_those_of_its_layers():
    found = needs.count(SMALL)
    between = 2 * SMALL.batch**2 * SMALL.outputs  # cosines of the contrasted half with each other
    assert found["forward_flop"] == forward_flop_by_hand(SMALL) + between


def test_surgery_needs_a_pass_over_the_whole_batch_for_each_loss_unless_sides_are_apart():
    together, apart = (needs.count(replace(SMALL, statistics=s)) for s in ("shared", "views"))
    plain = needs.count(replace(SMALL, arm="sum"))
    assert together["forward_flop"] == apart["forward_flop"] == plain["forward_flop"]
    assert together["backward_flop"] == pytest.approx(2 * plain["backward_flop"], rel=0.01)
    assert apart["backward_flop"] == pytest.approx(plain["backward_flop"], rel=0.01)


def test_what_is_kept_grows_with_the_batch_and_the_rest_does_not():
    small, large = needs.count(SMALL), needs.count(replace(SMALL, batch=80))
    # Nearly ten times: the inputs of all layers; not ten times: the cosines, and the statistics of BatchNorm.
    assert large["activation_bytes"] == pytest.approx(10 * small["activation_bytes"], rel=0.01)
    model = Pretrained("small", SMALL.hidden, SMALL.outputs, batch_norm=False)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert small["weight_bytes"] == large["weight_bytes"] == weights
    assert small["state_bytes"] == 5 * weights  # momentum, step, and a gradient of each loss
    assert needs.count(replace(SMALL, arm="sum"))["state_bytes"] == 3 * weights


def test_hours_follow_from_steps_and_operations(tmp_path, capsys):
    out = tmp_path / "needs.json"
    small = ["--crop", "32", "--batch", "8", "--cells", "800", "--epochs", "3"]
    found = needs.main([*small, "--out", str(out)])
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert capsys.readouterr().out.splitlines()[-1] == found["answer"]
    assert [(row["arm"], row["statistics"]) for row in found["rows"]] == [*needs.CASES]
    many = found["rows"][1]["step_flop"]
    hours = needs.hours(many, 3, 800, 8)
    assert hours["10"] == pytest.approx(300 * many / 10e12 / 3600, abs=0.005)
