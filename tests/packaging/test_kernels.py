"""The compiled kernels: in the wheel where nvcc or g++ is, their sources in the sdist, and no obstacle where nvcc fails."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hart_infer.ops.cpu.library import INTERFACE
from tests.packaging.test_wheel import LEFT_BEHIND, ROOT, run

pytestmark = pytest.mark.packaging
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without earlier builds."""
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_BEHIND)
    return folder / "source"


def build(source: Path, output: Path, kind: str, **variables: str) -> Path:
    """An sdist or a wheel, straight from the source."""
    run(sys.executable, "-m", "build", kind, "--outdir", output, source, cwd=output.parent, **variables)
    (built,) = output.iterdir()
    return built


@pytest.mark.skipif(NVCC is None, reason="the kernels are compiled by nvcc, which is not here")
def test_a_wheel_with_kernels_is_for_this_platform_and_any_python(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "dist", "--wheel", HART_INFER_BUILD_CUDA="1", HART_INFER_CUDA_ARCHS="8.0;90")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract("hart_infer/_kernels.so", tmp_path))
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(name).decode()
    library.hart_infer_targets.restype = ctypes.c_char_p
    assert library.hart_infer_targets() == b"80 90+PTX"


@pytest.mark.skipif(NVCC is None, reason="the kernels are compiled by nvcc, which is not here")
def test_all_targets_are_built_by_default(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "dist", "--wheel", HART_INFER_BUILD_CUDA="1")
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract("hart_infer/_kernels.so", tmp_path))
    library.hart_infer_targets.restype = ctypes.c_char_p
    assert library.hart_infer_targets() == b"80 86 89 90+PTX"


@pytest.mark.skipif(NVCC is None, reason="the kernels are compiled by nvcc, which is not here")
def test_targets_that_make_no_sense_are_an_error(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "none"), str(source)]
    variables = {"HART_INFER_CUDA_ARCHS": "ampere"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "HART_INFER_CUDA_ARCHS must be like 80;86;89;90, not ampere" in done.stdout + done.stderr


@pytest.mark.skipif(
    shutil.which("g++") is None or not sys.platform.startswith("linux") or platform.machine() != "x86_64",
    reason="the CPU's kernels are compiled by g++ on Linux for x86-64",
)
def test_the_cpu_s_kernels_are_in_the_wheel_where_gxx_is(source: Path, tmp_path: Path) -> None:
    wheel = build(source, tmp_path / "dist", "--wheel", HART_INFER_BUILD_CUDA="0", HART_INFER_BUILD_CPU="1")
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        library = ctypes.CDLL(archive.extract("hart_infer/_cpu.so", tmp_path))
    assert library.hart_infer_cpu_interface() == INTERFACE


def test_a_missing_gxx_is_an_error_only_where_the_cpu_s_kernels_are_asked_for(source: Path, tmp_path: Path) -> None:
    variables = {"CXX": str(tmp_path / "nowhere" / "g++"), "HART_INFER_BUILD_CUDA": "0"}
    wheel = build(source, tmp_path / "dist", "--wheel", **variables)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "absent" not in archive.read("hart_infer/_cpu.absent").decode()
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "none"), str(source)]
    variables["HART_INFER_BUILD_CPU"] = "1"
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "HART_INFER_BUILD_CPU is 1, but there are no CPU kernels" in done.stdout + done.stderr


def test_the_sdist_has_their_sources(source: Path, tmp_path: Path) -> None:
    with tarfile.open(build(source, tmp_path / "dist", "--sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert expected and expected <= names


@pytest.fixture
def broken_nvcc(tmp_path: Path) -> str:
    """A CUDA_HOME whose compiler fails."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho no such GPU\nexit 1\n")
    nvcc.chmod(0o755)
    return str(nvcc.parents[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nvcc is looked for on Linux only")
def test_a_failing_nvcc_is_an_error_only_where_kernels_are_asked_for(source: Path, tmp_path: Path, broken_nvcc: str) -> None:
    wheel = build(source, tmp_path / "dist", "--wheel", CUDA_HOME=broken_nvcc, HART_INFER_BUILD_CPU="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("hart_infer/_kernels.absent").decode() == "nvcc failed: no such GPU\n"
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "none"), str(source)]
    variables = {"CUDA_HOME": broken_nvcc, "HART_INFER_BUILD_CUDA": "1", "HART_INFER_BUILD_CPU": "0"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "HART_INFER_BUILD_CUDA is 1, but there are no CUDA kernels: nvcc failed: no such GPU" in done.stdout + done.stderr
