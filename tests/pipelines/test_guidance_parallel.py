"""`enable_guidance_parallel`: two processes over gloo on the CPU draw what one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hart_infer import HartPipeline, InputError, VarPipeline

MINI: dict[str, Any] = {"guidance_scale": 1.5, "seed": 5, "output_type": "pt"}
CALLS: dict[str, tuple[str, str | int | list[str], dict[str, Any]]] = {
    "guided": ("hart", "a cat", MINI),
    "a batch": ("hart", ["a cat", "two dogs"], {**MINI, "negative_prompt": "a blue cat", "reproducible": False}),
    "guidance ends": ("hart", "a cat", {**MINI, "guidance_stops_at": 10, "num_inference_steps": 2}),
    "pruned": ("hart", "a cat", {**MINI, "prune": {"drop": [0.5]}}),
    "pruned once": ("hart", "a cat", {**MINI, "prune": {"drop": [0.5], "once": True}, "guidance_stops_at": 16}),
    "no guidance": ("hart", "a cat", {**MINI, "guidance_scale": 0.0}),
    "VAR": ("var", 3, MINI),
}


def pipelines() -> dict[str, Any]:
    mini: dict[str, Any] = {"device": "cpu", "torch_dtype": torch.float32}
    made = {"hart": HartPipeline.from_pretrained("hart-mini", **mini), "var": VarPipeline.from_pretrained("var-mini", **mini)}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def draw(made: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: made[family](subject, **arguments).images for name, (family, subject, arguments) in CALLS.items()}


def one_of_two(rank: int, folder: Path) -> None:
    """What each process does; this file is its script."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    made = pipelines()
    for pipe in made.values():
        pipe.enable_guidance_parallel()
    torch.save(draw(made), folder / f"{rank}.pt")
    with pytest.raises(InputError, match="both processes must be given the same seed"):
        made["hart"]("a cat", guidance_scale=1.5, seed=rank)
    alone = [dist.new_group([each]) for each in range(2)]
    with pytest.raises(InputError, match="a group of two processes, not of 1"):
        made["hart"].enable_guidance_parallel(alone[rank])
    dist.destroy_process_group()
    made["hart"].disable_guidance_parallel()
    made["hart"]("a cat", guidance_scale=1.5)


def test_two_processes_draw_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    both = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    expected = draw(pipelines())
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, images in expected.items():
            torch.testing.assert_close(found[name], images, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(expected["guided"], expected["no guidance"])


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="call init_process_group first"):
        HartPipeline.from_pretrained("hart-mini", device="cpu").enable_guidance_parallel()


if __name__ == "__main__":
    one_of_two(int(sys.argv[2]), Path(sys.argv[1]))
