"""The tests of compiled code once more, with the C code built under GCC's address and undefined behaviour sanitizers.

What reaches outside of an array, or means nothing in C, ends the run. Needs gcc with its sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvswap.native.library import library
from tests.helpers.kernel_calls import NATIVE

ROOT = Path(__file__).parents[2]
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")
CHECKED = [
    "tests/native",
    "tests/core/test_compiled_step.py",
    "tests/core/test_compiled_run.py",
    "tests/core/test_window_layer.py",
    "tests/disk/test_rings.py",
    "tests/disk/test_failing_reads.py",
    "tests/disk/test_interrupted_reads.py",
    "tests/laws/test_select_all.py",
]
OPTIONS = ["-O1", "-g", "-fPIC", "-shared", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WHICH = "import kvswap.native.library as found; print(found.library()._name)"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that loads kvswap with sanitized C code."""
    found = library()
    if shutil.which("gcc") is None or found is None:
        pytest.skip("gcc is not installed, or nothing was compiled here")
    paths = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in LIBRARIES]
    if not all(map(os.path.isabs, paths)):
        pytest.skip("this gcc has no sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "src" / "kvswap", folder / "kvswap", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    target = folder / "kvswap" / "native" / Path(found._name).name

    def compiled(source: Path) -> Path:
        subprocess.run(["gcc", *OPTIONS, "-c", source, "-o", made := folder / f"{source.stem}.o"], check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compiled, sorted(NATIVE.glob("*.c"))))
    subprocess.run(["gcc", *OPTIONS, "-o", target, *made, "-lm"], check=True)
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "LD_PRELOAD": " ".join(paths)}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"  # of Python and PyTorch
    assert subprocess.check_output([sys.executable, "-c", WHICH], env=environment, text=True).strip() == str(target)
    return environment


@pytest.mark.slow
def test_tests_of_compiled_code_pass_under_sanitizers(sanitized: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKED]
    done = subprocess.run(command, cwd=ROOT, env=sanitized, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.slow
def test_reading_outside_of_an_array_is_found(sanitized: dict[str, str]) -> None:
    """The test above would show nothing where nothing is watched. This reads one row more than there is."""
    script = (
        "import numpy as np, ctypes; from kvswap.native.library import library; "
        "x = np.zeros((2, 64), np.float32); y = np.zeros((3, 64), np.float32); w = np.zeros(64, np.float32); "
        "library().kvswap_rms_norm(x.ctypes.data, w.ctypes.data, 3, 64, 0.0, 1e-6, y.ctypes.data)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=sanitized, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
