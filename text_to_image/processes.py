"""What one process of a run does for all of them, so that none waits for another that has given up."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from errors import UserError, WorkError

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What `work` returns on the main process, on all of them; and so with the mistake or failure that it raises."""
    told: list = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            told[0] = work()
        except (UserError, WorkError) as error:
            told[1] = failure = error
        except Exception as error:
            failure, told[1] = error, WorkError("the main process has failed; its message stands above")
    broadcast_object_list(told)
    if error := failure or told[1]:
        raise error
    return told[0]


def any_process(accelerator: Accelerator, condition: bool) -> bool:
    """Whether it holds on at least one process; all get the same answer."""
    if accelerator.num_processes == 1:
        return condition
    return bool(accelerator.reduce(torch.tensor(float(condition), device=accelerator.device), reduction="sum").item())
