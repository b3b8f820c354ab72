"""One answer to 'GPU or CPU?' for everything that is not training."""

import ctypes
import os

import pytest
import torch

from runtime import devices, processes
from runtime.devices import best_mixed_precision, choose_device, convolution_memory_format


@pytest.mark.parametrize("switch", ["1", "true", "True", "yes"])
def test_accelerates_switch_to_the_cpu_is_obeyed(monkeypatch, switch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", switch)
    assert choose_device().type == "cpu" and best_mixed_precision() is None


@pytest.mark.parametrize("switch", ["", "0", "false", None])
def test_a_gpu_is_used_where_there_is_one(monkeypatch, switch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if switch is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", switch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device().type == "cpu"


@pytest.mark.parametrize(("gpu", "layout"), [(True, torch.channels_last), (False, torch.contiguous_format)])
def test_convolutions_are_laid_out_for_the_device_that_trains(monkeypatch, gpu, layout):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert convolution_memory_format() == layout


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_the_precision_is_the_best_that_the_gpu_has(monkeypatch, has_bf16, precision):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert best_mixed_precision() == precision


def test_gpus_that_cannot_reach_each_other_are_no_error(monkeypatch):
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(processes, "check_cuda_p2p_ib_support", lambda: True)
    processes.disable_unsupported_p2p()
    assert "NCCL_P2P_DISABLE" not in os.environ
    monkeypatch.setattr(processes, "check_cuda_p2p_ib_support", lambda: False)
    processes.disable_unsupported_p2p()
    assert os.environ["NCCL_P2P_DISABLE"] == os.environ["NCCL_IB_DISABLE"] == "1"


@pytest.mark.parametrize("largest", [1 << 25, 1 << 30])
def test_an_older_glibc_keeps_as_large_blocks_as_it_can(monkeypatch, largest):
    set_to = {}

    class Glibc:
        def mallopt(self, option: int, value: int) -> bool:
            accepted = option != devices.M_MMAP_THRESHOLD or value <= largest
            return accepted and not set_to.update({option: value})

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Glibc())
    devices.keep_freed_memory()
    assert set_to == {devices.M_MMAP_THRESHOLD: largest, devices.M_TRIM_THRESHOLD: -1}
