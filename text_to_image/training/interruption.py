"""What ends a run between two steps, with a checkpoint: a signal, or files that are gone; on all processes alike."""

from runs.records import RUN_FILE, write_run
from runtime.errors import InputChanged, Stopped, WorkError
from runtime.processes import CrossProcessFlag, first_of_all
from runtime.stopping import StopSignals
from training.samples import Batches
from training.setup import PreparedRun


class Interruption:
    """Looked for after each step; where one process has a reason to end, all end with a checkpoint of that step."""

    def __init__(self, run: PreparedRun, stop: StopSignals, batches: Batches):
        self.run, self.stop, self.batches = run, stop, batches
        self.flag = CrossProcessFlag(run.accelerator, run.args.distributed_timeout)
        self.lost: str | None = None  # what this process found gone or changed

    def is_due(self, done: int) -> bool:
        """Whether the run ends after `done` steps; all processes get the same answer.

        Waits until the batches of the next step are made, unless the run was asked to stop.
        """
        changed = None if self.stop.asked else self.batches.changed_input(done)
        self.lost = str(changed) if changed else None
        if self._folder_is_gone():  # with the encodings in it
            write_run(self.run.folder, self.run.record)  # for the checkpoint
            self.lost = f"{self._folder_fault()}; it is made again, and the same command goes on there"
        return self.flag.any_process(bool(self.stop.asked or self.lost))

    def exception_after(self, done: int) -> Stopped | WorkError:
        """What all processes raise once checkpoint-`done` is written: what is gone, else Stopped."""
        if lost := first_of_all(self.lost):
            return WorkError(f"{lost} (ended after step {done} of {self.run.plan.steps}, saved in checkpoint-{done})")
        return self.stop.exception_after(done, self.run.plan.steps)

    def raise_before_first_step(self) -> None:
        """Raises InputChanged where this process cannot begin."""
        if self._folder_is_gone():
            raise InputChanged(f"{self._folder_fault()}; put it back, and run the same command again")
        if changed := self.batches.changed_input(self.run.resume.first_step):
            raise changed

    def _folder_is_gone(self) -> bool:
        """Told by run.json: the folder itself may have been made again by whatever wrote into it since."""
        return self.run.is_main and not (self.run.folder / RUN_FILE).is_file()

    def _folder_fault(self) -> str:
        return f"{self.run.folder}: moved or removed while the run wrote into it"
