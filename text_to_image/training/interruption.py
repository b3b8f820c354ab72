"""What ends a run between two steps, with a checkpoint: a signal, or files that cannot be read; on all processes."""

from runtime.errors import Stopped, WorkError, advice_for, first_line
from runtime.processes import CrossProcessFlag, first_of_all, other_failed
from runtime.stopping import StopSignals
from training.memory_rows import out_of_memory_error
from training.samples import Batches
from training.saving import follow_output_folder
from training.setup import PreparedRun


class Interruption:
    """Looked for after each step; where one process has a reason to end, all end with a checkpoint of that step."""

    def __init__(self, run: PreparedRun, stop: StopSignals, batches: Batches):
        self.run, self.stop, self.batches = run, stop, batches
        self.flag = CrossProcessFlag(run.accelerator, run.args.distributed_timeout)
        self.reason: Exception | None = None  # of this process

    def is_due(self, done: int) -> bool:
        """Whether the run ends after `done` steps; all processes get the same answer.

        Waits until the batches of the next step are made, unless the run was asked to stop.
        """
        fault = None if self.stop.asked else self._batches_fault(done)
        self.reason = self._folder_fault() or fault  # in this order: the encodings are in the folder
        return self.flag.any_process(bool(self.stop.asked or self.reason))

    def exception_after(self, done: int) -> Exception | Stopped:
        """What this process raises once checkpoint-`done` is written: its own bug, the first reason, or Stopped."""
        saved = f"(ended after step {done} of {self.run.plan.steps}, saved in checkpoint-{done})"
        reason = first_of_all(_as_line(self.reason))
        if self.reason and not isinstance(self.reason, WorkError):
            self.reason.add_note(saved)  # below its traceback
            return self.reason
        return WorkError(f"{reason} {saved}") if reason else self.stop.exception_after(done, self.run.plan.steps)

    def raise_before_first_step(self) -> None:
        """Raises why this process cannot begin."""
        fault = self._batches_fault(self.run.resume.first_step)
        if reason := self._folder_fault() or fault:
            raise reason

    def _folder_fault(self) -> WorkError | None:
        fault = follow_output_folder(self.run) if self.run.is_main else None
        return WorkError(fault) if fault else None

    def _batches_fault(self, step: int) -> Exception | None:
        """Why step `step` cannot be trained: a WorkError, or the error itself where only its traceback explains it."""
        error = self.batches.error_of(step)
        if error is None or isinstance(error, WorkError):
            return error
        if explained := out_of_memory_error(self.run, error):
            return explained
        if advice := advice_for(error):
            return WorkError(f"{advice} ({first_line(error)})")
        return WorkError(first_line(error)) if isinstance(error, OSError) else error


def _as_line(error: Exception | None) -> str | None:
    """For the other processes."""
    if error is None:
        return None
    return str(error if isinstance(error, WorkError) else other_failed("another process", error))
