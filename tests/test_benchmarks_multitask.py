"""benchmarks/multitask.py: its data, formulas and choices, its steps beside the wrapper, and a quick run."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import agsurgery
from agsurgery import GradientSurgery
from benchmarks import _multitask_data as data
from benchmarks import multitask
from benchmarks._multitask_data import Examples, Problem, Task
from benchmarks.multitask import METHODS, Trial

CPU = torch.device("cpu")


def toy(examples: int = 40) -> Problem:
    """Random numbers with all kinds of tasks, one of them asked about half of the examples."""
    generator = torch.Generator().manual_seed(0)

    def pool() -> Examples:
        inputs = torch.randn(examples, 5, generator=generator)
        classes = torch.randint(3, (examples, 2), generator=generator).float()
        classes[::2, 1] = data.NOT_ASKED
        number = inputs[:, :1] * 3 + 0.1 * torch.randn(examples, 1, generator=generator)
        return Examples(inputs, torch.cat([classes, number], 1), torch.zeros(examples, 1))

    tasks = (Task("a", 3), Task("b", 3), Task("c"))
    return Problem("Toy", tasks, pool(), pool(), pool(), ((1.0, 0.5, 0.1), (0.5, 1.0, 0.1)), 8)


# -- steps ----------------------------------------------------------------------------------------------


def modules_of(networks: multitask.Networks, run: int, tasks: int) -> tuple[nn.Module, list]:
    """One of the networks, as torch has it."""
    pairs = [*zip(networks.trunk[::2], networks.trunk[1::2], strict=True), *networks.heads]
    linears = []
    for weight, bias in pairs:
        linear = nn.Linear(*weight.shape[1:])
        linear.weight.data, linear.bias.data = weight[run].detach().T.clone(), bias[run, 0].clone()
        linears.append(linear)
    hidden, heads = linears[:-tasks], linears[-tasks:]
    return nn.Sequential(*(m for linear in hidden for m in (linear, nn.ReLU()))), heads


@pytest.mark.parametrize(
    "name", ["AGS", "CAGrad", "Sum", "weighted sum", "GradVac", "UW", "DWA", "FAMO", "GradDrop"]
)
def test_steps_are_those_of_the_wrapper(name):
    """Two runs at once, each against GradientSurgery around Adam, with batches of the same seed."""
    problem, entry, seeds, steps = toy(), METHODS[name], [3, 4], 12
    weights = [None, None] if name != "weighted sum" else list(problem.weightings)
    trials = [Trial(1e-2, weights[0]), Trial(5e-3, weights[1])]
    trained = multitask.train(problem, entry, trials, seeds, steps).networks
    for run, (trial, seed) in enumerate(zip(trials, seeds, strict=True)):
        source = torch.Generator().manual_seed(seed)
        start = multitask.Networks((5, *multitask.HIDDEN), problem.tasks, [source], CPU)
        trunk, heads = modules_of(start, 0, 3)
        [method] = multitask.instances(entry, [trial], [seed])
        parameters = [p for module in (trunk, *heads) for p in module.parameters()]
        adam = torch.optim.Adam(parameters, lr=trial.rate)
        optimizer = GradientSurgery(adam, method, heads="own")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.cat([torch.randperm(40, generator=source) for _ in range(3)]).view(-1, 8)
        for step in range(steps):
            inputs, targets = problem.train.inputs[order[step]], problem.train.targets[order[step]]

            def losses(inputs=inputs, targets=targets, trunk=trunk, heads=heads) -> list:
                outputs = [head(trunk(inputs)) for head in heads]
                asked = targets[:, 1] >= 0
                return [
                    F.cross_entropy(outputs[0], targets[:, 0].long()),
                    F.cross_entropy(outputs[1][asked], targets[asked, 1].long()),
                    F.mse_loss(outputs[2].squeeze(1), targets[:, 2]),
                ]

            optimizer.zero_grad()
            optimizer.backward(losses())
            optimizer.step()
            schedule.step()
            if isinstance(method, agsurgery.DWA) and step % 5 == 4:
                method.end_epoch()
            if isinstance(method, agsurgery.FAMO):
                method.update(losses())
        found_trunk, found_heads = modules_of(trained, run, 3)
        found = [p for module in (found_trunk, *found_heads) for p in module.parameters()]
        begun_trunk, begun_heads = modules_of(start, 0, 3)
        begun = [p for module in (begun_trunk, *begun_heads) for p in module.parameters()]
        for ours, theirs, before in zip(found, parameters, begun, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
            assert (theirs - before).abs().max() > 5e-3
