"""Load modules from weight files: strictly, by mmap, each tensor once, renamed by a family's table."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointNotFoundError, WeightsError, is_out_of_memory

ModuleT = TypeVar("ModuleT", bound=nn.Module)

CHUNK_BYTES = 256 * 2**20  # reopen the file after converting so many bytes, to bound the mapping's resident pages


class RenameTable:
    """Maps the names of a family's released files to ours; our names pass through."""

    def __init__(
        self,
        rules: Sequence[tuple[str, str]],
        *,
        then: Sequence[tuple[str, str]] = (),
        dropped: str = "(?!)",
        kept_in_fp32: str = "(?!)",
        batched: str = "(?!)",
        zero: str = "(?!)",
    ) -> None:
        """Take patterns that match whole names: the first of `rules` that matches applies, then all of `then`.

        A name that ends in [i] is third i of a merged tensor's rows. `dropped`: stored names, never read. `kept_in_fp32`: our
        names, in fp32 whatever the dtype. `batched`: our names, stored with leading dimensions of 1 that the module's tensors
        lack. `zero`: our names with [i], thirds that no file stores.
        """
        self._rules = [(re.compile(pattern), replacement) for pattern, replacement in rules]
        self._then = [(re.compile(f"^{pattern}$"), replacement) for pattern, replacement in then]
        self._dropped, self._kept_in_fp32, self._batched = map(re.compile, (dropped, kept_in_fp32, batched))
        self._zero, self._read = re.compile(zero), re.compile(".*")

    def only(self, pattern: str) -> RenameTable:
        """Return a table that reads just the stored names that match the pattern: those of one of a file's modules."""
        table = copy(self)
        table._read = re.compile(pattern)
        return table

    def __call__(self, name: str) -> str | None:
        """Return our name for a stored tensor's; None if it is not read."""
        if self._dropped.fullmatch(name) or not self._read.fullmatch(name):
            return None
        for pattern, replacement in self._rules:
            if match := pattern.fullmatch(name):
                name = match.expand(replacement)
                break
        for pattern, replacement in self._then:
            name = pattern.sub(replacement, name)
        return name

    def is_kept_in_fp32(self, name: str) -> bool:
        """Return whether a tensor, by our name, is in fp32 whatever the dtype."""
        return self._kept_in_fp32.fullmatch(name) is not None

    def is_batched(self, name: str) -> bool:
        """Return whether a tensor, by our name, may be stored with leading dimensions of 1."""
        return self._batched.fullmatch(name) is not None

    def is_zero(self, name: str) -> bool:
        """Return whether a third of a merged tensor, by our name with [i], is zero where it is not stored."""
        return self._zero.fullmatch(name) is not None


def load_module(
    build: Callable[[], ModuleT], files: Iterable[Path], rename: RenameTable, *, dtype: torch.dtype | None
) -> ModuleT:
    """Build a module on the meta device and give it the tensors of `files`.

    Tensors already in the wanted dtype stay views of the mapped file; others are converted one by one. `dtype` None: the
    largest tensor's stored dtype, except for tensors kept in fp32. Returns the module in eval mode, without gradients. Raises
    WeightsError naming every missing, unexpected or wrong-shaped tensor, CheckpointNotFoundError for a missing file.
    """
    with torch.device("meta"):
        module = build()
    files = list(files)
    dtype = dtype or _stored_dtype(files, rename)
    tensors = _Checked({name: tensor.shape for name, tensor in module.state_dict().items()}, rename)
    for file in files:
        for stored_name, tensor in _tensors(file, rename, dtype):
            tensors.add(stored_name, tensor)
    problems = tensors.problems()
    if problems:
        raise WeightsError(
            f"{', '.join(str(file) for file in files)} does not fit the checkpoint's configuration; {'; '.join(problems)}."
        )
    module.load_state_dict(tensors.loaded, strict=True, assign=True)
    return module.eval().requires_grad_(False)


class _Checked:
    """Collects renamed tensors and records mismatches."""

    def __init__(self, expected: dict[str, torch.Size], rename: RenameTable) -> None:
        self.expected = expected
        self._rename = rename
        self.loaded: dict[str, Tensor] = {}
        self._given: set[str] = set()  # renamed, [i] included
        self._wrong: dict[str, list[str]] = defaultdict(list)

    def add(self, stored_name: str, tensor: Tensor) -> None:
        """Add a tensor, or a third of a merged one."""
        renamed = self._rename(stored_name) or ""
        name, _, part = ("", "", "") if "[" in stored_name else renamed.partition("[")
        shape = self.expected.get(name)
        if shape is not None and part:
            shape = torch.Size([shape[0] // 3, *shape[1:]])
        while shape is not None and self._rename.is_batched(name) and tensor.dim() > len(shape) and len(tensor) == 1:
            tensor = tensor[0]
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
            merged.unflatten(0, (3, -1))[int(part[0])] = tensor.detach()
        else:
            self.loaded[name] = tensor.detach()
        self._given.add(renamed)

    def problems(self) -> list[str]:
        """Return what is wrong, by kind, once all tensors are added."""
        names = {name.partition("[")[0] for name in self._given}
        missing = set(self.expected) - names
        for name in names & self.expected.keys() - self._given:  # given in thirds
            absent = (i for i in range(3) if f"{name}[{i}]" not in self._given and not self._rename.is_zero(f"{name}[{i}]"))
            missing |= {name.replace("qkv.", f"{'qkv'[i]}_") for i in absent}
        wrong = {"missing": missing, **self._wrong}
        return [f"{kind}: {shorten(names)}" for kind, names in wrong.items() if names]


def _tensors(file: Path, rename: RenameTable, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield stored name and tensor of one file's used tensors, cast to the dtype that they are kept in."""
    names, get = _open(file)
    limit = CHUNK_BYTES if _is_mapped(file) else math.inf
    converted = 0
    for name in names:
        ours = rename(name)
        if ours is None:
            continue
        if converted >= limit:
            get, converted = _open(file)[1], 0
        stored = get(name)
        kept = torch.float32 if rename.is_kept_in_fp32(ours) else dtype
        tensor = stored.to(kept if stored.is_floating_point() else stored.dtype)
        if tensor is not stored or ours.endswith("]"):  # copied
            converted += stored.nbytes
        del stored
        yield name, tensor


def _stored_dtype(files: list[Path], rename: RenameTable) -> torch.dtype:
    """Return the dtype of the largest used tensor among those of a dtype in _COMPUTED; fp32 if there is none."""
    largest, dtype = -1, torch.float32
    for file in files:
        for name, (shape, stored) in tensor_shapes(file).items():
            size = torch.Size(shape).numel()
            if rename(name) is not None and stored in _COMPUTED and size > largest:
                largest, dtype = size, stored
    return dtype


def tensor_shapes(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor in a file, by stored name; of safetensors only the header is read.

    Raises CheckpointNotFoundError or WeightsError.
    """
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


def read_tensor(file: Path, name: str) -> Tensor:
    """Return one tensor of a file, by its stored name. Raises CheckpointNotFoundError or WeightsError."""
    names, get = _open(file)
    if name not in names:
        raise WeightsError(f"{file} has no tensor {name}.")
    return get(name)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_COMPUTED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def _open(file: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """Open a file, mapped if it can be; return its tensors' names, and a function from a name to its tensor."""
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
    odd = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if odd:
        raise WeightsError(
            f"{file} holds tensors without plain numbers in main memory (sparse, nested, quantized, meta): {shorten(odd)}."
        )
    return list(state), state.__getitem__


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is plain, strided and on the CPU."""
    is_strided = not tensor.is_nested and tensor.layout is torch.strided
    return is_strided and tensor.device.type == "cpu" and not tensor.is_quantized and type(tensor) in (Tensor, nn.Parameter)


def _is_mapped(file: Path) -> bool:
    """Return whether tensors are views of the file: for safetensors and PyTorch's archives, not for its old format."""
    with file.open("rb") as stream:
        return file.suffix == ".safetensors" or stream.read(4) == b"PK\x03\x04"


def _load_pickle(file: Path) -> object:
    """Load a file by `torch.load` without running code; it is mapped unless it is in PyTorch's old format."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_mapped(file))
    except OSError:
        raise
    except Exception as error:  # arbitrary bytes can raise anything
        if is_out_of_memory(error):
            raise
        raise WeightsError(
            f"{file} is not a plain file of tensors and was refused, as reading it could run code: it is damaged or holds "
            "Python objects. Download it again, or use a safetensors file."
        ) from error


def shorten(names: Iterable[object], limit: int = 8) -> str:
    """Join the first `limit` names in sorted order, and count the others."""
    names = sorted(str(name) for name in names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
