"""What a pipeline of a next-scale model holds, how that is executed, and what the autoencoder does by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.cpu import cpu_threads, keep_freed_memory, threads_for
from ..engine.graphs import CudaRecorder, Graphs
from ..engine.next_scale import Engine, TransformerT
from ..engine.packed import pack_weights, packing_refusal, unpack_weights
from ..errors import InputError
from ..generation.halves import Pair
from ..images import tensors
from ..models.parts.autoencoder import Autoencoder, Mode
from .base import Pipeline
from .checks import check_int
from .out_of_memory import out_of_memory_advice

if TYPE_CHECKING:
    from PIL.Image import Image

DECODED_PIXELS = 1024 * 1024  # decoded at once, which bounds the memory of a batch


class NetworksPipeline(Pipeline, Generic[TransformerT]):
    """A transformer in its engine, and an autoencoder."""

    tokenization: Mode = "hybrid"  # what is decoded after the last scale

    def __init__(self, transformer: TransformerT, autoencoder: Autoencoder, *, name: str) -> None:
        super().__init__(name)
        self.engine = Engine(transformer, autoencoder.quantizer)
        self.autoencoder = autoencoder
        self.num_threads = threads_for(transformer)
        if self.num_threads is not None and transformer.device.type == "cpu":
            keep_freed_memory()
        self._pair: Pair | None = None
        self._tile: int | None = None
        self._slices = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the other process, for copies and pickles."""
        return super().__getstate__() | {"_pair": None}

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

    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        self.disable_packed_weights()
        self.engine.clear()
        before = self.device
        self.transformer.to(device=device, dtype=dtype)
        self.autoencoder.to_device(device, dtype)
        if self.device != before:
            self.disable_graphs()

    def enable_graphs(self) -> None:
        """Run calls by CUDA graphs: the host then launches one graph a scale instead of hundreds of kernels.

        The first call of a kind runs as ever, the second is captured, later ones are replayed, with the same pictures. A kind
        is the number of pictures, the settings' kinds (guidance on or off, top-k, top-p, speed) and the dtype; prompts, seeds
        and numbers may differ. What is captured keeps its memory: docs/memory.md. Edits, and callbacks of calls that draw
        pictures one by one, run without. `disable_graphs` and moving to another device end it. Raises InputError without a CUDA
        device, and with `enable_guidance_parallel`.
        """
        if self.device.type != "cuda":
            raise InputError(f"enable_graphs needs a CUDA device; this pipeline is on {self.device}, which has no graphs.")
        if self._offloads_from is not None:
            raise InputError("enable_graphs needs the weights to stay on the device; enable_model_cpu_offload moves them.")
        if self._pair is not None:
            raise InputError("enable_graphs and enable_guidance_parallel exclude each other: graphs exchange nothing.")
        self.engine.graphs = Graphs(CudaRecorder(self.device))

    def disable_graphs(self) -> None:
        """Run eagerly again, and free what was captured."""
        self.engine.graphs = None

    def enable_guidance_parallel(self, group: dist.ProcessGroup | None = None) -> None:
        """Share every picture between two processes: one computes the conditional half, one the other.

        `group`: two processes with a device each, by default all there are (`torchrun --nproc-per-node 2`), whose backend fits
        the device: nccl for CUDA, gloo for CPUs. Both make the same calls, in one thread, with the same arguments, `seed` and
        callbacks or none, and both return the pictures. These may differ from one process's, as products of half the rows round
        apart. It is meant to save time, which is not measured, and saves no memory; prefill, residual diffusion, decoding and
        calls without guidance are done by both. An error or an interruption in one process alone leaves the other waiting, as
        long as the group does; make both anew then. `disable_guidance_parallel()` ends it. Raises InputError where there are no
        two processes, and with `enable_graphs`.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise InputError("enable_guidance_parallel needs torch.distributed; call init_process_group first, under torchrun.")
        if (size := dist.get_world_size(group)) != 2:
            raise InputError(f"enable_guidance_parallel needs a group of two processes, this one among them, not of {size}.")
        if self.engine.graphs is not None:
            raise InputError("enable_graphs and enable_guidance_parallel exclude each other: graphs exchange nothing.")
        self._pair = Pair(group)

    def disable_guidance_parallel(self) -> None:
        """Compute both halves in this process again."""
        self._pair = None

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
            with self._using(*self.autoencoder.children()):  # not the whole: a call that draws may hold a part
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
