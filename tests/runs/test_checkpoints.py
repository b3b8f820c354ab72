"""Checkpoints are complete or absent."""

import copy
import itertools

import pytest
import torch
from accelerate import Accelerator

from models.loading import load_unet
from optimization.optimizers import load_optimizer_state
from runs.checkpoints import (
    checkpoint_step,
    complete_checkpoints,
    find_checkpoint,
    foreign_checkpoints,
    load_training_state,
    remove_later_checkpoints,
    remove_oldest_checkpoints,
    save_checkpoint,
)
from runtime.errors import UserError, WorkError
from tiny_model import tiny_unet

RECORD = {"trained": "UNet", "fingerprint": "f"}


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def saving(unet):
    return lambda part: unet.save_pretrained(part / "unet")


@pytest.fixture
def run(tmp_path, unet):
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, step, RECORD, saving(unet), {"optimizer": {"rate": step}, "scaler": None})
    return tmp_path


def test_a_checkpoint_is_read_back_as_it_was_written(run, unet):
    checkpoint = run / "checkpoint-4"
    assert checkpoint_step(checkpoint) == 4 and load_training_state(checkpoint)["optimizer"] == {"rate": 4}
    loaded = load_unet(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in unet.state_dict().items())


def test_the_latest_checkpoint_has_the_highest_step_and_not_the_last_name(run):
    assert find_checkpoint("latest", run, "f")[0].name == "checkpoint-10"
    assert find_checkpoint(None, run, "f")[0].name == "checkpoint-10"


def test_an_incomplete_checkpoint_is_never_used(run):
    weights = run / "checkpoint-10" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run / "checkpoint-4" / "manifest.json").unlink()
    found, notes = find_checkpoint("latest", run, "f")
    assert found.name == "checkpoint-2"
    assert any("checkpoint-10 cannot be used (unet/diffusion_pytorch_model.safetensors has" in note for note in notes)
    assert any("checkpoint-4 cannot be used (no readable manifest.json)" in note for note in notes)
    with pytest.raises(UserError, match="checkpoint-10 .*: .* of .* bytes"):
        find_checkpoint("checkpoint-10", run, "f")


def test_folders_with_similar_names_are_no_checkpoints(run):
    (run / "checkpoint-best").mkdir()
    (run / ".partial-12").mkdir()
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


def test_a_checkpoint_is_found_by_name_or_path_and_a_missing_one_is_refused(run, tmp_path_factory):
    assert find_checkpoint("checkpoint-4", run, "f") == (run / "checkpoint-4", [])
    elsewhere = tmp_path_factory.mktemp("other")
    assert find_checkpoint(str(run / "checkpoint-2"), elsewhere, "f") == (run / "checkpoint-2", [])
    with pytest.raises(UserError, match="checkpoint-3.*checkpoint-2, checkpoint-4, checkpoint-10"):
        find_checkpoint("checkpoint-3", run, "f")


def test_without_checkpoints_a_run_starts_at_step_0(tmp_path):
    assert find_checkpoint("latest", tmp_path, "f") == (None, [])


@pytest.mark.parametrize("limit", [None, 0])
def test_without_a_limit_all_checkpoints_stay(run, limit):
    remove_oldest_checkpoints(run, limit, keep=set())
    assert len(complete_checkpoints(run)) == 3


def test_the_oldest_checkpoints_beyond_the_limit_are_removed(run):
    remove_oldest_checkpoints(run, 2, keep=set())
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_the_best_checkpoint_stays_however_old_it_is(run):
    remove_oldest_checkpoints(run, 1, keep={2})
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-10"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_failed_write_keeps_the_earlier_checkpoints_and_says_what_is_needed(run, unet, error):
    def failing(part):
        saving(unet)(part)
        raise error

    with pytest.raises(WorkError, match=r"checkpoint-12 .*needs about .* [kM]B, .* GB were free .*: checkpoint-10"):
        save_checkpoint(run, 12, RECORD, failing, {})
    assert not list(run.glob(".partial-*"))
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


def test_a_flipped_bit_is_found(run):
    state = run / "checkpoint-10" / "training_state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 4
    state.write_bytes(content)
    found, [note] = find_checkpoint("latest", run, "f")
    assert found.name == "checkpoint-4" and "training_state.pt is damaged" in note
    with pytest.raises(UserError, match=r"checkpoint-10.*: training_state\.pt is damaged"):
        find_checkpoint("checkpoint-10", run, "f")


def test_a_checkpoint_without_its_manifest_is_an_error(run, unet, monkeypatch):
    def crippled(source, target):
        (source / "manifest.json").unlink()
        source.rename(target)

    monkeypatch.setattr("runs.checkpoints.os.replace", crippled)
    with pytest.raises(WorkError, match="checkpoint-12 .*no readable manifest"):
        save_checkpoint(run, 12, RECORD, saving(unet), {})
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


def test_a_training_state_that_would_run_code_is_not_loaded(run):
    class Harmful:
        def __reduce__(self):
            return (open, (str(run / "made"), "w"))

    torch.save({"optimizer": Harmful()}, run / "checkpoint-10" / "training_state.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        load_training_state(run / "checkpoint-10")
    assert not (run / "made").exists()


def test_checkpoints_of_another_run_are_neither_used_nor_removed(run):
    (run / "checkpoint-7").mkdir()  # another program's
    found, notes = find_checkpoint("latest", run, "g")
    assert found is None and notes == [
        "checkpoint-10 is of another run: not used",
        "checkpoint-7 cannot be used (no readable manifest.json)",
        "checkpoint-4 is of another run: not used",
        "checkpoint-2 is of another run: not used",
    ]
    assert [path.name for path in foreign_checkpoints(run, "f", own_folder=False)] == ["checkpoint-7"]
    assert (
        not foreign_checkpoints(run, "f", own_folder=True) and len(foreign_checkpoints(run, "g", own_folder=True)) == 3
    )
    remove_later_checkpoints(run, 0, "g")
    assert len(list(run.glob("checkpoint-*"))) == 4


def test_checkpoints_after_the_step_that_the_run_resumes_from_are_removed(run):
    (run / ".partial-12").mkdir()
    remove_later_checkpoints(run, 4, "f")
    assert not (run / ".partial-12").exists()
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("layouts", list(itertools.permutations((torch.channels_last, torch.contiguous_format))))
def test_the_optimizers_averages_take_the_memory_layout_of_the_weights(layouts):
    """PyTorch's fused AdamW silently mixes up weights, gradients and averages of unlike layouts."""

    def step(optimizer, weight, seed):
        generator = torch.Generator().manual_seed(seed)
        weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator))
        optimizer.step()

    accelerator = Accelerator(cpu=True)
    first, again = (torch.nn.Parameter(torch.ones(4, 3, 3, 3).to(memory_format=layout)) for layout in layouts)
    optimizer, resumed = (accelerator.prepare(torch.optim.AdamW([w], lr=0.1, fused=True)) for w in (first, again))
    step(optimizer, first, 0)
    again.data.copy_(first.data)
    load_optimizer_state(resumed, copy.deepcopy(optimizer.state_dict()))
    for taken, weight in ((optimizer, first), (resumed, again)):
        step(taken, weight, 1)
    assert torch.equal(first, again)


def test_the_state_of_another_optimizer_is_restored_unchanged():
    class EightBit(torch.optim.SGD):
        """Keeps, as bitsandbytes does, a number and bytes in an order of its own."""

    weight = torch.nn.Parameter(torch.ones(4, 3, 3, 3).to(memory_format=torch.channels_last))
    accelerator = Accelerator(cpu=True)
    saved = accelerator.prepare(EightBit([weight], lr=0.1))
    codes = torch.arange(108, dtype=torch.float32).view(4, 3, 3, 3)
    saved.state[weight].update(step=3, state1=codes)
    resumed = accelerator.prepare(EightBit([weight], lr=0.1))
    load_optimizer_state(resumed, copy.deepcopy(saved.state_dict()))
    assert resumed.state[weight]["step"] == 3 and resumed.state[weight]["state1"].is_contiguous()
