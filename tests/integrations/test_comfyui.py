"""The node pack, found and run as ComfyUI does it: by path, its mappings, under torch.inference_mode."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hart_infer import HartPipeline, InputError, VarPipeline
from tests.golden.data import REPOSITORY

PACK = REPOSITORY / "integrations" / "comfyui"


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


@dataclass
class Comfy:
    """What the stand-ins for ComfyUI's modules saw, and are told."""

    updates: list[tuple[int, int, Any]] = field(default_factory=list)
    interrupt_after: int | None = None
    nodes: dict[str, type[Any]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def run(self, node: str, **inputs: Any) -> Any:
        """Check the inputs by INPUT_TYPES and call the node's FUNCTION, as ComfyUI's executor does; return its first output."""
        kind = self.nodes[node]
        declared = kind.INPUT_TYPES()
        assert set(declared["required"]) <= set(inputs) <= {**declared["required"], **declared.get("optional", {})}.keys()
        for name, value in inputs.items():
            choices, *options = {**declared["required"], **declared.get("optional", {})}[name]
            assert not isinstance(choices, list) or value in choices
            if options and "max" in options[0]:
                assert options[0]["min"] <= value <= options[0]["max"]
        with torch.inference_mode():
            outputs = getattr(kind(), kind.FUNCTION)(**inputs)
        assert isinstance(outputs, tuple)
        assert len(outputs) == len(kind.RETURN_TYPES)
        return outputs[0]


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> Comfy:
    """Import the folder as ComfyUI's load_custom_node does: under its path as a name, with `__init__.py` as its file."""
    seen = Comfy()

    class ProgressBar:
        def __init__(self, total: int, node_id: str | None = None) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            seen.updates.append((value, total or self.total, preview))

    def interrupt() -> None:
        if seen.interrupt_after is not None and len(seen.updates) >= seen.interrupt_after:
            raise Interrupted

    package, utils, management = (types.ModuleType(f"comfy{name}") for name in ("", ".utils", ".model_management"))
    package.__path__ = []
    package.utils, package.model_management = utils, management  # type: ignore[attr-defined]
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    management.get_torch_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = interrupt  # type: ignore[attr-defined]
    for module in (package, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    name = str(PACK).replace(".", "_x_")
    monkeypatch.delitem(sys.modules, f"{name}.nodes", raising=False)
    spec = importlib.util.spec_from_file_location(name, os.path.join(PACK, "__init__.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    seen.nodes, seen.names = module.NODE_CLASS_MAPPINGS, module.NODE_DISPLAY_NAME_MAPPINGS
    return seen


def load(comfy: Comfy, model: str | Path = "hart-mini", **options: Any) -> Any:
    return comfy.run("HartLoad", model=str(model), dtype="as stored", **options)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255


def test_every_node_has_a_name_and_declares_itself(comfy):
    assert comfy.nodes.keys() == comfy.names.keys() == {"HartLoad", "HartSample", "HartEdit", "HartReconstruct"}
    for kind in comfy.nodes.values():
        assert kind.CATEGORY == "hart_infer"
        assert callable(getattr(kind, kind.FUNCTION))
        json.dumps(kind.INPUT_TYPES())  # the page gets them


def test_it_draws_the_picture_of_the_seed_and_shows_every_scale(comfy):
    pipe = load(comfy)
    images = comfy.run("HartSample", pipeline=pipe, prompt="a cat", seed=7, count=2)
    assert images.shape == (2, 128, 128, 3)
    assert images.dtype == torch.float32
    expected = HartPipeline.from_pretrained("hart-mini", device="cpu")("a cat", num_images_per_prompt=2, seed=7).images
    assert torch.equal(images, to_tensor(expected))
    assert [(value, total) for value, total, _ in comfy.updates] == [(i, 6) for i in range(1, 7)]
    assert all(kind == "JPEG" and image.size == (128, 128) for _, _, (kind, image, _) in comfy.updates)
    again = comfy.run("HartSample", pipeline=pipe, prompt="a cat", seed=8, count=1, previews=False)
    assert torch.equal(again[0], images[1])
    assert comfy.updates[-1][2] is None


def test_settings_reach_the_pipeline(comfy):
    pipe = load(comfy)
    arguments = {"pipeline": pipe, "prompt": "a cat", "seed": 2**64 - 1, "count": 1, "previews": False}
    plain = comfy.run("HartSample", **arguments)
    guided = comfy.run("HartSample", **arguments, guidance_scale=9.0)
    draft = comfy.run("HartSample", **arguments, speed="draft")
    assert not torch.equal(plain, guided)
    assert not torch.equal(plain, draft)
    comfy.run("HartSample", **{**arguments, "count": 2})  # the second seed begins at 0


def test_cancelling_ends_the_run_after_the_scale(comfy):
    pipe = load(comfy)
    comfy.interrupt_after = 2
    with pytest.raises(Interrupted):
        comfy.run("HartSample", pipeline=pipe, prompt="a cat", seed=0, count=1)
    assert len(comfy.updates) == 2
    comfy.interrupt_after = None
    assert comfy.run("HartSample", pipeline=pipe, prompt="a cat", seed=0, count=1).shape == (1, 128, 128, 3)


def test_it_edits_what_the_mask_marks(comfy):
    pipe = load(comfy)
    picture = comfy.run("HartSample", pipeline=pipe, prompt="a pizza", seed=0, count=1)
    mask = torch.zeros(1, 128, 128)
    mask[:, :, 48:] = 1
    edit = {"pipeline": pipe, "prompt": "a cat", "seed": 3, "count": 2, "mask": mask}
    edited = comfy.run("HartEdit", image=picture, **edit)
    assert edited.shape == (2, 128, 128, 3)
    far, near = (edited - picture).abs()[:, :, 60:], (edited - picture).abs()[:, :, :32]
    assert near.max() <= 1 / 255
    assert far.mean() > 0.02
    white = Image.fromarray((mask[0].numpy() * 255).astype(np.uint8))
    plain = HartPipeline.from_pretrained("hart-mini", device="cpu")
    pil = Image.fromarray((picture[0].numpy() * 255).round().astype(np.uint8))
    expected = plain.inpaint(pil, white, "a cat", num_images_per_prompt=2, seed=3).images
    assert torch.equal(edited, to_tensor(expected))
    both = comfy.run("HartEdit", image=picture.repeat(2, 1, 1, 1), **{**edit, "count": 1})
    assert torch.equal(both, edited)
    assert comfy.run("HartEdit", image=picture, **{**edit, "prompt": "", "count": 1}, blend=False).shape == (1, 128, 128, 3)
    with pytest.raises(InputError, match="There are 2 masks for 1 pictures"):
        comfy.run("HartEdit", image=picture, **{**edit, "mask": mask.repeat(2, 1, 1)})


def test_it_reconstructs_pictures_of_any_size_and_with_alpha(comfy):
    pipe = load(comfy)
    images = torch.rand(2, 120, 100, 4)
    hybrid, discrete, own = (
        comfy.run("HartReconstruct", pipeline=pipe, image=images, mode=mode) for mode in ("hybrid", "discrete", "the model's")
    )
    assert hybrid.shape == (2, 128, 128, 3)
    assert torch.equal(hybrid, own)
    assert not torch.equal(hybrid, discrete)


def test_var(comfy, whole_var_tiny):
    pipe = load(comfy, whole_var_tiny, variant="d2")
    assert isinstance(pipe, VarPipeline)
    images = comfy.run("HartSample", pipeline=pipe, prompt="3", seed=1, count=1)
    assert torch.equal(images, to_tensor(pipe("3", seed=1).images))
    mask = torch.ones(1, *images.shape[1:3])
    assert comfy.run("HartEdit", pipeline=pipe, prompt="4", seed=1, count=1, image=images, mask=mask).shape == images.shape


def test_vila_u(comfy, tmp_path):
    pytest.importorskip("sentencepiece")
    from tests.released_vila_u import write_checkpoint

    pipe = load(comfy, write_checkpoint(tmp_path / "vila-u"))
    images = comfy.run("HartSample", pipeline=pipe, prompt="a cat", seed=1, count=1)
    assert torch.equal(images, to_tensor(pipe("a cat", seed=1).images))
    assert comfy.updates
    rebuilt = comfy.run("HartReconstruct", pipeline=pipe, image=images, mode="the model's")
    assert rebuilt.shape == images.shape
    arguments = {"pipeline": pipe, "prompt": "a cat", "seed": 0, "count": 1}
    with pytest.raises(InputError, match="VILA-U does not edit"):
        comfy.run("HartEdit", image=images, mask=images[..., 0], **arguments)
    with pytest.raises(InputError, match="is discrete"):
        comfy.run("HartReconstruct", pipeline=pipe, image=images, mode="hybrid")
    with pytest.raises(InputError, match="no fast modes"):
        comfy.run("HartSample", **arguments, speed="fast")


def test_a_missing_model_is_one_sentence(comfy):
    with pytest.raises(FileNotFoundError, match="neither an existing folder nor a Hub id"):
        load(comfy, "nowhere")


def test_the_workflow_fits_the_nodes(comfy):
    workflow = json.loads((PACK / "workflow.json").read_text())
    for node in workflow["nodes"]:
        if node["type"] not in comfy.nodes:
            continue
        kind = comfy.nodes[node["type"]]
        declared = kind.INPUT_TYPES()
        inputs = {**declared["required"], **declared.get("optional", {})}
        widgets = [(name, given) for name, given in inputs.items() if isinstance(given[0], list) or given[0].isupper()]
        widgets = [(name, given) for name, given in widgets if given[0] not in ("HART_PIPELINE", "IMAGE", "MASK")]
        expected: list[Any] = []
        for _, given in widgets:
            expected += [given, "control"] if given[1].get("control_after_generate") else [given]
        assert len(node["widgets_values"]) == len(expected)
        for value, given in zip(node["widgets_values"], expected, strict=True):
            assert given == "control" or not isinstance(given[0], list) or value in given[0]
        assert [output["type"] for output in node["outputs"]] == list(kind.RETURN_TYPES)
