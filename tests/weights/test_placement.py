"""Which weights are mapped from files and which are memory of the process."""

from __future__ import annotations

import sys

import gguf
import pytest
import torch
from torch import nn

from kvswap.models.loading import load_model
from kvswap.native.library import available
from kvswap.weights.placement import weight_bytes
from tests.helpers.families import tiny_model
from tests.helpers.packed import write_model

linux = pytest.mark.skipif(sys.platform != "linux", reason="the list of mappings is Linux's")


def test_memory_of_the_process_counts_once():
    model = nn.ModuleList([nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False)])
    assert weight_bytes(model) == (0, 2 * 300 * 300 * 4)
    model[1].weight = nn.Parameter(model[0].weight.detach()[:, :])  # type: ignore[union-attr]
    assert weight_bytes(model) == (0, 300 * 300 * 4)


def test_nothing_is_known_without_the_list(tmp_path):
    assert weight_bytes(nn.Linear(2, 3), tmp_path / "absent") == (0, 4 * (2 * 3 + 3))


@linux
@pytest.mark.skipif(not available(), reason="nothing was compiled here")
def test_a_mapped_file(tmp_path):
    model = tiny_model("llama", vocab_size=300)
    file = write_model(tmp_path / "tiny.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    loaded = load_model(str(file))
    mapped, anonymous = weight_bytes(loaded.model)
    vectors = sum(tensor.nbytes for tensor in loaded.model.parameters() if tensor.dtype == torch.float32)
    assert anonymous == vectors
    assert mapped == sum(each.data.nbytes for each in loaded.file.tensors.values() if len(each.shape) > 1)
    assert weight_bytes(load_model(str(file), mmap=False).model) == (0, mapped + anonymous)
