"""What the pipelines of next-scale models share: the loop with progress bar and callback, and reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal

import torch
from torch import Tensor

from ..engine.cpu import cpu_threads, threads_for
from ..engine.next_scale import Engine, TransformerT
from ..errors import InputError
from ..generation.next_scale import finish
from ..generation.sampling import make_sampler
from ..generation.schedule import Schedule
from ..images import tensors
from ..models.next_scale import Condition
from ..models.parts.autoencoder import Autoencoder
from ..models.parts.cache import KVCache
from .base import Pipeline
from .out_of_memory import check_memory, out_of_memory_advice
from .outputs import Callback, Step

if TYPE_CHECKING:
    from PIL.Image import Image


class NextScalePipeline(Pipeline, Generic[TransformerT]):
    """A transformer and an autoencoder that make pictures scale by scale."""

    def __init__(self, transformer: TransformerT, autoencoder: Autoencoder, *, name: str) -> None:
        super().__init__(name)
        self.engine = Engine(transformer, autoencoder.quantizer)
        self.autoencoder = autoencoder
        self.num_threads = threads_for(transformer)

    @property
    def transformer(self) -> TransformerT:
        """The network that the engine runs. It may be replaced, for example by `torch.compile(pipe.transformer)`."""
        return self.engine.transformer

    @transformer.setter
    def transformer(self, transformer: TransformerT) -> None:
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

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.engine.clear()
        self.transformer.to(device=device, dtype=dtype)
        self.autoencoder.to_device(device, dtype)

    def _check_memory(self, schedule: Schedule, count: int) -> None:
        """Raise OutOfMemoryError if the caches and the pixels of `count` images exceed the device's memory."""
        transformer = self.transformer
        cache = KVCache.size_in_bytes(
            depth=transformer.depth,
            rows=2 if schedule.guided else 1,
            width=transformer.width,
            length=schedule.cached_length,
            scratch_length=schedule.scratch_length,
            itemsize=transformer.dtype.itemsize,
        )
        check_memory(count, cache + 3 * 4 * self.sizes[0] ** 2, self.device)

    def _generate(
        self,
        schedule: Schedule,
        prompts: Sequence[Condition],
        negatives: Sequence[Condition] | None,
        seeds: Sequence[int],
        draw_device: torch.device,
        callback: Callback | None,
        reproducible: bool | None,
    ) -> Tensor:
        """Run the scales with progress bar and callback; return the latents [N, C, P, P] fp32, one per seed.

        Seeds are shared out over the conditions in order; `negatives` replace the unconditional condition.
        """
        self._interrupt = False
        batch_size = self._batch_size(reproducible, len(seeds))
        samplers = [make_sampler(seeds[i : i + batch_size], draw_device) for i in range(0, len(seeds), batch_size)]
        states = self.engine.start(schedule, samplers, prompts, negatives)
        try:
            with self.progress_bar(schedule, total=len(schedule)) as bar:
                for stage in bar:
                    self.engine.run_scale(states, stage)
                    if callback is not None:
                        f_hat = torch.cat([state.f_hat for state in states])
                        step = Step(stage.index, stage.side, len(schedule), f_hat, lambda f: self._decode(f, reproducible))
                        callback(step)
                        if step.stopped:
                            break
                    if self._interrupt:
                        break
            return torch.cat([finish(state) for state in states])
        finally:  # an error that someone keeps would keep the states alive, by its traceback
            for state in states:
                state.drop_cache()

    @torch.no_grad()
    def reconstruct(self, image: Image | Sequence[Image] | Tensor, mode: Literal["hybrid", "discrete"] = "hybrid") -> Any:
        """Image to tokens and back: "hybrid" decodes the continuous latent, "discrete" the codes alone (paper figure 4).

        PIL images are resized, cropped at the centre, and returned as PIL images; a tensor [N, 3, size, size] in 0..1 gives a
        tensor, fp32. Raises InputError.
        """
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
