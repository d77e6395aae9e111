"""`enable_guidance_parallel`: two processes over gloo on the CPU draw what one does."""

from __future__ import annotations

import copy
import subprocess
import sys
from datetime import timedelta
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
    "pruned": ("hart", "a cat", {**MINI, "prune": {"drop": [0.5]}, "guidance_stops_at": 16}),
    "pruned once": ("hart", "a cat", {**MINI, "prune": {"drop": [0.5], "once": True}}),
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
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    made = pipelines()
    pipe = made["hart"]
    for each in made.values():
        each.enable_guidance_parallel()
    torch.save(draw(made), folder / f"{rank}.pt")

    rows: list[int] = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda block, given: rows.append(len(given[0])))
    pipe("a cat", **MINI)
    assert rows == [1] * 6  # the prefill's, and five scales of two rows without sharing
    rows.clear()
    pipe("a cat", **MINI, guidance_stops_at=10)
    assert rows == [1] * (4 if rank else 6)  # the second has none at the last two
    hook.remove()

    two = {"guidance_scale": 1.5, "seed": 5, "num_images_per_prompt": 2}
    only_one: list[tuple[str, dict[str, Any]]] = [
        ("a cat", {**two, "seed": rank}),
        ("a dog" if rank else "a cat", two),
        ("a cat", {**two, "edit": pipe.edit(torch.full((1, 3, 128, 128), 0.5), (0, 0, 0.5, 0.5 + 0.25 * rank))}),
        ("a cat", {**two, "top_k": 5 + rank}),
        ("a cat", {**two, "callback_on_step_end": print if rank else None}),
    ]
    for prompt, arguments in only_one:
        with pytest.raises(InputError, match="both processes must make the same call"):
            pipe(prompt, **arguments)

    sides: list[int] = []

    def stop(step: Any) -> None:
        sides.append(step.side)
        if rank and step.side == 4:
            step.stop()

    pipe("a cat", **two, callback_on_step_end=stop)
    assert sides == [1, 2, 4], "the first process ends with the second"

    copied = copy.deepcopy(pipe)
    alone = [dist.new_group([each]) for each in range(2)]
    with pytest.raises(InputError, match="a group of two processes, this one among them, not of 1"):
        pipe.enable_guidance_parallel(alone[rank])
    pipe.engine.graphs = object()
    with pytest.raises(InputError, match="exclude each other"):
        pipe.enable_guidance_parallel()
    dist.destroy_process_group()
    copied("a cat", guidance_scale=1.5)  # alone


def test_two_processes_draw_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    both = [subprocess.Popen([*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        expected = draw(pipelines())
        said = [process.communicate(timeout=300)[1].decode() for process in both]
        assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    finally:
        for process in both:
            process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, images in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], images, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(expected["guided"], expected["no guidance"])


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="call init_process_group first"):
        HartPipeline.from_pretrained("hart-mini", device="cpu").enable_guidance_parallel()


if __name__ == "__main__":
    one_of_two(int(sys.argv[2]), Path(sys.argv[1]))
