"""Limits of the system that a small machine or a container sets: open files, rings, and groups larger than a queue."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvswap.config import Config
from kvswap.core.attach import attach
from kvswap.disk import create_backend
from kvswap.disk.files import check_open_files
from kvswap.disk.uring_ring import Ring
from kvswap.errors import OpenFilesError, StorageError
from tests.helpers.families import forced_logits, full_cache, tiny_model, tokens
from tests.helpers.system import has_direct_io, has_io_uring

OPEN_MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
from kvswap.disk import create_backend
from kvswap.errors import OpenFilesError
backend = create_backend("buffered", sys.argv[1], 8, on_notice=print)
try:
    for _ in range(150):
        backend.open(4096)
except OpenFilesError as error:
    print(error)
else:
    print("opened")
"""


FEW_FILES = """
import os, resource, sys
import torch
from kvswap.config import Config
from kvswap.core.attach import attach
from tests.helpers.families import forced_logits, tiny_model, tokens
few = len(os.listdir("/proc/self/fd")) + 20
resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))
model = tiny_model("llama", num_hidden_layers=12)
with attach(model, Config(select_tokens=56, recent_tokens=16, kv_memory="16MiB", kv_dir=sys.argv[1])) as cache:
    forced_logits(model, tokens(4, 200), tokens(4, 3), cache)
print("done")
"""


def test_layers_and_sequences_need_no_files_of_their_own(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the system does not list descriptors")
    command = [sys.executable, "-c", FEW_FILES, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


@pytest.mark.parametrize(("hard", "words"), [(1000, "opened"), (100, "may have 100 files open"), (100, "ulimit -n")])
def test_open_files(hard: int, words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN_MANY, str(tmp_path), str(hard)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout


def test_only_errors_about_open_files_are_taken_for_them() -> None:
    for code in (errno.EACCES, errno.ENOSPC, errno.EIO):
        check_open_files(OSError(code, "text"))
    with pytest.raises(OpenFilesError, match="the system has as many files open"):
        check_open_files(OSError(errno.ENFILE, "text"))


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL, errno.EPERM])
def test_a_small_ring_is_allowed_and_a_large_one_is_not(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (has_direct_io(tmp_path) and has_io_uring()):
        pytest.skip("no io_uring here")
    create = Ring.__init__

    def limited(self: Ring, depth: int) -> None:
        if depth > 8:
            raise OSError(code, "refused")
        create(self, depth)

    monkeypatch.setattr(Ring, "__init__", limited)
    notices: list[str] = []
    backend = create_backend("auto", tmp_path, 1024, on_notice=notices.append)
    backend.close()
    assert backend.name == "threads"
    assert len(notices) == 1
    assert f"a ring for 1024 reads: {errno.errorcode[code]}" in notices[0]
    with pytest.raises(StorageError, match=r"backend uring: .*1024 reads"):
        create_backend("uring", tmp_path, 1024, on_notice=notices.append)


@pytest.mark.parametrize(
    ("group_tokens", "heads"),
    [(1, 2), pytest.param(4, 32, marks=pytest.mark.slow), (64, 2), pytest.param(64, 32, marks=pytest.mark.slow)],
)
def test_groups_of_every_size(group_tokens: int, heads: int, select_all: Config) -> None:
    model = tiny_model("llama", num_attention_heads=heads, num_key_value_heads=heads, head_dim=64)
    ids, forced = tokens(1, 2100), tokens(1, 4)
    expected = forced_logits(model, ids, forced, full_cache(model))
    config = select_all.replace(group_tokens=group_tokens, kv_memory="1GiB")
    with attach(model, config) as cache:
        assert torch.allclose(forced_logits(model, ids, forced, cache), expected, atol=1e-5)
