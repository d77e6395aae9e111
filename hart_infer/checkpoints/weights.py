"""From files to modules: one rename table, one drop list, strict, by mmap, each tensor once."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointNotFoundError, WeightsError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Released name -> ours, in order; the first match wins. A trailing [i] fills part i of 3 of a bias (the released code keeps
# those of q and v apart and has none for k).
RENAMES: tuple[tuple[str, str], ...] = (
    (r"(blocks\.\d+)\.ln_wo_grad\.(.*)", r"\1.norm.\2"),
    (r"(blocks\.\d+)\.attn\.qkv_proj\.weight", r"\1.attn.qkv.weight"),
    (r"(blocks\.\d+)\.attn\.q_bias", r"\1.attn.qkv.bias[0]"),
    (r"(blocks\.\d+)\.attn\.v_bias", r"\1.attn.qkv.bias[2]"),
    (r"(blocks\.\d+)\.attn\.scale_mul_1H11", r"\1.attn.log_scale"),
    (r"(blocks\.\d+)\.ffn\.(gate|up|down)_proj\.(.*)", r"\1.mlp.\2.\3"),
    (r"(blocks\.\d+)\.ffn\.(fc[12])\.(.*)", r"\1.mlp.\2.\3"),
    (r"(blocks\.\d+)\.ada_lin\.1\.(.*)", r"\1.modulation.\2"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation_table"),
    (r"head_nm\.ln_wo_grad\.(.*)", r"head.norm.\1"),
    (r"head_nm\.ada_lin\.1\.(.*)", r"head.modulation.\1"),
    (r"head\.(weight|bias)", r"head.linear.\1"),
    (r"lvl_embed\.mlp\.0\.(.*)", r"level_embed.fc1.\1"),
    (r"lvl_embed\.mlp\.2\.(.*)", r"level_embed.fc2.\1"),
    (r"lvl_embed\.weight", r"level_embed.weight"),
    (r"diffloss\.net\.time_embed\.mlp\.0\.(.*)", r"diffusion.time_embed.fc1.\1"),
    (r"diffloss\.net\.time_embed\.mlp\.2\.(.*)", r"diffusion.time_embed.fc2.\1"),
    (r"diffloss\.net\.cond_embed\.(.*)", r"diffusion.condition_embed.\1"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.in_ln\.(.*)", r"diffusion.blocks.\1.norm.\2"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.0\.(.*)", r"diffusion.blocks.\1.fc1.\2"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.mlp\.2\.(.*)", r"diffusion.blocks.\1.fc2.\2"),
    (r"diffloss\.net\.res_blocks\.(\d+)\.adaLN_modulation\.1\.(.*)", r"diffusion.blocks.\1.modulation.\2"),
    (r"diffloss\.net\.final_layer\.adaLN_modulation\.1\.(.*)", r"diffusion.out_modulation.\1"),
    (r"diffloss\.net\.final_layer\.linear\.(.*)", r"diffusion.out_proj.\1"),
    (r"diffloss\.net\.(input_proj\..*)", r"diffusion.\1"),
    (r"vae\.(encoder|decoder)\.(down|up)\.(\d+)\.(block|attn)\.(\d+)\.(.*)", r"\1.\2_\3_\4_\5.\6"),
    (r"vae\.(encoder|decoder)\.(down|up)\.(\d+)\.((?:down|up)sample)\.(.*)", r"\1.\2_\3_\4.\5"),
    (r"vae\.(encoder|decoder)\.mid\.(\w+)\.(.*)", r"\1.mid_\2.\3"),
    (r"vae\.quantize\.embedding\.weight", r"quantizer.codebook.weight"),
    (r"vae\.quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.(.*)", r"quantizer.phi.\1.\2"),
    (r"vae\.quantize\.quant_resi\.qresi\.(.*)", r"quantizer.phi.0.\1"),
    (r"vae\.(.*)", r"\1"),
)
SECOND_RENAMES: tuple[tuple[str, str], ...] = (
    (r"(.*)\.nin_shortcut\.(.*)", r"\1.shortcut.\2"),
    (r"((?:encoder|decoder)\..*attn_\d+)\.proj_out\.(.*)", r"\1.proj.\2"),
)
# Stored, but without information: never read.
DROPPED = re.compile(r"attn_bias_for_masking|lvl_1L|blocks\.\d+\.attn\.zero_k_bias|vae\.quantize\.ema_vocab_hit_SV|disc\..*")
KEPT_IN_FP32 = re.compile(r"quantizer\..*")
CHUNK_BYTES = 256 * 2**20  # converted tensors: the mapping is dropped and made anew after so much, to bound its resident pages


def rename(name: str) -> str | None:
    """Our name for a released tensor's; None if it is not read; names of ours pass through."""
    if DROPPED.fullmatch(name):
        return None
    for pattern, replacement in (*_first_match(name), *SECOND_RENAMES):
        name = re.sub(f"^{pattern}$", replacement, name)
    return name


def _first_match(name: str) -> tuple[tuple[str, str], ...]:
    return next(((rule,) for rule in RENAMES if re.fullmatch(rule[0], name)), ())


def load_module(build: Callable[[], ModuleT], files: Iterable[Path], *, torch_dtype: torch.dtype | None) -> ModuleT:
    """Build a module on the meta device and give it the tensors of `files`.

    Tensors already in the wanted dtype stay views of the mapped file; others are converted one by one. `torch_dtype` None
    keeps the stored dtype (that of the largest tensor, for all but the quantizer, which is fp32 always). Raises
    WeightsError naming every missing, unexpected or wrong-shaped tensor.
    """
    with torch.device("meta"):
        module = build()
    files = list(files)
    torch_dtype = torch_dtype or _stored_dtype(files)
    tensors = _Checked({name: tensor.shape for name, tensor in module.state_dict().items()})
    for file in files:
        for stored_name, tensor in _tensors(file, torch_dtype):
            tensors.add(stored_name, tensor)
    problems = tensors.problems()
    if problems:
        raise WeightsError(
            f"{', '.join(str(file) for file in files)} does not fit the checkpoint's configuration; {'; '.join(problems)}."
        )
    module.load_state_dict(tensors.loaded, strict=True, assign=True)
    return module.eval().requires_grad_(False)


class _Checked:
    """Tensors under our names, as they come, and all that is wrong with them."""

    def __init__(self, expected: dict[str, torch.Size]) -> None:
        self.expected = expected
        self.loaded: dict[str, Tensor] = {}
        self._given: set[str] = set()  # as `rename` has it
        self._wrong: dict[str, list[str]] = defaultdict(list)

    def add(self, stored_name: str, tensor: Tensor) -> None:
        """Take a tensor, or its part of a merged one."""
        renamed = rename(stored_name) or ""
        name, _, part = renamed.partition("[")
        shape = self.expected.get(name)
        if shape is not None and part:
            shape = torch.Size([shape[0] // 3])
        if shape is None:
            self._wrong["unexpected"].append(stored_name)
        elif tensor.shape != shape:
            self._wrong["wrong shape"].append(f"{stored_name} has {list(tensor.shape)} instead of {list(shape)}")
        elif not tensor.is_floating_point():
            self._wrong["not floating-point"].append(f"{stored_name} ({str(tensor.dtype).removeprefix('torch.')})")
        elif self._given & {renamed, name} or (name in self.loaded and not part):
            self._wrong["given twice"].append(stored_name)
        elif part:
            merged = self.loaded.setdefault(name, torch.zeros(self.expected[name], dtype=tensor.dtype))
            merged.view(3, -1)[int(part[0])] = tensor.detach()
        else:
            self.loaded[name] = tensor.detach()
        self._given.add(renamed)

    def problems(self) -> list[str]:
        """What is wrong, kind by kind, once all tensors have come."""
        whole = {name.partition("[")[0] for name in self._given}
        missing = set(self.expected) - whole
        for given, other, name in (("[0]", "[2]", "v_bias"), ("[2]", "[0]", "q_bias")):
            partial = (item.removesuffix(given) for item in self._given if item.endswith(given))
            missing |= {item.replace("qkv.bias", name) for item in partial if item + other not in self._given}
        wrong = {"missing": missing, **self._wrong}
        return [f"{kind}: {shorten(names)}" for kind, names in wrong.items() if names]


def _tensors(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file that are read, in the dtype that they are kept in."""
    names, get = _open(file)
    limit = CHUNK_BYTES if _is_mapped(file) else math.inf
    converted = 0
    for name in names:
        if rename(name) is None:
            continue
        if converted >= limit:
            get, converted = _open(file)[1], 0
        stored = get(name)
        kept = torch.float32 if KEPT_IN_FP32.fullmatch(rename(name) or "") else dtype
        tensor = stored.to(kept if stored.is_floating_point() else stored.dtype)
        if tensor is not stored:
            converted += stored.nbytes
        del stored
        yield name, tensor


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """The dtype of the largest tensor that is read and could be computed with."""
    largest, dtype = -1, torch.float32
    for file in files:
        for name, (shape, stored) in tensor_shapes(file).items():
            size = torch.Size(shape).numel()
            if rename(name) is not None and stored in _COMPUTED and size > largest:
                largest, dtype = size, stored
    return dtype


def tensor_shapes(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a file, by its stored name, without reading the tensors."""
    if file.suffix != ".safetensors":
        names, get = _open(file)
        return {name: (tuple(get(name).shape), get(name).dtype) for name in names}
    names, _ = _open(file)  # refuses truncated files
    handle, shapes = safe_open(file, framework="pt"), {}
    for name in names:
        entry = handle.get_slice(name)
        dtype = _DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise WeightsError(f"{file}: {name} is stored as {entry.get_dtype()}, which is not supported.")
        shapes[name] = (tuple(entry.get_shape()), dtype)
    return shapes


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_COMPUTED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def _open(file: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Open a file, mapped where it can be: its tensors' names, and a function that gives one."""
    if not file.is_file():
        raise CheckpointNotFoundError(f"{file} does not exist; the checkpoint needs it.")
    try:
        if file.suffix == ".safetensors":
            handle = safe_open(file, framework="pt")
            return list(handle.keys()), handle.get_tensor
        state = _load_pickle(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is damaged or not a weights file ({error}); download or copy it again.") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WeightsError(f"{file} must hold a plain dictionary of tensors by their names.")
    return list(state), state.__getitem__


def _is_mapped(file: Path) -> bool:
    """Whether tensors are views of the file: safetensors and PyTorch's archives, not its old format."""
    with file.open("rb") as stream:
        return file.suffix == ".safetensors" or stream.read(4) == b"PK\x03\x04"


def _load_pickle(file: Path) -> object:
    """`torch.load` that runs no code; the archive is mapped unless it is in PyTorch's old format."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_mapped(file))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any kind, where the bytes are arbitrary
        raise WeightsError(
            f"{file} is not a plain file of tensors and was refused, as reading it could run code: it is damaged or holds "
            "Python objects. Download it again, or use a safetensors file."
        ) from error


def shorten(names: Iterable[object], limit: int = 8) -> str:
    """Names in order, the first few of them."""
    names = sorted(str(name) for name in names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
