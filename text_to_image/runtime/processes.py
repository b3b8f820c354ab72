"""What one process of a run does for all of them, so that none waits for another that has given up."""

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, check_cuda_p2p_ib_support

from runtime.errors import UserError, WorkError

Result = TypeVar("Result")


def run_on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
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


class CrossProcessFlag:
    """Lets all processes know what one of them has learned, over gloo: asking does not wait for the GPUs' work.

    A process that does not answer for `minutes` ends the others.
    """

    def __init__(self, accelerator: Accelerator, minutes: int):
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(minutes=minutes))

    def any_process(self, condition: bool) -> bool:
        """Whether it holds on at least one process; all get the same answer."""
        if self.group is None:
            return condition
        holds = torch.tensor(float(condition))
        torch.distributed.all_reduce(holds, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(holds)


def disable_unsupported_p2p() -> None:
    """Tells NCCL where GPUs cannot reach each other's memory (RTX 40 with an older driver), as `accelerate launch`
    does; accelerate refuses to start otherwise."""
    if not check_cuda_p2p_ib_support():
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
