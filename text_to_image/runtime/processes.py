"""Agreement between the processes of a distributed run, so that none waits for another that has given up."""

import datetime
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, check_cuda_p2p_ib_support, gather_object

from runtime.errors import UserError, WorkError, first_line

Result = TypeVar("Result")


def run_on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Runs `work` on the main process; all processes return its result, or raise the error that it raised.

    The others get UserError and WorkError as they are, and a WorkError in place of any other exception.
    """
    outcome: list = [None, None]  # result, error
    own_error: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except (UserError, WorkError) as error:
            outcome[1] = own_error = error
        except Exception as error:
            own_error, outcome[1] = error, other_failed("the main process", error)
    broadcast_object_list(outcome)
    if raised := own_error or outcome[1]:
        raise raised
    return outcome[0]


def run_on_all(work: Callable[[], Result]) -> Result:
    """Runs `work` on every process and waits for all of them; where it fails on some, none goes on.

    A process raises its own error; the others get the first UserError or WorkError as it is, and a WorkError in place
    of any other exception.
    """
    result: Result | None = None
    own_error: Exception | None = None
    try:
        result = work()
    except Exception as error:
        own_error = error
    shared: Exception | None = own_error
    if own_error and not isinstance(own_error, UserError | WorkError):
        shared = other_failed("another process", own_error)
    agreed = first_of_all(shared)  # also where this process failed: the others wait for its answer
    if raised := own_error or agreed:
        raise raised
    return result  # type: ignore[return-value]


def other_failed(which: str, error: Exception) -> WorkError:
    """What the processes raise that have not failed themselves."""
    return WorkError(f"{which} failed: {type(error).__name__}: {first_line(error)}")


def first_of_all(value: Result | None) -> Result | None:
    """The first value that is not None, in the order of the processes; all of them get the same."""
    return next((other for other in gather_object([value]) if other is not None), None)


class CrossProcessFlag:
    """A condition shared by all processes, over gloo: asking for it does not wait for the GPUs' queues.

    A process that does not answer within `minutes` ends the others.
    """

    def __init__(self, accelerator: Accelerator, minutes: int):
        self.group: torch.distributed.ProcessGroup | None = None
        if accelerator.num_processes > 1:
            timeout = datetime.timedelta(minutes=minutes)
            self.group = torch.distributed.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]

    def any_process(self, condition: bool) -> bool:
        """Whether the condition holds on at least one process; all processes get the same answer."""
        if self.group is None:
            return condition
        holds = torch.tensor(float(condition))
        torch.distributed.all_reduce(holds, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(holds)


def disable_unsupported_p2p() -> None:
    """Tells NCCL where GPUs cannot reach each other's memory (RTX 40 with an older driver).

    `accelerate launch` does the same; without it accelerate refuses to start.
    """
    if not check_cuda_p2p_ib_support():
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")


def warn_of_single_process(num_processes: int) -> None:
    """A line on stderr where `accelerate launch` was asked for several processes or machines and started this one.

    Without --multi_gpu, and always with --cpu, it sets only the address for them (accelerate's simple launcher).
    """
    simple_launcher = "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ  # torchrun sets it
    if num_processes == 1 and simple_launcher and "MASTER_ADDR" in os.environ:
        print(
            "note: accelerate launch was asked for several processes, but started only this one; several start with "
            "`torchrun --nproc_per_node 2 SCRIPT`, on GPUs also `accelerate launch --multi_gpu --num_processes 2`",
            file=sys.stderr,
        )
