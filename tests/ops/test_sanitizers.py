"""The native library under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_are_clean(tmp_path: Path) -> None:
    """Build with sanitizers and run the kernel tests against that build."""
    compiler, cmake = shutil.which("g++"), shutil.which("cmake")
    if compiler is None or cmake is None:
        pytest.skip("needs g++ and cmake")
    build = tmp_path / "build"
    options = [
        *("-DAPRIUM_SANITIZE=address,undefined", "-DAPRIUM_WERROR=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run([cmake, "-S", ROOT, "-B", build, *options], check=True)
    subprocess.run([cmake, "--build", build, "--parallel", "2"], check=True)
    package = tmp_path / "package"
    ignore = shutil.ignore_patterns("_kernels*.so", "__pycache__")
    shutil.copytree(ROOT / "aprium", package / "aprium", ignore=ignore)
    shutil.copytree(ROOT / "tests", package / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", package)
    (library,) = build.glob("_kernels*.so")
    shutil.copy(library, package / "aprium" / "ops")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": str(package),
    }
    tests = ["tests/ops/test_native.py", "tests/ops/test_training_kernels.py"]
    tests += ["tests/model/test_native.py"]
    tests += ["tests/model/test_replay.py", "tests/checkpoint/test_transposed.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
