"""The number of steps and the learning rate at each."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from optimization.schedule import learning_rate_schedule
from runtime.errors import UserError
from training.plan import total_steps, warmup_steps


def test_the_last_batch_is_filled_up_with_samples_of_the_next_epoch():
    assert total_steps(samples=300, global_batch=4) == 75
    assert total_steps(samples=1201, global_batch=4) == 301
    assert total_steps(samples=3, global_batch=16) == 1


def test_warm_up_is_as_asked_or_a_small_part_of_the_run():
    assert [warmup_steps(None, steps) for steps in (3, 100, 300, 100_000)] == [0, 5, 15, 500]
    assert warmup_steps(0, 300) == 0 and warmup_steps(20, 300) == 20


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"])
def test_the_rate_is_that_of_diffusers_schedule_stepped_once_a_step(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    stepped = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=30)
    rate_at = learning_rate_schedule(name, 3e-4, 5, 30)
    for step in range(30):
        assert rate_at(step) == pytest.approx(stepped.get_last_lr()[0], rel=1e-6, abs=1e-12)
        optimizer.step()
        stepped.step()


def test_the_rate_of_a_step_does_not_depend_on_which_were_asked_for_before():
    rate_at = learning_rate_schedule("cosine", 1.0, 2, 10)
    backwards = [rate_at(step) for step in reversed(range(10))]
    assert backwards[::-1] == [rate_at(step) for step in range(10)]


def test_a_schedule_that_cannot_be_is_refused_by_its_flags():
    with pytest.raises(UserError, match="--lr_scheduler polynomial with --learning_rate 1e-08"):
        learning_rate_schedule("polynomial", 1e-8, 0, 10)
