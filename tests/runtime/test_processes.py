"""What the main process raises, all raise; GPUs that cannot reach each other are reported to NCCL."""

import os

import pytest
from accelerate import Accelerator

from runtime import processes
from runtime.errors import UserError, WorkError
from runtime.processes import CrossProcessFlag, run_on_all, run_on_main, warn_of_single_process


def test_the_main_process_returns_its_result_or_raises_its_own_error():
    accelerator = Accelerator(cpu=True)
    assert run_on_main(accelerator, lambda: 3) == 3
    for error in (UserError("wrong flag"), KeyError("a bug")):
        with pytest.raises(type(error)) as raised:
            run_on_main(accelerator, lambda error=error: (_ for _ in ()).throw(error))
        assert raised.value is error


def test_what_one_process_raises_all_raise(monkeypatch):
    with pytest.raises(KeyError, match="a bug"):
        run_on_all(lambda: {}["a bug"])
    others: list = [None, None]
    monkeypatch.setattr(processes, "gather_object", lambda own: [*own, *others])
    assert run_on_all(lambda: 3) == 3
    others[1] = WorkError("a picture is gone")
    with pytest.raises(WorkError) as raised:
        run_on_all(lambda: 3)
    assert raised.value is others[1]


def test_a_bug_of_one_process_ends_the_others_with_a_line(monkeypatch):
    shared = []
    monkeypatch.setattr(processes, "gather_object", lambda own: shared.extend(own) or own)
    with pytest.raises(KeyError):
        run_on_all(lambda: {}["a bug"])
    assert isinstance(shared[0], WorkError)


def test_a_single_process_answers_for_itself():
    flag = CrossProcessFlag(Accelerator(cpu=True), minutes=1)
    assert flag.any_process(True) and not flag.any_process(False)


def test_nccl_settings_follow_whether_gpus_can_reach_each_other(monkeypatch):
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(processes, "check_cuda_p2p_ib_support", lambda: True)
    processes.disable_unsupported_p2p()
    assert "NCCL_P2P_DISABLE" not in os.environ
    monkeypatch.setattr(processes, "check_cuda_p2p_ib_support", lambda: False)
    processes.disable_unsupported_p2p()
    assert os.environ["NCCL_P2P_DISABLE"] == os.environ["NCCL_IB_DISABLE"] == "1"


@pytest.mark.parametrize(
    ("launcher", "processes", "warned"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, 1, True),  # --cpu --num_processes 2
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, 2, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, False),  # accelerate launch --num_processes 1
        ({"MASTER_ADDR": "127.0.0.1"}, 1, False),  # python, where a cluster sets the address
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "RANK": "0"}, 1, False),  # torchrun
    ],
)
def test_a_launcher_that_starts_one_process_of_several_is_reported(monkeypatch, capfd, launcher, processes, warned):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    warn_of_single_process(processes)
    assert ("torchrun" in capfd.readouterr().err) == warned
