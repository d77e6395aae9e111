"""hart-mini on a CUDA device: kernels taken, seeds kept, pictures near the CPU's, a CUDA graph equal to eager."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline, VarPipeline, ops
from hart_infer.generation.next_scale import new_cache
from hart_infer.generation.residual import denoise, diffusion_schedule
from hart_infer.generation.schedule import hart_schedule
from hart_infer.images.tensors import to_uint8
from hart_infer.ops.registry import OPS, Where, use_backend
from tests.released_var import autoencoder_state, transformer_state, write_checkpoint

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
PROMPTS = ["a red heart, fluent style", "a pizza, noto style", "a blue circle, twemoji style"]


def load(dtype: torch.dtype) -> HartPipeline:
    pipe = HartPipeline.from_pretrained(torch_dtype=dtype, device="cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pipe: HartPipeline, **options) -> np.ndarray:
    return np.stack([np.asarray(image).astype(float) for image in pipe(PROMPTS, **options).images])


@DTYPES
def test_every_operation_that_has_kernels_runs_by_one_unless_its_table_says_why_not(dtype):
    where = Where.of(torch.zeros(1, dtype=dtype, device="cuda"))
    by = {name: operation.choose(where) for name, operation in OPS.items() if {*operation.backends} - {"cpu"}}
    assert all(choice.backend != "torch" or choice.why for choice in by.values()), {n: c.refusals for n, c in by.items()}
    assert ops.attention.choose(where, multiplicity=2, ranges=[0, 1]).backend == "triton"


@DTYPES
def test_a_seed_draws_one_picture_every_time(dtype):
    pipe = load(dtype)
    together, again = pixels(pipe, seed=3), pixels(pipe, seed=3)
    assert (together == again).all()
    assert together.std() > 20, "something was drawn"


def test_with_the_cpus_draws_the_pictures_are_the_cpus():
    """Rounding may change a code here and there, so the pictures are near, not equal."""
    generator = torch.Generator("cpu").manual_seed(5)
    there = pixels(load(torch.float32), generator=generator, guidance_scale=1.0)
    cpu = HartPipeline.from_pretrained(torch_dtype=torch.float32, device="cpu")
    here = pixels(cpu, seed=5, guidance_scale=1.0)
    error = ((there - here) ** 2).mean(axis=(1, 2, 3))
    assert np.median(error) < 400, f"mean square errors {error}"


@DTYPES
def test_kernels_and_pytorch_agree(dtype):
    """Teacher-forced hidden states of a scale; half precision rounds in other places."""
    pipe = load(dtype)
    found = {}
    for backend in ("default", "torch"):
        if backend == "torch":
            with use_backend("torch"):
                found[backend] = _scale(pipe)()
        else:
            found[backend] = _scale(pipe)()
    error = (found["default"] - found["torch"]).float().square().mean().sqrt() / found["torch"].float().square().mean().sqrt()
    assert error < {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a function, and where its replays leave the result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # once, so that nothing is compiled or loaded during the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


@DTYPES
@pytest.mark.parametrize("part", ["a scale", "the last scale", "a diffusion step", "the decoder"])
@torch.inference_mode()
def test_a_replayed_graph_equals_eager(dtype, part):
    pipe = load(dtype)
    run = {"a scale": _scale, "the last scale": _last_scale, "a diffusion step": _diffusion_step, "the decoder": _decoder}[
        part
    ](pipe)
    eager = run().clone()
    graph, result = captured(run)
    result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, eager)


@torch.inference_mode()
def test_a_replayed_draw_takes_a_new_seed_offset_and_guidance():
    logits, codebook = torch.randn(2, 9, 500, device="cuda"), torch.randn(500, 16, device="cuda")
    seed, offset = (torch.tensor([n], device="cuda") for n in (3, 0))
    numbers = {"guidance": 2.0, "top_k": 50, "top_p": 0.9, "logit_gain": 1.5, "temperature": 0.1}
    settings = ops.draw_settings(**numbers).cuda()

    def run() -> Tensor:
        return ops.guided_sample(logits, codebook, seed, offset, settings, top_k=True, top_p=True, more_smooth=True)[1]

    first = run().clone()
    graph, result = captured(run)
    seed.fill_(8)
    offset.fill_(5)
    settings.copy_(ops.draw_settings(**numbers | {"guidance": 1.0, "top_k": 7}))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, run()) and not torch.equal(result, first)


def _last_scale(pipe: HartPipeline) -> Callable[[], Tensor]:
    """Of the last scale, whose keys and values are in the scratch."""
    return _scale(pipe, -1)


@torch.inference_mode()
def _diffusion_step(pipe: HartPipeline) -> Callable[[], Tensor]:
    """The residual's network and what is behind it, guided."""
    diffusion = pipe.transformer.diffusion
    x, noise = (torch.randn(9, diffusion.channels, device="cuda") for _ in range(2))
    condition = torch.randn(18, pipe.transformer.config.embed_dim, device="cuda", dtype=pipe.transformer.dtype)
    settings = ops.draw_settings(guidance=3.0).cuda()
    embedded, step = diffusion.condition_embed(condition), diffusion_schedule(8)[0]
    time = diffusion.time_embed(torch.full((1,), step.timestep, device="cuda"))

    @torch.inference_mode()
    def run() -> Tensor:
        return denoise(diffusion, x, step, time, embedded, settings, noise)

    return run


def _decoder(pipe: HartPipeline) -> Callable[[], Tensor]:
    """From a latent to a picture."""
    side = pipe.transformer.config.patch_nums[-1]
    latent = torch.randn(1, pipe.transformer.diffusion.channels, side, side, device="cuda")

    @torch.inference_mode()
    def run() -> Tensor:
        return pipe.autoencoder.decode(latent)

    return run


@torch.inference_mode()
def _scale(pipe: HartPipeline, place: int = -2) -> Callable[[], Tensor]:
    """A function that runs a scale of hart-mini, with made-up earlier keys and values; no host access inside."""
    transformer, config = pipe.transformer, pipe.transformer.config
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=transformer.dtype)

    schedule = hart_schedule(
        config.patch_nums,
        context_tokens=config.context_token,
        share_quant_resi=pipe.autoencoder.config.share_quant_resi,
    )
    stage = schedule.stages[place]
    cache = new_cache(transformer, rows=2, length=schedule.cached_length, scratch_length=schedule.scratch_length)
    cache.keys.copy_(random(*cache.keys.shape))
    cache.values.copy_(random(*cache.values.shape))
    x = random(2, stage.length, config.embed_dim)
    mask = torch.ones(2, config.context_token, dtype=torch.bool, device="cuda")
    context = random(2, config.context_token, config.context_dim)
    condition = transformer.condition(context, mask, mask.long().cumsum(dim=1) - 1)
    (table,) = transformer.image_tables([stage.side], condition.last_position)
    where = cache.at(stage.offset, stage.length, cached=stage.cached)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return transformer(x, condition.modulation, table, where)

    return run


def test_offloading_draws_the_same_pictures():
    pipe = load(torch.float32)
    resident = pixels(pipe, seed=4)
    pipe.enable_model_cpu_offload()
    assert (pixels(pipe, seed=4) == resident).all()
    assert pipe.transformer.device.type == "cpu"


def test_contexts_without_a_system_prompt_are_finite_where_padding_is_on_the_left():
    pipe = load(torch.bfloat16)
    pipe.text_encoder.tokenizer.padding_side = "left"
    embeds = pipe.encode_prompt(["a cat", "a red heart, fluent style"], use_system_prompt=False)
    assert embeds.context.isfinite().all()


def test_pictures_leave_the_device_as_the_cpu_rounds_them():
    values = torch.rand(2, 3, 33, 17, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_uint8(values.cuda()), to_uint8(values))


@pytest.fixture
def var_folder(tmp_path):
    """A random VAR checkpoint; `write_checkpoint` says of what size."""
    return write_checkpoint(tmp_path, transformer=transformer_state(), autoencoder=autoencoder_state())


@pytest.mark.parametrize("more_smooth", [False, True])
def test_var_draws_the_cpus_codes_where_nothing_is_random(var_folder, more_smooth):
    """With the best code alone a picture is a function of the logits; their rounding changes a code here and there."""
    there, here = (VarPipeline.from_pretrained(var_folder, device=device) for device in ("cuda", "cpu"))
    options = {"top_k": 1, "top_p": 0.0, "more_smooth": more_smooth, "seed": 1, "output_type": "latent"}
    found, expected = there([1, 2], **options).images.cpu(), here([1, 2], **options).images
    assert ((found - expected).abs() < 1e-2).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_follows_its_pipeline_to_the_gpu(var_folder, dtype):
    pipe = VarPipeline.from_pretrained(var_folder, device="cpu", dtype=dtype)
    picture = torch.rand(1, 3, *pipe.sizes * 2)
    edit = pipe.edit(picture, (0, 0.5, 1, 1))
    image = pipe.to("cuda")(1, edit=edit, seed=1, output_type="pt").images.cpu()
    assert image.isfinite().all()
    assert torch.allclose(image[..., :4], picture[..., :4])  # blended, far from the box
