"""The verdict of doctor: one piece of advice for each problem, and none without a problem."""

from __future__ import annotations

import pytest

from kvswap.tuning.checkup import Verdict, give_verdict


def verdict(**changes: object) -> Verdict:
    good: dict[str, object] = {
        "backend": "uring",
        "direct_io": True,
        "direct_io_reason": "",
        "uring_reason": "",
        "free_bytes": 100 << 30,
        "read_bytes_per_s": 800e6,
        "read_test_reason": "",
        "gpu_note": "",
        "compiled": True,
    }
    return give_verdict(**{**good, **changes})  # type: ignore[arg-type]


def test_no_advice_without_a_problem() -> None:
    assert verdict() == Verdict(
        summary="kvswap will read through io_uring with direct I/O, 800 MB/s at random", advice=()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "buffered", "direct_io": False, "direct_io_reason": "EINVAL"}, ["EINVAL", "ext4", "--kv-dir"]),
        ({"backend": "threads", "uring_reason": "EPERM, not permitted"}, ["EPERM", "seccomp"]),
        ({"backend": "threads", "uring_reason": "ENOSYS, none"}, ["ENOSYS", "5.15"]),
        ({"backend": "threads", "uring_reason": "ENOMEM, none"}, ["ENOMEM", "ulimit -l"]),
        ({"backend": "threads", "uring_reason": "EMFILE, too many"}, ["EMFILE", "slower"]),
        ({"read_bytes_per_s": 100e6}, ["100 MB/s", "SSD"]),
        ({"read_bytes_per_s": None, "read_test_reason": "EIO"}, ["EIO", "--kv-dir"]),
        ({"compiled": False}, ["nothing was compiled", "install a C compiler"]),
        ({"free_bytes": 1 << 30}, ["1.0 GiB", "--kv-dir"]),
        ({"gpu_note": "an NVIDIA GPU is there"}, ["NVIDIA", "PyTorch"]),
    ],
)
def test_each_problem_has_one_piece_of_advice(changes: dict[str, object], words: list[str]) -> None:
    found = verdict(**changes)
    assert len(found.advice) == 1
    assert all(word in found.advice[0] for word in words), found.advice


def test_without_direct_io_there_is_no_advice_about_io_uring() -> None:
    found = verdict(backend="buffered", direct_io=False, direct_io_reason="EINVAL", uring_reason="EPERM")
    assert len(found.advice) == 1
