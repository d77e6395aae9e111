"""The part of the build that pyproject.toml can't say: where `kernels/` goes, and the compiled kernels of `csrc/`.

With nvcc those for CUDA are compiled into `hart_infer/_kernels.so`, with g++ those for x86 CPUs into `hart_infer/_cpu.so`.
Without a compiler, or where it fails, the package installs without them, and `_kernels.absent` or `_cpu.absent` says why.
HART_INFER_BUILD_CUDA=0 and HART_INFER_BUILD_CPU=0 don't try, 1 makes that an error; HART_INFER_CUDA_ARCHS lists the GPUs.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "80;86;89;90"


class NoKernels(Exception):
    """Why there are none."""


def find_nvcc() -> str:
    """The compiler: CUDA_HOME's, that on PATH, or that of the usual place."""
    if not sys.platform.startswith("linux"):
        raise NoKernels("they are built on Linux only")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in homes] + [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise NoKernels("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
    return nvcc


def targets() -> tuple[list[str], str]:
    """nvcc's options for the GPUs to compile for, and their names: "80 86 90+PTX"."""
    asked = os.environ.get("HART_INFER_CUDA_ARCHS") or ARCHITECTURES
    numbers = [name.replace(".", "") for name in re.split(r"[;,\s]+", asked.strip(" ;,"))]
    if not all(re.fullmatch(r"\d{2,3}", number) for number in numbers):
        raise SetupError(f"HART_INFER_CUDA_ARCHS must be like {ARCHITECTURES}, not {asked}.")
    numbers = sorted(set(numbers), key=int)
    options = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    options.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    return options, " ".join(numbers) + "+PTX"


def compile_cuda(output: Path) -> None:
    """One call of nvcc, which works on files and targets in parallel."""
    nvcc = find_nvcc()
    options, names = targets()
    sources = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in (".cu", ".cpp"))
    command = [nvcc, "-O3", "-std=c++17", "--threads=0", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += [*options, f'-DHART_TARGETS="{names}"', f"-I{ROOT / 'csrc' / 'include'}", *map(str, sources)]
    run(command, output, verbose=os.environ.get("HART_INFER_BUILD_CUDA") == "1")


def compile_cpu(output: Path) -> None:
    """One call of g++; each file names the instructions that it may use."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise NoKernels("they are for x86-64 and built on Linux only")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise NoKernels(f"{os.environ.get('CXX') or 'g++'} was not found (CXX, PATH)")
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    command = [compiler, "-O3", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-static-libgcc"]
    command += map(str, sources)
    run(command, output, verbose=os.environ.get("HART_INFER_BUILD_CPU") == "1")


def run(command: list[str], output: Path, *, verbose: bool) -> None:
    """Write `output`, or raise NoKernels with what the compiler said last, or all of it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            [*command, "-o", str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise NoKernels(f"{name} can't be run: {error}") from None
    if done.returncode:
        output.unlink(missing_ok=True)
        detail = done.stdout if verbose else done.stdout.strip().rpartition("\n")[2]
        raise NoKernels(f"{name} failed: {detail}".replace(f"{ROOT}/", ""))


@dataclass(frozen=True)
class Library:
    """A file of the package that is compiled where that is possible."""

    title: str
    path: Path
    variable: str
    compile: Callable[[Path], None]

    @property
    def reason(self) -> Path:
        """The file that says why there is none."""
        return self.path.with_suffix(".absent")


LIBRARIES = (
    Library("CUDA kernels", Path("hart_infer", "_kernels.so"), "HART_INFER_BUILD_CUDA", compile_cuda),
    Library("CPU kernels", Path("hart_infer", "_cpu.so"), "HART_INFER_BUILD_CPU", compile_cpu),
)


class BuildKernels(Command):
    """Compile csrc/, if that is possible."""

    description = "compile the kernels"
    user_options = []

    def initialize_options(self) -> None:
        """Not known yet."""
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        """Where the package is put together."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def output(self, name: Path) -> Path:
        """A file in the package that is built or, if that is editable, in the checkout."""
        assert self.build_lib is not None
        return (ROOT if self.editable_mode else Path(self.build_lib)) / name

    def built(self) -> bool:
        """Whether there is a library."""
        return any(self.output(library.path).exists() for library in LIBRARIES)

    def run(self) -> None:
        """A failure is told in one line, and is none."""
        for library in LIBRARIES:
            wanted = os.environ.get(library.variable)
            for name in (library.path, library.reason):
                self.output(name).unlink(missing_ok=True)
            try:
                if wanted == "0":
                    raise NoKernels(f"{library.variable} is 0")
                library.compile(self.output(library.path))
            except NoKernels as reason:
                if wanted == "1":
                    raise SetupError(f"{library.variable} is 1, but there are no {library.title}: {reason}") from None
                self.warn(f"hart-infer is installed without its {library.title}: {reason}")
                self.output(library.reason).parent.mkdir(parents=True, exist_ok=True)
                self.output(library.reason).write_text(f"{reason}\n", encoding="utf-8")

    def get_source_files(self) -> list[str]:
        """For the sdist."""
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())

    def get_outputs(self) -> list[str]:
        """What was built, or why not."""
        names = [name for library in LIBRARIES for name in (library.path, library.reason)]
        return [str(path) for path in map(self.output, names) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """No file of the checkout is the library."""
        return {}


class Build(build):
    """And the kernels."""

    sub_commands = [*build.sub_commands, ("build_kernels", None)]


class Wheel(bdist_wheel):
    """A wheel with the compiled kernels is for one platform, but for every Python; without them, for any."""

    def run(self) -> None:
        """Build first, to know what there is."""
        self.run_command("build")
        if self.get_finalized_command("build_kernels").built():
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-any, or the platform."""
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=[*find_packages(include=["hart_infer", "hart_infer.*"]), "hart_infer.kernels"],
    package_dir={"hart_infer.kernels": "kernels"},
    cmdclass={"build": Build, "build_kernels": BuildKernels, "bdist_wheel": Wheel},
)
