"""How the pipelines of next-scale models draw and edit: knobs, checks, the loop with progress bar and callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.hart import Defaults
from ..checkpoints.var import VarDefaults
from ..engine.cpu import cpu_threads
from ..engine.next_scale import TransformerT
from ..errors import InputError
from ..generation.halves import Pair, described, in_step, split_guidance
from ..generation.next_scale import Edit, Generation, as_drawn, finish
from ..generation.sampling import check_finite, make_sampler
from ..generation.schedule import Schedule
from ..generation.speed import SPEEDS, Knobs, Prune, SpeedName, resolve
from ..images import tensors
from ..models.next_scale import Condition
from ..models.parts.cache import KVCache
from .checks import check_bool, check_output_type, check_prune, check_size, check_steps, check_temperature
from .edit import NO_EDIT, Mask, PictureEdit, check_edit, check_mask, check_picture, feathered, keep_mask
from .networks import NetworksPipeline
from .out_of_memory import check_memory, out_of_memory_advice
from .outputs import Callback, Step, check_callback

if TYPE_CHECKING:
    from PIL.Image import Image
    from tqdm import tqdm


@dataclass(frozen=True)
class Call:
    """Checked arguments that every family's call has."""

    output_type: str
    callback: Callback | None
    reproducible: bool | None
    edit: PictureEdit
    interrupts: int  # that the pipeline had counted when the call began
    pair: Pair | None  # who shares the guidance halves


class NextScalePipeline(NetworksPipeline[TransformerT]):
    """A transformer and an autoencoder that make pictures scale by scale."""

    defaults: Defaults | VarDefaults

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

    def _check_memory(self, schedule: Schedule, count: int, call: Call) -> None:
        """Raise OutOfMemoryError if the pixels of a call's `count` images, and the caches and memories of those that run at
        once, exceed the device's memory."""
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
        pixels, needed = 3 * 4 * self.sizes[0] ** 2, cache + memory
        if call.callback is None and self._batch_size(call.reproducible, count) == 1:
            check_memory(count, pixels, self.device, bytes_once=needed)
        else:
            check_memory(count, pixels + needed, self.device)

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
        return Call(output_type, check_callback(callback, self), reproducible, edit or NO_EDIT, self._interrupts, self._pair)

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
                images, flags = self._generate(schedule, *conditions(), seeds, draw_device, call)
            if call.output_type != "latent":
                images = call.edit.blend(self._decode(images, call.reproducible))
            if len(images) < len(seeds):
                images = torch.cat([images, images.new_zeros(len(seeds) - len(images), *images.shape[1:])])
            result: Any = images if call.output_type == "latent" else tensors.FORMS[call.output_type](images)
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
        """Run the scales; return the latents [N, C, P, P] fp32 and the flags of `Sampler.failed`.

        There is a latent for every seed, unless the call was interrupted: then for those that were begun.

        Seeds are shared out over the conditions in order; `negatives` replace the unconditional condition. What does not go
        through the networks together runs one after the other, with one cache at a time, unless a callback wants to see all
        of it at each scale.
        """
        batch_size = self._batch_size(call.reproducible, len(seeds))
        samplers = [make_sampler(seeds[i : i + batch_size], draw_device, schedule) for i in range(0, len(seeds), batch_size)]
        edit: Edit = as_drawn if call.edit is NO_EDIT else call.edit.embedding
        watched = call.callback is not None
        if call.pair is not None:
            description = (list(seeds), batch_size, draw_device.type, call.edit.digest(), watched, described(schedule))
            inputs = torch.cat([condition.inputs.flatten(0, 1) for condition in (*prompts, *(negatives or ()))])
            if not call.pair.agrees(description, inputs):
                raise InputError("With enable_guidance_parallel both processes must make the same call, with the same seed.")
            schedule, edit = split_guidance(schedule, call.pair), in_step(edit, call.pair)
        started = self.engine.start(schedule, samplers, prompts, negatives, edit, side_by_side=watched)
        turns: Iterable[Iterable[Generation]] = [started] if watched else ([each] for each in started)
        latents: list[Tensor] = []
        flags: list[Tensor | None] = []
        with self.progress_bar(total=len(schedule) * (1 if watched else len(samplers))) as bar:
            for generations in turns:
                self._run(schedule, generations, call, bar, latents, flags)
                if self._interrupts != call.interrupts:
                    break
        return torch.cat(latents), flags

    def _run(
        self,
        schedule: Schedule,
        generations: Iterable[Generation],
        call: Call,
        bar: tqdm[Any],
        latents: list[Tensor],
        flags: list[Tensor | None],
    ) -> None:
        """Run generations side by side, with the call's callback; add their latents and flags.

        It ends after a scale at which `_interrupts` is no longer the call's.
        """
        callback = call.callback

        def preview(f_hat: Tensor) -> Tensor:
            return call.edit.blend(self._decode(f_hat, call.reproducible))

        states: list[Generation] = []
        try:
            states.extend(generations)
            for stage in schedule:
                self.engine.run_scale(states, stage)
                bar.update()
                stopped = False
                if callback is not None:
                    f_hat = torch.cat([state.f_hat for state in states])
                    step = Step(stage.index, stage.side, len(schedule), f_hat, preview)
                    callback(step)
                    stopped = step.stopped
                stopped = stopped or self._interrupts != call.interrupts
                if callback is not None and call.pair is not None:
                    stopped = call.pair.any(stopped, self.device)
                if stopped:
                    break
            latents.append(torch.cat([finish(state) for state in states]))  # a copy, as graphs write to it again
            flags += [state.sampler.failed(state.indices[-1]) for state in states]
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
        parts = self.autoencoder.children()  # not the whole: a call that draws may hold one
        with out_of_memory_advice(), cpu_threads(self.num_threads), self._using(*parts):
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
