"""What the pipelines of next-scale models share: the loop with progress bar and callback, and reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor

from ..checkpoints.hart import Defaults
from ..checkpoints.var import VarDefaults
from ..engine.cpu import cpu_threads, threads_for
from ..engine.graphs import CudaRecorder, Graphs
from ..engine.next_scale import Engine, TransformerT
from ..engine.packed import pack_weights, packing_refusal, unpack_weights
from ..errors import InputError
from ..generation.next_scale import as_drawn, finish
from ..generation.sampling import Sampler, check_finite, make_sampler
from ..generation.schedule import Schedule
from ..generation.speed import SPEEDS, Knobs, Prune, SpeedName, resolve
from ..images import tensors
from ..models.next_scale import Condition
from ..models.parts.autoencoder import Autoencoder, Mode
from ..models.parts.cache import KVCache
from .base import Pipeline
from .checks import check_bool, check_int, check_output_type, check_prune, check_size, check_steps, check_temperature
from .edit import NO_EDIT, Mask, PictureEdit, check_edit, check_mask, check_picture, feathered, keep_mask
from .out_of_memory import check_memory, out_of_memory_advice
from .outputs import Callback, Step, check_callback

if TYPE_CHECKING:
    from PIL.Image import Image

DECODED_PIXELS = 1024 * 1024  # decoded at once, which bounds the memory of a batch


@dataclass(frozen=True)
class Call:
    """Checked arguments that every family's call has."""

    output_type: str
    callback: Callback | None
    reproducible: bool | None
    edit: PictureEdit


class NextScalePipeline(Pipeline, Generic[TransformerT]):
    """A transformer and an autoencoder that make pictures scale by scale."""

    tokenization: Mode = "hybrid"  # what is decoded after the last scale
    defaults: Defaults | VarDefaults

    def __init__(self, transformer: TransformerT, autoencoder: Autoencoder, *, name: str) -> None:
        super().__init__(name)
        self.engine = Engine(transformer, autoencoder.quantizer)
        self.autoencoder = autoencoder
        self.num_threads = threads_for(transformer)
        self._tile: int | None = None
        self._slices = False

    @property
    def transformer(self) -> TransformerT:
        """The network that the engine runs. It may be replaced, for example by `torch.compile(pipe.transformer)`."""
        return self.engine.transformer

    @transformer.setter
    def transformer(self, transformer: TransformerT) -> None:
        self.engine.clear()
        self.engine.transformer = transformer

    @property
    def autoencoder(self) -> Autoencoder:
        """Encodes images to latents and codes, and decodes latents."""
        return self._autoencoder

    @autoencoder.setter
    def autoencoder(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self.engine.quantizer = autoencoder.quantizer

    @property
    def device(self) -> torch.device:
        """Where the parts compute."""
        return self._offloads_from or self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's dtype."""
        return self.transformer.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of the square pictures that the checkpoint was trained for."""
        config = self.autoencoder.config
        return (config.v_patch_nums[-1] * config.downsample,)

    @property
    def num_scales(self) -> int:
        """Scales of a picture, after each of which a callback is called; a fast mode may leave out the last."""
        return len(self.autoencoder.config.v_patch_nums)

    def knobs(
        self,
        speed: SpeedName = "exact",
        *,
        guidance_stops_at: int | None = None,
        late_temperature: float | None = None,
        prune: Prune | Mapping[str, Any] | None = None,
        stop_after: int | None = None,
        num_inference_steps: int | None = None,
    ) -> Knobs:
        """Return what `speed` and the knobs given in place of its own mean for this model; arguments as of a call.

        Raises InputError.
        """
        given = Knobs(
            guidance_stops_at=guidance_stops_at,
            late_temperature=None if late_temperature is None else check_temperature(late_temperature),
            prune=None if prune is None else check_prune(prune),
            stop_after=stop_after,
            num_inference_steps=None if num_inference_steps is None else check_steps(num_inference_steps),
        )
        knobs = resolve(
            speed,
            given,
            sides=self.autoencoder.config.v_patch_nums,
            depth=self.transformer.depth,
            late_temperature=self.defaults.late_temperature,
        )
        return knobs if self.tokenization == "hybrid" else replace(knobs, num_inference_steps=None)

    def _speeds(self) -> dict[str, str]:
        """Return the lines of `describe` about fast modes, {label: text}."""
        sides = self.autoencoder.config.v_patch_nums
        return {f"speed {name}": str(self.knobs(name)) for name, mode in SPEEDS.items() if len(sides) >= mode.min_scales}

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.disable_packed_weights()
        self.engine.clear()
        if device is not None and device != self.device:
            self.disable_graphs()
        self.transformer.to(device=device, dtype=dtype)
        self.autoencoder.to_device(device, dtype)

    def enable_graphs(self) -> None:
        """Run calls by CUDA graphs: the host then launches one graph a scale instead of hundreds of kernels.

        The first call of a kind runs as ever, the second is captured, later ones are replayed, with the same pictures. A kind
        is the number of pictures, the settings' kinds (guidance on or off, top-k, top-p, speed) and the dtype; prompts, seeds
        and numbers may differ. What is captured keeps its memory: docs/memory.md. Edits, and callbacks of calls that draw
        pictures one by one, run without. `disable_graphs` and moving to another device end it. Raises InputError without a CUDA
        device.
        """
        if self.device.type != "cuda":
            raise InputError(f"enable_graphs needs a CUDA device; this pipeline is on {self.device}, which has no graphs.")
        if self._offloads_from is not None:
            raise InputError("enable_graphs needs the weights to stay on the device; enable_model_cpu_offload moves them.")
        self.engine.graphs = Graphs(CudaRecorder(self.device))

    def disable_graphs(self) -> None:
        """Run eagerly again, and free what was captured."""
        self.engine.graphs = None

    def enable_packed_weights(self) -> None:
        """On a CPU in bf16: keep the transformer's weights as oneDNN multiplies them. The same pictures to the bit, faster.

        It takes a second, and no memory. Until `disable_packed_weights`, which `to` calls, the weights are no parameters:
        they are saved as ever, but can't be changed. Raises InputError where there is nothing to gain.
        """
        if reason := packing_refusal(self.device, self.transformer.dtype):
            raise InputError(f"enable_packed_weights can't help here: {reason}.")
        pack_weights(self.transformer)
        self.engine.clear()

    def disable_packed_weights(self) -> None:
        """Make the transformer's weights parameters again."""
        unpack_weights(self.transformer)

    def enable_decoder_tiling(self, tile: int | None = 32) -> None:
        """Decode in tiles of `tile` latent cells, to save memory; None turns it off.

        Approximate: group norms take a tile's statistics. docs/memory.md has what it saves and costs.
        """
        self._tile = None if tile is None else check_int(tile, "tile", 8)

    def enable_vae_tiling(self) -> None:
        """`enable_decoder_tiling` by diffusers' name."""
        self.enable_decoder_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode in one piece."""
        self.enable_decoder_tiling(None)

    def enable_vae_slicing(self) -> None:
        """Decode the images of a batch one by one, as a CPU does anyway."""
        self._slices = True

    def disable_vae_slicing(self) -> None:
        """Decode as many images at once as make up 1024 x 1024 pixels."""
        self._slices = False

    def _check_memory(self, schedule: Schedule, count: int) -> None:
        """Raise OutOfMemoryError if the caches, memories and pixels of `count` images exceed the device's memory."""
        transformer, rows = self.transformer, 2 if schedule.guided else 1
        memory = rows * schedule.remembered_vectors(transformer.depth) * transformer.width * transformer.dtype.itemsize
        cache = KVCache.size_in_bytes(
            depth=transformer.depth,
            rows=rows,
            width=transformer.width,
            length=schedule.cached_length,
            scratch_length=schedule.scratch_length,
            itemsize=transformer.dtype.itemsize,
        )
        check_memory(count, cache + memory + 3 * 4 * self.sizes[0] ** 2, self.device)

    def _check_call(
        self,
        *,
        sides: Mapping[str, int | None],
        output_type: str,
        return_dict: bool,
        callback: Any,
        reproducible: bool | None,
        edit: PictureEdit | None,
    ) -> Call:
        """Check the arguments that every family's call has; `sides` are size, height and width. Raises InputError."""
        for name, side in sides.items():
            check_size(side, self.sizes, name)
        check_output_type(output_type)
        check_bool(return_dict, "return_dict")
        if reproducible is not None:
            check_bool(reproducible, "reproducible")
        if edit is not None:
            check_edit(edit, self.sizes[0], self.autoencoder.quantizer)
        return Call(output_type, check_callback(callback, self), reproducible, edit or NO_EDIT)

    @torch.no_grad()
    def _draw(
        self,
        schedule: Schedule,
        seeds: Sequence[int],
        draw_device: torch.device,
        conditions: Callable[[], tuple[Sequence[Condition], Sequence[Condition] | None]],
        call: Call,
    ) -> Any:
        """Generate one image per seed in the form of `call`; `conditions` computes the prompts' and the negatives'."""
        with out_of_memory_advice(), cpu_threads(self.num_threads):
            with self._using(self.transformer, self.autoencoder.quantizer):
                f_hat, flags = self._generate(schedule, *conditions(), seeds, draw_device, call)
            if call.output_type == "latent":
                result: Any = f_hat
            else:
                result = tensors.FORMS[call.output_type](call.edit.blend(self._decode(f_hat, call.reproducible)))
            check_finite(flags)  # only now: the host has waited for the pictures anyway
            return result

    def _generate(
        self,
        schedule: Schedule,
        prompts: Sequence[Condition],
        negatives: Sequence[Condition] | None,
        seeds: Sequence[int],
        draw_device: torch.device,
        call: Call,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run the scales; return the latents [N, C, P, P] fp32, one per seed, and the flags of `Sampler.failed`.

        Seeds are shared out over the conditions in order; `negatives` replace the unconditional condition. Graphs run one
        generation after the other, unless a callback wants to see all of them at each scale.
        """
        batch_size = self._batch_size(call.reproducible, len(seeds))
        samplers = [make_sampler(seeds[i : i + batch_size], draw_device, schedule) for i in range(0, len(seeds), batch_size)]
        interrupts = self._interrupts  # of all generations of the call
        if self.engine.graphs is None or call.callback is not None:
            return self._run(schedule, samplers, prompts, negatives, call, interrupts)
        parts = []
        for i, sampler in enumerate(samplers):
            prompt = prompts[i * len(prompts) // len(samplers)]
            negative = None if negatives is None else [negatives[i * len(negatives) // len(samplers)]]
            parts.append(self._run(schedule, [sampler], [prompt], negative, call, interrupts))
        return torch.cat([f_hat for f_hat, _ in parts]), [flag for _, flags in parts for flag in flags]

    def _run(
        self,
        schedule: Schedule,
        samplers: Sequence[Sampler],
        prompts: Sequence[Condition],
        negatives: Sequence[Condition] | None,
        call: Call,
        interrupts: int,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run the generations of all samplers side by side, with progress bar and callback; return as `_generate`.

        It ends after a scale at which `_interrupts` is no longer `interrupts`.
        """
        callback = call.callback

        def preview(f_hat: Tensor) -> Tensor:
            return call.edit.blend(self._decode(f_hat, call.reproducible))

        edit = as_drawn if call.edit is NO_EDIT else call.edit.embedding
        states = self.engine.start(schedule, samplers, prompts, negatives, edit)
        try:
            with self.progress_bar(schedule, total=len(schedule)) as bar:
                for stage in bar:
                    self.engine.run_scale(states, stage)
                    if callback is not None:
                        f_hat = torch.cat([state.f_hat for state in states])
                        step = Step(stage.index, stage.side, len(schedule), f_hat, preview)
                        callback(step)
                        if step.stopped:
                            break
                    if self._interrupts != interrupts:
                        break
            f_hat = torch.cat([finish(state) for state in states])
            return f_hat, [state.sampler.failed(state.indices[-1]) for state in states]
        finally:  # an error that someone keeps would keep the states alive, by its traceback
            for state in states:
                state.drop_cache()

    @torch.no_grad()
    def edit(self, image: Image | Tensor, mask: Mask, *, blend: bool = True, inside: bool = True) -> PictureEdit:
        """Make the `edit` of a call: keep `image` where `mask` does not say to paint anew.

        `image`: a PIL image, resized and cropped at the centre, or a tensor [1, 3, size, size] in 0..1. `mask`: a PIL image of
        the same size, white where painted anew; a tensor of size x size pixels or P x P latent cells, 1 or True there; or a box
        (top, left, bottom, right) as shares of the side, painted anew inside or, with `inside=False`, outside. Cells of the
        latent are kept whole or not at all; `blend` puts the kept pixels back, feathered over one cell. Raises InputError.
        """
        check_bool(blend, "blend")
        size, cell = self.sizes[0], self.autoencoder.config.downsample
        pixels, source = check_picture(image, size)
        anew = check_mask(mask, side=size // cell, cell=cell, source=source, inside=check_bool(inside, "inside"))
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(self.autoencoder):
            tokens = self.autoencoder.encode(pixels.to(self.device) * 2 - 1)
        keep = keep_mask(anew, size // cell).to(self.device)
        return PictureEdit(tokens, keep, pixels.clone(), feathered(anew, cell // 2) if blend else None)

    def inpaint(self, image: Image | Tensor, mask: Mask, prompt: Any = None, *, blend: bool = True, **arguments: Any) -> Any:
        """Paint the masked part of a picture anew (VAR section 4.4), and return what a call returns.

        `image`, `mask`, `blend` as in `edit`; a box is painted anew inside. `prompt`: as a call takes it; None draws without
        prompt or class; for VAR `label` is the same. `arguments`: a call's others. Raises InputError and what a call raises.
        """
        prompt = arguments.pop("label", None) if prompt is None else prompt
        return self._call(prompt, edit=self.edit(image, mask, blend=blend), **arguments)

    def outpaint(self, image: Image | Tensor, mask: Mask, prompt: Any = None, *, blend: bool = True, **arguments: Any) -> Any:
        """Paint what is around a box anew. In any other mask white is painted anew here too, as in `inpaint`."""
        prompt = arguments.pop("label", None) if prompt is None else prompt
        return self._call(prompt, edit=self.edit(image, mask, blend=blend, inside=False), **arguments)

    @property
    def _call(self) -> Callable[..., Any]:
        """The family's call, whose arguments differ from family to family."""
        call: Any = self
        return call.__call__

    @torch.no_grad()
    def reconstruct(self, image: Image | Sequence[Image] | Tensor, mode: Mode | None = None) -> Any:
        """Image to tokens and back: "hybrid" decodes the continuous latent, "discrete" the codes alone (paper figure 4).

        None is what the family generates: "hybrid" for HART, "discrete" for VAR.
        PIL images are resized, cropped at the centre, and returned as PIL images; a tensor [N, 3, size, size] in 0..1 gives a
        tensor, fp32. Raises InputError.
        """
        mode = self.tokenization if mode is None else mode
        if mode not in ("hybrid", "discrete"):
            raise InputError(f"mode must be hybrid or discrete, not {mode!r}.")
        pixels = tensors.to_tensor(image, self.sizes[0])
        with out_of_memory_advice(), cpu_threads(self.num_threads):
            with self._using(self.autoencoder):
                latents = [self.autoencoder.latent(one.to(self.device) * 2 - 1, mode) for one in pixels.split(1)]
            rebuilt = self._decode(torch.cat(latents))
        if isinstance(image, Tensor):
            return rebuilt
        images = tensors.to_pil(rebuilt)
        return images if isinstance(image, Sequence) else images[0]

    def _decode(self, latents: Tensor, reproducible: bool | None = None) -> Tensor:
        """Latents [N, C, P, P] -> images [N, 3, H, W] fp32 in 0..1, in batches."""
        batch_size = 1 if self._slices else self._batch_size(reproducible, DECODED_PIXELS // self.sizes[0] ** 2)
        with self._using(self.autoencoder.post_quant_conv, self.autoencoder.decoder):
            parts = [self._decode_batch(part) for part in latents.split(batch_size)]
        return torch.cat(parts).add_(1).mul_(0.5)

    def _decode_batch(self, latents: Tensor) -> Tensor:
        """Latents [N, C, P, P] -> images [N, 3, H, W] in -1..1, by a graph where there are any."""

        def decode(latents: Tensor) -> Tensor:
            return self.autoencoder.decode(latents, tile=self._tile)

        graphs = self.engine.graphs
        return decode(latents) if graphs is None else graphs.call(("decode", self._tile), self.autoencoder, decode, latents)
