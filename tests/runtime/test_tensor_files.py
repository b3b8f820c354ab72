"""Cached tensors are read back as they were written; one that cannot be read any more is named."""

import pytest
import torch

from runtime.errors import InputChanged
from runtime.tensor_files import read_tensor, save_with_checksum


def test_a_tensor_that_cannot_be_read_any_more_is_named_in_one_line(tmp_path):
    path = tmp_path / "1.safetensors"
    save_with_checksum(path, {"0": torch.ones(2)})
    assert torch.equal(read_tensor(path, "0"), torch.ones(2))
    for content in (b"", b"rubbish", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(InputChanged, match=r"1\.safetensors: cannot be read any more") as changed:
            read_tensor(path, "0")
        assert "\n" not in str(changed.value)
    path.unlink()
    with pytest.raises(InputChanged, match=r"1\.safetensors: no such file"):
        read_tensor(path, "0")
