"""The loops of `examples/integrations` train as a plain loop on full batches in full precision does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import examples.integrations
from agsurgery import AGS, GradientSurgery, GradVac, unwrap
from examples.integrations.two_tasks import TwoTasks, dataset
from tests._optimizer_cases import same

# What the frameworks say about workers, loggers and each other is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = 16
EPOCHS = 3
BFLOAT16: Callable[[], AbstractContextManager[Any]] = lambda: torch.autocast(  # noqa: E731
    "cpu", torch.bfloat16
)


def plain(
    epochs: int = EPOCHS,
    gamma: float = 0.9,
    each: str = "epoch",
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    method: Callable[[], Any] = AGS,
) -> tuple[TwoTasks, GradientSurgery]:
    """The same training without any framework."""
    model = TwoTasks()
    optimizer = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=0.01), method())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    for _ in range(epochs):
        for batch in DataLoader(dataset(), batch_size=BATCH):
            optimizer.zero_grad()
            with precision():
                losses = model(*batch)
            optimizer.backward(losses)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if each == "batch":
                scheduler.step()
        if each == "epoch":
            scheduler.step()
    return model, optimizer


def assert_trained_alike(model: nn.Module, reference: nn.Module, start: nn.Module) -> None:
    for one, two, before in zip(
        model.parameters(), reference.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert (two - before).abs().max() > 0.005  # 500 times what the comparison forgives


def test_clipping_and_the_scheduler_matter_here():
    model, optimizer = plain()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**EPOCHS)
    assert not same(model.parameters(), plain(gamma=1.0)[0].parameters())


def remembers() -> GradVac:
    """A method with a state that decides about the next steps, put in place of AGS where this must survive."""
    return GradVac(beta=0.3)


# -- Lightning -------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    module = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return module


def manual(parts: int, epochs: int = EPOCHS, **options: Any) -> Any:
    from examples.integrations.lightning_manual import train

    return train(epochs, accumulate=parts, batch=BATCH // parts, **options)


def automatic(parts: int, epochs: int = EPOCHS, **options: Any) -> Any:
    from examples.integrations.lightning_automatic import train

    options |= {"accumulate_grad_batches": parts}
    return train(epochs, batch=BATCH // parts, **options)


every_mode = pytest.mark.parametrize("mode", [manual, automatic])


@every_mode
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_lightning_trains_as_the_plain_loop_does(lightning, mode, parts):
    trainer = mode(parts)
    reference, optimizer = plain()
    assert_trained_alike(trainer.lightning_module.model, reference, TwoTasks())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        optimizer.param_groups[0]["lr"]
    )
    assert trainer.callback_metrics["conflict"] == optimizer.report.conflict


@every_mode
def test_lightning_mixed_precision_equals_autocast(lightning, mode):
    trainer = mode(1, precision="bf16-mixed")
    reference, _ = plain(precision=BFLOAT16)
    assert_trained_alike(trainer.lightning_module.model, reference, TwoTasks())
    exact, _ = plain()
    assert not same(exact.parameters(), reference.parameters())


@every_mode
@pytest.mark.parametrize("scale", [2.0**8, 2.0**40], ids=["fits", "too large"])
def test_lightning_scales_float16_gradients_and_clips_them_as_if_it_did_not(lightning, mode, scale):
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = mode(1, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    model = trainer.lightning_module.model
    if scale > 2.0**16:  # too much for float16: every step is skipped
        assert scaler.get_scale() == scale / 2 ** (EPOCHS * 64 // BATCH)
        assert same(model.parameters(), TwoTasks().parameters())
        return
    assert scaler.get_scale() == scale
    reference, _ = plain(precision=lambda: torch.autocast("cpu", torch.float16))
    assert_trained_alike(model, reference, TwoTasks())


@every_mode
def test_lightning_resumes_from_a_checkpoint(lightning, mode, tmp_path, monkeypatch):
    from examples.integrations import lightning_automatic, lightning_manual

    for module in (lightning_automatic, lightning_manual):
        monkeypatch.setattr(module, "AGS", remembers)
    trainer = mode(2, epochs=1)
    path = tmp_path / "first.ckpt"
    trainer.save_checkpoint(path)
    resumed = mode(2, ckpt_path=path)
    inner = unwrap(resumed.optimizers[0])
    model = resumed.lightning_module.model
    reference, optimizer = plain(method=remembers)
    assert_trained_alike(model, reference, TwoTasks())
    assert inner.state[model.trunk[0].weight]["step"] == EPOCHS * 64 // BATCH
    assert inner.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
    for name, value in optimizer.method.state().items():
        torch.testing.assert_close(inner.method.state()[name], value, rtol=1e-4, atol=1e-5)


# -- Accelerate ------------------------------------------------------------------------------------


@pytest.fixture
def loops() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    from examples.integrations.accelerate_loop import Loop

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()

    def make(parts: int, **options: Any) -> Any:
        return Loop(accumulate=parts, batch=BATCH // parts, cpu=True, **options)

    yield make
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accelerate_trains_as_the_plain_loop_does(loops, parts):
    loop = loops(parts)
    for _ in range(EPOCHS):
        loop.epoch()
    reference, optimizer = plain(gamma=0.99, each="batch")
    assert_trained_alike(loop.model, reference, TwoTasks())
    assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_accelerate_mixed_precision_equals_autocast(loops):
    loop = loops(1, mixed_precision="bf16")
    for _ in range(EPOCHS):
        loop.epoch()
    reference, _ = plain(gamma=0.99, each="batch", precision=BFLOAT16)
    assert_trained_alike(loop.model, reference, TwoTasks())


@pytest.mark.parametrize("scale", [2.0**8, 2.0**100], ids=["fits", "too large"])
def test_accelerate_scales_gradients_and_unscales_them_before_it_clips(loops, monkeypatch, scale):
    """Accelerate allows float16 on a GPU only, but its scaler and its patched `step` run anywhere."""
    from examples.integrations import accelerate_loop

    class Scaled(accelerate_loop.Accelerator):
        mixed_precision = "fp16"

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    monkeypatch.setattr(accelerate_loop, "Accelerator", Scaled)
    loop = loops(2)
    loop.accelerator.native_amp = True  # only now, so that the forward pass stays in full precision
    for _ in range(EPOCHS):
        loop.epoch()
    if scale > 2.0**64:  # products of such gradients overflow in float32: every step is skipped
        assert loop.optimizer.step_was_skipped
        assert same(loop.model.parameters(), TwoTasks().parameters())
        return
    reference, _ = plain(gamma=0.99, each="batch")
    assert_trained_alike(loop.model, reference, TwoTasks())


def test_accelerate_saves_and_loads(loops, tmp_path, monkeypatch):
    from examples.integrations import accelerate_loop

    monkeypatch.setattr(accelerate_loop, "AGS", remembers)
    first = loops(2)
    first.epoch()
    first.save(tmp_path)
    first.epoch()
    second = loops(2)
    second.load(tmp_path)
    assert unwrap(second.optimizer).method.state().keys() > {"tasks"}
    second.epoch()
    assert same(first.model.parameters(), second.model.parameters())
    assert first.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"]


def test_accelerate_needs_no_flag_when_the_wrapper_keeps_tasks(loops):
    """`step` and `zero_grad` of the prepared optimizer do nothing between two micro-batches."""
    loop = loops(4)
    model = TwoTasks()
    optimizer = loop.accelerator.prepare(
        GradientSurgery(torch.optim.AdamW(model.parameters(), lr=0.01), AGS(), accumulation="tasks")
    )
    for _ in range(EPOCHS):
        for batch in loop.loader:
            with loop.accelerator.accumulate(model):
                losses = {name: loss / 4 for name, loss in model(*batch).items()}
                unwrap(optimizer).backward(losses)
                if loop.accelerator.sync_gradients:
                    loop.accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    reference, _ = plain(gamma=1.0)
    assert_trained_alike(model, reference, TwoTasks())


# -- Hugging Face Trainer --------------------------------------------------------------------------


@pytest.fixture
def hugging_face() -> Any:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    from examples.integrations import hf_trainer

    return hf_trainer


def plain_bert(hugging_face: Any, steps: int) -> nn.Module:
    model = hugging_face.TwoTasks()
    optimizer = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-3), AGS())
    (batch,) = DataLoader(hugging_face.Sentences(), batch_size=32)
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(model(**batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@pytest.mark.parametrize("parts", [1, 4])
def test_hugging_face_trainer_trains_as_the_plain_loop_does(hugging_face, tmp_path, parts):
    trainer = hugging_face.trainer(
        tmp_path,
        batch=32 // parts,
        gradient_accumulation_steps=parts,
        lr_scheduler_type="constant",
    )
    losses = trainer.train().training_loss
    reference = plain_bert(hugging_face, steps=8)
    for (name, one), two, before in zip(
        trainer.model.named_parameters(),
        reference.parameters(),
        hugging_face.TwoTasks().parameters(),
        strict=True,
    ):
        assert not torch.equal(two, before), name
        # Adam turns the rounding of entries whose gradient is nearly zero into steps.
        assert (one - two).norm() < 0.02 * (two - before).norm() + 1e-5, name
    assert 0 < losses < 20


def test_hugging_face_trainer_resumes_from_a_checkpoint(hugging_face, tmp_path, monkeypatch):
    monkeypatch.setattr(hugging_face, "AGS", remembers)
    options = {"save_strategy": "steps", "save_steps": 4, "logging_strategy": "no"}
    whole = hugging_face.trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = hugging_face.trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, value in unwrap(whole.optimizer).method.state().items():
        assert torch.equal(unwrap(resumed.optimizer).method.state()[name], value)
    assert same(whole.model.parameters(), resumed.model.parameters())


def test_an_untouched_hugging_face_trainer_steps_the_wrapper_like_its_base(hugging_face, tmp_path):
    """Somebody else's Trainer that knows nothing of surgery still trains, on the plain sum."""
    from transformers import Trainer

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tasks = hugging_face.TwoTasks()

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            return {"loss": torch.stack(list(self.tasks(**inputs).values())).sum()}

    ends = []
    for wrap in (GradientSurgery, lambda base: base):
        template = hugging_face.trainer(tmp_path / str(len(ends)))
        model = Summed()
        trainer = Trainer(
            model,
            template.args,
            train_dataset=hugging_face.Sentences(),
            optimizers=(wrap(torch.optim.AdamW(model.parameters(), lr=1e-3)), None),
        )
        trainer.train()
        ends.append(list(model.parameters()))
    assert same(*ends)


def test_the_folder_of_examples_has_a_line_for_each_in_its_readme():
    folder = Path(examples.integrations.__file__).parent
    text = (folder / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert {name for name in names if f"({name})" not in text} == set()
