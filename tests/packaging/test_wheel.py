"""The wheel: built from the sdist, installed into a fresh environment, and used far from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "tests", "benchmarks", "tools")
# What another checkout or an activated environment could leak into the fresh one.
LEAKS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command that sees nothing of this environment or the Hub but `variables`, and return what it printed."""
    env = {name: value for name, value in os.environ.items() if name not in LEAKS}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | {"HF_HUB_OFFLINE": "1"} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as a release would be: from the sdist, out of a copy that holds no earlier build, without compilers."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_BEHIND)
    command = (sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source")
    run(*command, cwd=folder, HART_INFER_BUILD_CUDA="0", HART_INFER_BUILD_CPU="0")
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own and return that environment's folder of programs."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return programs


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "hart_infer",
        wheel.name.rsplit("-", 3)[0] + ".dist-info",
    }
    files = (path for path in (ROOT / "hart_infer").rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts and path.suffix != ".so"}
    expected |= {f"hart_infer/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert expected <= names
    assert not any(name.endswith(".so") for name in names)


def test_wheel_needs_no_compiler_and_states_its_licence(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_installed_package_imports_from_its_environment(wheel: Path, environment: Path, tmp_path: Path) -> None:
    script = (
        "import sys, importlib.util, hart_infer, hart_infer.kernels\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "print(hart_infer.__version__, hart_infer.__file__, hart_infer.kernels.__file__, sep='\\n')\n"
    )
    version, package, kernels = run(environment / "python", "-c", script, cwd=tmp_path).splitlines()
    assert version == wheel.name.split("-")[1]
    assert Path(package).is_relative_to(environment.parent)
    assert Path(kernels).parent == Path(package).parent / "kernels"


def test_installed_package_has_what_it_needs(environment: Path, tmp_path: Path) -> None:
    run(environment / "python", "-m", "pip", "check", cwd=tmp_path)


def test_installed_command_draws_without_a_model_or_a_network(environment: Path, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    run(environment / "hart-infer", "generate", "a cat", "--local-files-only", "--seed", "0", "-o", picture, cwd=tmp_path)
    with Image.open(picture) as image:
        image.load()
        assert image.size == (128, 128)


def test_installed_command_generates(environment: Path, tmp_path: Path) -> None:
    maker = ROOT / "benchmarks" / "random_checkpoint.py"
    checkpoint, picture = tmp_path / "checkpoint", tmp_path / "cat.png"
    run(environment / "python", maker, checkpoint, "--preset", "tiny", "--text-encoder", cwd=tmp_path)
    command = ("generate", "a cat", "--model", checkpoint, "--seed", "0", "-o", picture)
    run(environment / "hart-infer", *command, cwd=tmp_path)
    with Image.open(picture) as image:
        image.load()
        assert image.mode == "RGB" and image.width == image.height > 0
