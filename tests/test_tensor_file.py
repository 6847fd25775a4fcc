"""A file of our own tensors is read back whole, or refused."""

from __future__ import annotations

import os
import random

import pytest
import torch

from lmpatch import tensor_file
from lmpatch.errors import BadInput, BadPatch
from lmpatch.files import outside, read_bytes


@pytest.mark.slow
def test_any_changed_byte_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int32)}
    tensor_file.write(path, {"stamp": "s", "step": "7"}, tensors)
    head, back = tensor_file.read(path)
    assert head == {"stamp": "s", "step": "7"}
    assert all(torch.equal(tensors[name], back[name]) for name in tensors)
    data, rng = path.read_bytes(), random.Random(0)
    accepted = 0
    for _ in range(300):
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        try:
            new_head, new = tensor_file.read(path)
        except BadPatch:
            continue
        accepted += 1  # a blank of the header's padding, say: then what it says is the same
        assert new_head == head and all(torch.equal(new[name], back[name]) for name in tensors)
    assert accepted < 60
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(BadPatch):
            tensor_file.read(path)


def test_a_pipe_a_folder_and_a_large_file_are_refused_before_they_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 100)
    with pytest.raises(BadInput, match="no ordinary file"):
        read_bytes(tmp_path / "pipe")
    with pytest.raises(BadInput, match="no ordinary file"):
        read_bytes(tmp_path)
    with pytest.raises(BadInput, match="at most 50"):
        read_bytes(tmp_path / "large", limit=50)
    with pytest.raises(BadInput, match="there is no such file"):
        read_bytes(tmp_path / "none")


def test_what_a_library_raises_becomes_one_line_and_interrupts_pass():
    with pytest.raises(BadPatch, match=r"^facts cannot be read: first\.$"), outside("facts", BadPatch):
        raise RuntimeError("first\nsecond")
    with pytest.raises(KeyboardInterrupt), outside("facts"):
        raise KeyboardInterrupt
