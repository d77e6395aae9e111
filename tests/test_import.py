"""The package's front door: quick to import, and every public name behind it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import hart_infer
from hart_infer import errors
from hart_infer.moved import MOVED
from tests.golden.data import REPOSITORY


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level packages, other than Python's own, that a statement loads in a fresh process."""
    code = f"import sys, json; before = set(sys.modules); {statement}; print(json.dumps(sorted(set(sys.modules) - before)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return {name.partition(".")[0] for name in json.loads(run.stdout)} - set(sys.stdlib_module_names)


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert modules_loaded_by("import hart_infer") == {"hart_infer"}


def test_the_pipeline_arrives_on_first_use_and_without_transformers() -> None:
    loaded = modules_loaded_by("import hart_infer; hart_infer.HartPipeline")
    assert "torch" in loaded
    assert "transformers" not in loaded


def test_the_server_s_own_process_needs_no_torch() -> None:
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    assert "torch" not in modules_loaded_by("import hart_infer.server.run")


@pytest.mark.parametrize("name", hart_infer.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(hart_infer, name) is not None
    assert name in dir(hart_infer)


def test_lazy_names_are_the_modules_own() -> None:
    from hart_infer.models import text
    from hart_infer.pipelines import hart, outputs

    assert hart_infer.HartPipeline is hart.HartPipeline
    assert hart_infer.HartOutput is outputs.HartOutput
    assert hart_infer.Step is outputs.Step
    assert hart_infer.PromptEmbeds is text.PromptEmbeds


def test_functions_of_the_old_images_module_still_work_and_warn() -> None:
    from hart_infer import images
    from hart_infer.images import tensors

    with pytest.warns(FutureWarning, match="hart_infer.images.to_pil is hart_infer.images.tensors.to_pil now"):
        assert images.to_pil is tensors.to_pil
    with pytest.raises(AttributeError, match="nonsense"):
        images.nonsense  # noqa: B018


@pytest.mark.parametrize("old", MOVED)
def test_every_old_name_of_a_module_leads_to_a_new_one(old: str) -> None:
    sys.modules.pop(f"hart_infer.{old}", None)
    with pytest.warns(FutureWarning):
        module = importlib.import_module(f"hart_infer.{old}")
    new = importlib.import_module(f"hart_infer.{MOVED[old]}")
    defined = [name for name, value in vars(new).items() if getattr(value, "__module__", "") == new.__name__]
    assert all(getattr(module, name) is getattr(new, name) for name in defined)


@pytest.mark.parametrize(("old", "name"), [("pipeline", "HartPipeline"), ("outputs", "Step"), ("text", "PromptEmbeds")])
def test_the_old_names_of_modules_still_work_and_warn(old: str, name: str) -> None:
    sys.modules.pop(f"hart_infer.{old}", None)
    with pytest.warns(FutureWarning, match=f"hart_infer.{old} is hart_infer.* now; the old name goes in 0.2"):
        module = importlib.import_module(f"hart_infer.{old}")
    assert getattr(module, name) is getattr(hart_infer, name)
    with pytest.raises(AttributeError):
        module.nonsense  # noqa: B018


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'hart_infer' has no attribute 'HartPipelin'"):
        _ = hart_infer.HartPipelin
    with pytest.raises(ImportError, match="HartPipelin"):
        from hart_infer import HartPipelin  # noqa: F401


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.WeightsError, ValueError),
        (errors.InputError, ValueError),
        (errors.CheckpointNotFoundError, FileNotFoundError),
        (errors.OutputError, OSError),
        (errors.OutOfMemoryError, RuntimeError),
    ],
)
def test_every_error_is_ours_and_python_s(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, hart_infer.HartError)
    assert issubclass(error, builtin)
    assert getattr(hart_infer, error.__name__) is error


def test_no_error_is_left_out_of_the_front_door() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.HartError)}
    assert defined <= set(hart_infer.__all__)
