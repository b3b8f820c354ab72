"""Device, precision and memory layout, decided in one place."""

import ctypes

import pytest
import torch

from runtime import devices
from runtime.devices import (
    best_mixed_precision,
    best_training_precision,
    choose_device,
    convolution_memory_format,
)


@pytest.mark.parametrize("switch", ["1", "true", "True", "yes"])
def test_accelerates_variable_for_the_cpu_is_obeyed(monkeypatch, switch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", switch)
    assert choose_device().type == "cpu" and best_mixed_precision() is None


@pytest.mark.parametrize("switch", ["", "0", "false", None])
def test_the_gpu_is_used_if_there_is_one(monkeypatch, switch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if switch is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", switch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device().type == "cpu"


@pytest.mark.parametrize(("gpu", "layout"), [(True, torch.channels_last), (False, torch.contiguous_format)])
def test_convolution_weights_get_the_layout_of_the_training_device(monkeypatch, gpu, layout):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert convolution_memory_format() == layout


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp16")])
def test_bf16_is_chosen_on_gpus_that_have_it(monkeypatch, has_bf16, precision):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert best_mixed_precision() == precision


@pytest.mark.parametrize(
    ("flags", "precision"), [("avx2 avx512_bf16 amx_tile", "bf16"), ("avx512f amx_bf16", "bf16"), ("avx2 bf16x", None)]
)
def test_training_is_in_bf16_on_cpus_that_compute_in_it(monkeypatch, flags, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.Path, "read_text", lambda path: f"flags\t\t: fpu {flags} la57\n")
    assert best_training_precision() == precision and best_mixed_precision() is None


def test_training_is_in_fp32_where_nobody_knows_the_cpu(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.Path, "read_text", missing)
    assert best_training_precision() is None


@pytest.mark.parametrize("largest", [1 << 25, 1 << 30])
def test_an_older_glibc_keeps_blocks_as_large_as_it_can(monkeypatch, largest):
    set_to = {}

    class Glibc:
        def mallopt(self, option: int, value: int) -> bool:
            accepted = option != devices.M_MMAP_THRESHOLD or value <= largest
            return accepted and not set_to.update({option: value})

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Glibc())
    devices.keep_freed_memory()
    assert set_to == {devices.M_MMAP_THRESHOLD: largest, devices.M_TRIM_THRESHOLD: -1}
