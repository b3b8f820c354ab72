"""Checkpoints are whole or absent."""

import pytest
import torch

from checkpoints import (
    complete_checkpoints,
    find_checkpoint,
    load_training_state,
    remove_later,
    save_checkpoint,
    step_of,
)
from errors import UserError
from models import load_unet
from tiny_model import tiny_unet


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def saving(unet):
    return lambda part: unet.save_pretrained(part / "unet")


@pytest.fixture
def run(tmp_path, unet):
    for step in (2, 4, 10):
        save_checkpoint(
            tmp_path, step, "UNet", saving(unet), {"optimizer": {"rate": step}, "scaler": None}, None, set()
        )
    return tmp_path


def test_a_checkpoint_is_read_back_as_it_was_written(run, unet):
    checkpoint = run / "checkpoint-4"
    assert step_of(checkpoint) == 4 and load_training_state(checkpoint)["optimizer"] == {"rate": 4}
    loaded = load_unet(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in unet.state_dict().items())


def test_the_latest_is_the_highest_step_not_the_last_name(run):
    assert find_checkpoint("latest", run).name == "checkpoint-10"
    assert find_checkpoint(None, run).name == "checkpoint-10"


def test_a_half_written_one_is_never_taken(run):
    weights = run / "checkpoint-10" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (run / "checkpoint-4" / "manifest.json").unlink()
    assert find_checkpoint("latest", run).name == "checkpoint-2"
    with pytest.raises(UserError, match="not complete"):
        find_checkpoint("checkpoint-10", run)


def test_what_only_looks_like_a_checkpoint_is_left_alone(run):
    (run / "checkpoint-best").mkdir()
    (run / ".partial-12").mkdir()
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


def test_one_is_named_by_name_or_by_path_and_a_missing_one_is_refused(run, tmp_path_factory):
    assert find_checkpoint("checkpoint-4", run) == run / "checkpoint-4"
    elsewhere = tmp_path_factory.mktemp("other")
    assert find_checkpoint(str(run / "checkpoint-2"), elsewhere) == run / "checkpoint-2"
    with pytest.raises(UserError, match="checkpoint-3.*checkpoint-2, checkpoint-4, checkpoint-10"):
        find_checkpoint("checkpoint-3", run)


def test_without_any_a_run_begins_at_the_start(tmp_path):
    assert find_checkpoint("latest", tmp_path) is None


def test_the_oldest_go_once_the_new_one_is_whole(run, unet):
    save_checkpoint(run, 12, "UNet", saving(unet), {}, limit=2, keep=set())
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-10", "checkpoint-12"]


def test_the_best_one_stays_however_old_it_is(run, unet):
    save_checkpoint(run, 12, "UNet", saving(unet), {}, limit=1, keep={4})
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-4", "checkpoint-12"]


def test_a_failed_write_leaves_the_others_and_no_new_one(run, unet):
    def failing(part):
        saving(unet)(part)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        save_checkpoint(run, 12, "UNet", failing, {}, limit=1, keep=set())
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]


def test_state_that_would_run_code_is_not_loaded(run):
    class Harmful:
        def __reduce__(self):
            return (open, (str(run / "made"), "w"))

    torch.save({"optimizer": Harmful()}, run / "checkpoint-10" / "training_state.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        load_training_state(run / "checkpoint-10")
    assert not (run / "made").exists()


def test_one_of_something_else_is_refused(run):
    with pytest.raises(UserError, match="holds a UNet, this run trains a LoRA of rank 4"):
        find_checkpoint("checkpoint-4", run, "LoRA of rank 4")


def test_what_an_earlier_start_wrote_after_the_step_it_goes_on_from_is_removed(run):
    remove_later(run, 4)
    assert [path.name for path in complete_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
