"""Non-finite losses are skipped before they touch the weights, named and counted; too many end the run."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from optimization import optimizers
from optimization.ema import NoEMA
from optimization.parameters import ModelParameters
from run_folder import rows, weights
from runtime.errors import WorkError
from training import train as training
from training.metrics import MetricsRow
from training.non_finite import NonFiniteSteps
from training.state import TrainState

USUAL = ["--learning_rate", 1e-3, "--seed", 0, "--train_batch_size", 2]


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(steps)` makes the loss of these steps (from 1) infinite."""

    def choose(*steps: int) -> None:
        taken, real = [0], training.diffusion_loss

        def spoiled(unet, objective, batch):
            taken[0] += 1
            losses = real(unet, objective, batch)
            return losses * float("inf") if taken[0] in steps else losses

        monkeypatch.setattr(training, "diffusion_loss", spoiled)

    return choose


def test_a_non_finite_step_is_named_skipped_and_counted(train_run, spoil, capsys):
    spoil(2)
    out = train_run("out", "--max_train_steps", 3, *USUAL)
    said = capsys.readouterr().out
    assert "step 2: " in said and " inf" in said and "11 (" in said
    assert [row["train_loss"] is None for row in rows(out)] == [False, True, False]
    assert json.loads((out / "run.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("precision", ["no", "bf16", "pure_bf16"])
def test_a_skipped_step_leaves_the_weights_as_they_were_and_the_average_clean(train_run, spoil, precision, optimizer):
    flags = [*USUAL, "--use_ema", "--checkpointing_steps", 1, "--lr_scheduler", "constant", "--optimizer", optimizer]
    spoil(2)
    out = train_run("out", "--max_train_steps", 3, "--mixed_precision", precision, *flags)
    before, after, later = (weights(out / f"checkpoint-{step}", "unet") for step in (1, 2, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in later.items())
    assert all(tensor.isfinite().all() for tensor in weights(out / "checkpoint-3", "unet_ema").values())


def make_state(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> TrainState:
    accelerator = Accelerator(cpu=True)
    parameters = ModelParameters(SimpleNamespace(parameters=lambda: [weight]))
    return TrainState(accelerator, None, None, None, parameters, accelerator.prepare(optimizer), NoEMA())


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_alone_leaves_weights_and_the_optimizers_state(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1, fused=True)
    state = make_state(optimizer, weight)

    def step(loss: float, gradient: float) -> list[torch.Tensor]:
        weight.grad = torch.full((3,), gradient)
        state.step(torch.tensor(loss), 1e9)
        return [tensor.clone() for tensor in (weight.detach(), *optimizer.state[weight].values())]

    good = step(1.0, 1.0)
    skipped = step(float("nan"), 1.0) if bad == "loss" else step(1.0, float("inf"))
    assert all(torch.equal(*pair) for pair in zip(good, skipped, strict=True))
    assert not torch.equal(step(1.0, 1.0)[0], good[0])


def test_a_non_finite_first_step_is_skipped_like_any_other(train_run, spoil, tiny_model):
    spoil(1)
    out = train_run("out", "--max_train_steps", 1, *USUAL)
    before, after = weights(tiny_model), weights(out)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_dry_run_names_a_non_finite_loss(train_run, spoil, capsys):
    spoil(1)
    train_run("out", "--max_train_steps", 3, *USUAL, "--dry_run")
    said = capsys.readouterr().out
    assert "step 1: " in said and " inf" in said


class NotFused(torch.optim.SGD):
    """An optimizer that knows nothing of non-finite gradients."""

    def __init__(self, parameters, lr, **adam):
        super().__init__(parameters, lr=lr, momentum=0.9, foreach=True)


class Operators(TorchDispatchMode):
    """Notes the name of every operator that runs."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_ema"],
        ["--mixed_precision", "bf16", "--use_ema"],
        ["--mixed_precision", "bf16", "--gradient_accumulation_steps", 2],
        ["--mixed_precision", "bf16", "--lora_rank", 2],
        ["--optimizer", "adafactor"],
        ["--optimizer", "adafactor", "--mixed_precision", "bf16"],
        ["--optimizer", "adafactor", "--mixed_precision", "pure_bf16"],
        ["--mixed_precision", "pure_bf16", "--use_ema"],
        ["--not_fused"],
    ],
)
def test_a_step_reads_no_value_from_the_device(train_run, monkeypatch, flags):
    if flags == ["--not_fused"]:
        monkeypatch.setattr(optimizers, "find_optimizer_class", lambda _: NotFused)
        flags = []
    operators, seen = Operators(), []
    real_step = training.train_step

    def watched(*arguments):
        operators.names.clear()
        result = real_step(*arguments)
        seen.append(list(operators.names))
        return result

    monkeypatch.setattr(training, "train_step", watched)
    with operators:
        train_run("out", "--max_train_steps", 3, *USUAL, *flags)
    assert len(seen) == 3 and all("aten.convolution_backward.default" in names for names in seen)
    assert not any("_local_scalar_dense" in name for names in seen for name in names)


def test_an_optimizer_that_is_not_fused_is_kept_from_non_finite_gradients_too():
    weight = torch.nn.Parameter(torch.ones(3))
    state = make_state(torch.optim.AdamW([weight], lr=1), weight)
    for loss, moved in ((1.0, True), (float("nan"), False), (1.0, True)):
        before = weight.detach().clone()
        weight.grad = loss * torch.ones(3)
        state.step(torch.tensor(loss), 1e9)
        assert torch.equal(weight, before) != moved
        assert weight.isfinite().all()


def test_steps_read_late_are_judged_in_order_and_one_non_finite_step_too_many_ends_the_run():
    judge = NonFiniteSteps(Accelerator(cpu=True), 2, lambda step: [f"{step}.png"])
    rows_read = [MetricsRow(step, float("nan") if step in (3, 7, 8) else 1.0, 1.0) for step in range(1, 11)]
    for row in rows_read[:7]:
        judge.mark_or_raise(row)
    with pytest.raises(WorkError, match=r"step 8: .*nan.*7\.png"):
        judge.mark_or_raise(rows_read[7])
    assert [row.skipped for row in rows_read[:7]] == [step in (3, 7) for step in range(1, 8)]


def test_too_many_in_a_row_end_the_run_and_the_last_checkpoint_is_good(train_run, spoil, tmp_path):
    spoil(3, 4, 6, 7, 8)
    flags = ["--max_train_steps", 9, *USUAL, "--checkpointing_steps", 2, "--max_bad_steps", 3]
    with pytest.raises(WorkError, match=r"step 8: .*3 .*--max_bad_steps"):
        train_run("out", *flags)
    assert len(rows(tmp_path / "out")) == 7
    checkpoint = weights(tmp_path / "out" / "checkpoint-6")
    assert all(tensor.isfinite().all() for tensor in checkpoint.values())
