"""From files to modules: names, strictness, damaged and hostile files, memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hart_infer.checkpoints import weights
from hart_infer.checkpoints.autoencoder import AUTOENCODER_KEYS
from hart_infer.checkpoints.configs import config_from_dict, config_to_dict, read_config
from hart_infer.checkpoints.hart import RENAMES, TRANSFORMER_KEYS
from hart_infer.checkpoints.weights import load_module, tensor_shapes
from hart_infer.errors import CheckpointNotFoundError, WeightsError
from hart_infer.models.hart import HartConfig, HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder, AutoencoderConfig
from tests.golden.data import CHECKPOINTS, REPOSITORY, golden

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
PARTS = ("llm", "tokenizer")
DEAD = {"attn_bias_for_masking", "lvl_1L", "vae.quantize.ema_vocab_hit_SV"}
Build = Callable[[], nn.Module]


def builder(root: Path, part: str) -> Build:
    """What builds the module of a released checkpoint's part."""
    autoencoder = read_config(AutoencoderConfig, root / "tokenizer/config.json", AUTOENCODER_KEYS)
    if part == "tokenizer":
        return lambda: Autoencoder(autoencoder)
    config = read_config(HartConfig, root / "llm/config.json", TRANSFORMER_KEYS)
    return lambda: HartTransformer(config, vocab_size=autoencoder.vocab_size, channels=autoencoder.z_channels)


def keys(build: Build) -> set[str]:
    with torch.device("meta"):
        return set(build().state_dict())


def is_dead(name: str) -> bool:
    return name in DEAD or name.startswith("disc.") or name.endswith(".zero_k_bias")


@pytest.fixture
def build(hart_tiny: Path) -> Build:
    return builder(hart_tiny, "llm")


@pytest.fixture
def stored(hart_tiny: Path) -> dict[str, Tensor]:
    return load_file(hart_tiny / "llm/model.safetensors")


def write(file: Path, tensors: dict[str, Any]) -> Path:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    return file


def refusal(build: Build, *files: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_module(build, files, RENAMES, dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(file) in message for file in files)
    return message


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_released_names_become_exactly_the_modules(name: str, part: str) -> None:
    root = golden(name)
    released = tensor_shapes(root / part / "model.safetensors")
    renamed = {key: RENAMES(key) for key in released}
    assert {key for key, ours in renamed.items() if ours is None} == {key for key in released if is_dead(key)}
    live = [ours for ours in renamed.values() if ours is not None]
    assert len(set(live)) == len(live)
    expected = keys(builder(root, part))
    merged = {key for key in expected if key.endswith("attn.qkv.bias")}
    assert set(live) == (expected - merged) | {f"{key}[{i}]" for key in merged for i in (0, 2)}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_our_names_pass_through(name: str, part: str) -> None:
    expected = keys(builder(golden(name), part))
    assert {key: RENAMES(key) for key in expected} == {key: key for key in expected}


@pytest.mark.parametrize("name", ["attn_bias_for_masking.x", "my_lvl_1L", "blocks.0.attn.zero_k_bias2", "discriminator"])
def test_nothing_else_is_dropped(name: str) -> None:
    assert RENAMES(name) == name


def test_values_arrive(build: Build, hart_tiny: Path, stored: dict[str, Tensor]) -> None:
    module = load_module(build, [hart_tiny / "llm/model.safetensors"], RENAMES, dtype=torch.float32)
    state = module.state_dict()
    for name, tensor in stored.items():
        ours, _, part = (RENAMES(name) or "").partition("[")
        if ours:
            assert torch.equal(state[ours].view(3, -1)[int(part[0])] if part else state[ours], tensor), name
    assert all(not state[f"blocks.{i}.attn.qkv.bias"].view(3, -1)[1].any() for i in range(3))  # k has none
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_dead_buffers_are_never_read(hart_tiny: Path, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Spy:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.handle = safe_open(*args, **options)

        def __enter__(self) -> Spy:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Any:  # names, shapes and types: the header
            assert name in ("keys", "get_slice")
            return getattr(self.handle, name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.handle.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            return self.handle.get_slice(name)

    safe_open = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", Spy)
    for part in PARTS:
        file = hart_tiny / part / "model.safetensors"
        read.clear()
        load_module(builder(hart_tiny, part), [file], RENAMES, dtype=dtype)
        stored = set(tensor_shapes(file))
        assert any(is_dead(name) for name in stored)
        assert sorted(read) == sorted(name for name in stored if not is_dead(name))  # each live one once


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_dead_buffers_of_any_shape_and_type_are_no_problem(
    build: Build, stored: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    stored |= {"attn_bias_for_masking": torch.ones(3, dtype=torch.int8), "lvl_1L": torch.ones(2, 2)}
    load_module(build, [write(tmp_path / f"model.{suffix}", stored)], RENAMES, dtype=torch.float32)
    for name in [name for name in stored if is_dead(name)]:
        del stored[name]
    load_module(build, [write(tmp_path / f"model.{suffix}", stored)], RENAMES, dtype=torch.float32)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_all_problems_are_named_in_one_message(build: Build, stored: dict[str, Tensor], tmp_path: Path, suffix: str) -> None:
    del stored["head.weight"], stored["blocks.1.attn.v_bias"], stored["blocks.2.attn.q_bias"]
    stored["blocks.7.surprise"] = torch.ones(1)
    stored["optimizer_step"] = torch.ones(1)
    stored["word_embed.weight"] = torch.ones(8, 128)
    stored["blocks.0.attn.q_bias"] = torch.ones(7)
    stored["decoder_norm.weight"] = torch.ones(128, dtype=torch.int64)
    message = refusal(build, write(tmp_path / f"model.{suffix}", stored))
    for words in (
        "missing: blocks.1.attn.v_bias, blocks.2.attn.q_bias, head.linear.weight",
        "unexpected: blocks.7.surprise, optimizer_step",
        "blocks.0.attn.q_bias has [7] instead of [128]",
        "word_embed.weight has [8, 128] instead of [128, 8]",
        "not floating-point: decoder_norm.weight (int64)",
    ):
        assert words in message
    assert message.count("word_embed") == 1  # not missing as well


def test_a_long_list_is_cut(build: Build, stored: dict[str, Tensor], tmp_path: Path) -> None:
    few = {name: stored[name] for name in ("head.weight", "head.bias")}
    message = refusal(build, write(tmp_path / "model.safetensors", few))
    missing = len(keys(build)) - len(few)
    assert f"and {missing - 8} more" in message
    extra = stored | {f"extra.{i:03}": torch.ones(1) for i in range(100)}
    message = refusal(build, write(tmp_path / "model.safetensors", extra))
    assert "unexpected: extra.000, extra.001" in message
    assert "and 92 more" in message


def test_another_models_weights(build: Build, hart_tiny: Path) -> None:
    message = refusal(build, hart_tiny / "tokenizer/model.safetensors")
    assert "does not fit the checkpoint's configuration" in message
    assert "missing: " in message
    assert "unexpected: vae." in message


@pytest.mark.parametrize(
    "again", ["head.weight", "head.linear.weight", "blocks.0.attn.q_bias", "blocks.0.attn.qkv.bias"], ids=str
)
def test_a_tensor_given_twice(build: Build, stored: dict[str, Tensor], tmp_path: Path, again: str) -> None:
    with torch.device("meta"):
        shape = build().state_dict()[(RENAMES(again) or "").partition("[")[0]].shape
    second = {again: torch.ones(128 if again.endswith("q_bias") else shape)}
    files = write(tmp_path / "a.safetensors", stored), write(tmp_path / "b.safetensors", second)
    assert f"given twice: {again}" in refusal(build, *files)


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.bias[5]", "blocks.0.attn.qkv.bias[x]", "head.linear.weight[0]"])
def test_a_stored_name_can_not_ask_for_a_third_of_a_tensor(
    build: Build, stored: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    file = write(tmp_path / "a.safetensors", stored | {name: torch.ones(128)})
    assert f"unexpected: {name}" in refusal(build, file)


def test_memory_that_runs_out_is_not_called_damage(
    build: Build, stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried")

    file = tmp_path / "a.bin"
    torch.save(stored, file)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_module(build, [file], RENAMES, dtype=None)


def test_a_dtype_without_a_torch_counterpart(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"head.weight": np.ones((2, 2), dtype=np.uint16)}, file)
    with pytest.raises(WeightsError, match=r"model\.safetensors: head\.weight is stored as U16, which is not supported"):
        load_module(build, [file], RENAMES, dtype=None)


def test_a_missing_file(build: Build, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"gone\.safetensors does not exist; the checkpoint needs it"):
        load_module(build, [tmp_path / "gone.safetensors"], RENAMES, dtype=torch.float32)


def damage(data: bytes, how: str) -> bytes:
    header = struct.unpack("<Q", data[:8])[0] if data[:2] != b"PK" else 8
    return {
        "empty": b"",
        "one byte": data[:1],
        "only a header": data[: 8 + header],
        "half": data[: len(data) // 2],
        "one byte short": data[:-1],
        "huge header": struct.pack("<Q", 2**40) + data[8:],
        "a web page": b"<!DOCTYPE html><html>Not found</html>" * 10,
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n",
    }[how]


@pytest.mark.parametrize(
    "how", ["empty", "one byte", "only a header", "half", "one byte short", "huge header", "a web page", "a Git LFS pointer"]
)
@pytest.mark.parametrize("file", ["llm/model.safetensors", "llm/ema_model.bin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_a_damaged_file(build: Build, hart_tiny: Path, tmp_path: Path, file: str, how: str, dtype: torch.dtype | None) -> None:
    bad = tmp_path / Path(file).name
    bad.write_bytes(damage((hart_tiny / file).read_bytes(), how))
    with pytest.raises(WeightsError) as caught:
        load_module(build, [bad], RENAMES, dtype=dtype)
    assert str(caught.value).startswith(str(bad))
    assert "damaged" in str(caught.value)
    assert "ownload" in str(caught.value)


class Payload:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["instead of a tensor", "besides the tensors", "instead of the dictionary"])
def test_code_in_a_pickle_is_refused_and_not_run(build: Build, tmp_path: Path, where: str, zipped: bool) -> None:
    trap, file = tmp_path / "sprung", tmp_path / "ema_model.bin"
    state: Any = {"head.weight": Payload(trap), "head.bias": torch.ones(3)}
    if where == "besides the tensors":
        state = {"head.weight": torch.ones(3), "hook": Payload(trap)}
    if where == "instead of the dictionary":
        state = Payload(trap)
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    message = refusal(build, file)
    assert "was refused" in message
    assert "could run code" in message
    assert "safetensors" in message
    assert not trap.exists()
    torch.load(file, weights_only=False)  # the trap works
    assert trap.exists()


def test_a_bare_pickle_is_refused_and_not_run(build: Build, tmp_path: Path) -> None:
    trap, file = tmp_path / "sprung", tmp_path / "ema_model.bin"
    file.write_bytes(pickle.dumps(Payload(trap), protocol=2))
    assert "was refused" in refusal(build, file)
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["meta", "sparse", "nested", "quantized"])
def test_tensors_without_plain_numbers_are_refused(build: Build, tmp_path: Path, kind: str) -> None:
    plain = torch.ones(3, 3)
    odd: Any = {
        "meta": lambda: plain.to("meta"),
        "sparse": plain.to_sparse,
        "nested": lambda: torch.nested.nested_tensor([plain, plain]),
        "quantized": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
    }[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"word_embed.bias": plain, "word_embed.weight": odd()}, tmp_path / "model.bin")
        with pytest.raises(WeightsError, match="sparse, nested, quantized, meta|could run code"):
            load_module(build, [tmp_path / "model.bin"], RENAMES, dtype=torch.float32)


@pytest.mark.parametrize(
    "content",
    [torch.ones(3), [torch.ones(3)], {"state_dict": {"head.weight": torch.ones(3)}}, {"epoch": 3}, {0: torch.ones(3)}, None],
    ids=["tensor", "list", "nested", "number", "numbered", "none"],
)
def test_a_bin_that_is_no_state_dict(build: Build, tmp_path: Path, content: Any) -> None:
    assert "must hold a plain dictionary of tensors" in refusal(build, write(tmp_path / "model.bin", content))


def equal(module: nn.Module, other: nn.Module) -> bool:
    a, b = module.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["zip", "old", "parameters", "shards", "bin shards", "tiny chunks"])
def test_every_form_of_a_checkpoint_gives_the_same_module(
    build: Build,
    hart_tiny: Path,
    stored: dict[str, Tensor],
    tmp_path: Path,
    form: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = hart_tiny / "llm/model.safetensors"
    plain = load_module(build, [file], RENAMES, dtype=dtype)
    names = list(stored)
    halves = [{name: stored[name] for name in names[i::2]} for i in range(2)]  # q_bias and v_bias may part
    files = [tmp_path / "model.bin"]
    if form == "zip":
        write(files[0], stored)
    elif form == "old":
        torch.save(stored, files[0], _use_new_zipfile_serialization=False)
    elif form == "parameters":
        write(files[0], {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in stored.items()})
    elif form == "tiny chunks":
        monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)
        files = [file]
    else:
        suffix = "bin" if form == "bin shards" else "safetensors"
        files = [write(tmp_path / f"{i}.{suffix}", half) for i, half in enumerate(halves)]
    module = load_module(build, files, RENAMES, dtype=dtype)
    assert equal(module, plain)
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("is_archive", "times"), [(False, 1), (True, 2)])
def test_the_old_format_is_read_once(
    build: Build, stored: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_archive: bool, times: int
) -> None:
    reads: list[Path] = []
    load = weights._load_pickle
    monkeypatch.setattr(weights, "_load_pickle", lambda file: (reads.append(file), load(file))[1])
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1000)
    torch.save(stored, tmp_path / "model.bin", _use_new_zipfile_serialization=is_archive)
    load_module(build, [tmp_path / "model.bin"], RENAMES, dtype=torch.float64)
    assert min(len(reads), 2) == times


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_no_dtype_keeps_that_of_the_largest_tensor(
    build: Build, stored: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    def dtypes(**changed: torch.dtype) -> set[torch.dtype]:
        mixed = {k: v.to(changed.get(k.partition(".")[0], torch.bfloat16)) for k, v in stored.items() if not is_dead(k)}
        mixed["attn_bias_for_masking"] = torch.zeros(2**20)  # larger, but dead
        module = load_module(build, [write(tmp_path / f"model.{suffix}", mixed)], RENAMES, dtype=None)
        return {tensor.dtype for tensor in module.state_dict().values()}

    assert dtypes() == {torch.bfloat16}
    assert dtypes(head=torch.float32) == {torch.float32}  # [1024, 128] is the largest
    assert dtypes(head=torch.float8_e4m3fn) == {torch.bfloat16}  # which can't be computed in
    assert dtypes(word_embed=torch.float32, blocks=torch.float16) == {torch.bfloat16}


def test_mixed_dtypes_become_the_wanted_one(build: Build, stored: dict[str, Tensor], tmp_path: Path) -> None:
    cycle = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    mixed = {k: v.to(cycle[i % 4]) for i, (k, v) in enumerate(stored.items()) if not is_dead(k)}
    module = load_module(build, [write(tmp_path / "model.safetensors", mixed)], RENAMES, dtype=torch.float32)
    state = module.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["head.linear.weight"], mixed["head.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_quantizer_stays_in_fp32_unchanged(hart_tiny: Path, dtype: torch.dtype) -> None:
    file = hart_tiny / "tokenizer/model.safetensors"
    module = load_module(builder(hart_tiny, "tokenizer"), [file], RENAMES, dtype=dtype)
    assert isinstance(module, Autoencoder)
    stored = load_file(file)
    assert torch.equal(module.quantizer.codebook.weight, stored["vae.quantize.embedding.weight"])
    for i, phi in enumerate(module.quantizer.phi):
        for kind in ("weight", "bias"):
            assert torch.equal(getattr(phi, kind), stored[f"vae.quantize.quant_resi.qresi_ls.{i}.{kind}"])
    others = [tensor for name, tensor in module.state_dict().items() if not name.startswith("quantizer.")]
    assert {tensor.dtype for tensor in others} == {dtype}


def mapped_file(tensor: Tensor) -> str:
    """The file behind a tensor's memory; empty where it is the process's own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *file = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= tensor.data_ptr() < stop:
            return file[0] if file else ""
    raise AssertionError("the tensor's memory is mapped nowhere")


@linux
@pytest.mark.parametrize("file", ["llm/model.safetensors", "llm/ema_model.bin"])
def test_tensors_in_the_wanted_dtype_stay_views_of_the_file(build: Build, hart_tiny: Path, file: str) -> None:
    def backing(dtype: torch.dtype | None) -> dict[str, str]:
        module = load_module(build, [hart_tiny / file], RENAMES, dtype=dtype)
        return {name: mapped_file(tensor) for name, tensor in module.state_dict().items()}

    path = str((hart_tiny / file).resolve())
    for dtype in (torch.float32, None):
        found = backing(dtype)
        assert {name for name, backed in found.items() if backed != path} == {f"blocks.{i}.attn.qkv.bias" for i in range(3)}
    assert path not in backing(torch.bfloat16).values()


MEASURE = """
    import ctypes, gc, json, sys
    from pathlib import Path
    import torch
    from dataclasses import replace
    from hart_infer.checkpoints import weights
    from hart_infer.checkpoints.configs import config_from_dict, config_to_dict, read_config
    from hart_infer.checkpoints.hart import RENAMES, TRANSFORMER_KEYS
    from hart_infer.models.hart import HartConfig, HartTransformer

    def status(key):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[key].split()[0]) * 1024

    def peak(config, file, dtype):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status("VmRSS")
        module = weights.load_module(lambda: HartTransformer(config, vocab_size=64, channels=8), [file], RENAMES, dtype=dtype)
        for parameter in module.parameters():
            parameter.view(-1)[:: 4096 // parameter.element_size()].sum()  # every page, as a first call would
        return status("VmHWM") - before

    weights.CHUNK_BYTES = 8 * 2**20  # as much smaller than the real value as this checkpoint is than the real one
    root = Path(sys.argv[1])
    config = read_config(HartConfig, root / "config.json", TRANSFORMER_KEYS)
    tiny = replace(config, embed_dim=64, depth=1)
    dtypes = {"None": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    try:
        peak(tiny, root / "fp32.safetensors", torch.bfloat16)  # warms up what is imported late
    except ValueError:
        pass
    print(json.dumps([peak(config, root / file, dtypes[dtype]) for file, dtype in json.loads(sys.argv[2])]))
"""
CONVERTED, MAPPED = (0.5, 0.7), (0.99, 1.02)  # in the stored size: half of it and a chunk; all of it, once
LOADS = {
    ("fp32.safetensors", "bfloat16"): CONVERTED,
    ("fp32.safetensors", "float32"): MAPPED,
    ("fp32.safetensors", "None"): MAPPED,
    ("bf16.safetensors", "bfloat16"): MAPPED,
    ("bf16.safetensors", "None"): MAPPED,
    ("fp32.bin", "bfloat16"): CONVERTED,
    ("fp32.bin", "None"): MAPPED,
}


@pytest.fixture(scope="module")
def peaks() -> Iterator[dict[tuple[str, str], float]]:
    """Peak growth of a fresh process's resident memory by loading and first use, per live byte stored."""
    root = Path(tempfile.mkdtemp(prefix="hart-weights-"))
    try:
        live = write_large(root)
        command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(root), json.dumps(list(LOADS))]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        sizes = [live // 2 if file.startswith("bf16") else live for file, _ in LOADS]
        yield {load: peak / size for load, peak, size in zip(LOADS, json.loads(done.stdout), sizes, strict=True)}
    finally:
        shutil.rmtree(root)


def write_large(root: Path) -> int:
    """About 110 MB of live tensors in fp32, whose bytes are returned, and a dead buffer of half the size."""
    values = {"patch_nums": [1, 2, 4], "context_token": 4, "context_dim": 64, "embed_dim": 1024, "num_heads": 8, "depth": 2}
    flags = {"attn_type": "llama", "mlp_type": "llama", "disable_aln": True, "diff_width": 64}
    config = config_from_dict(HartConfig, values | flags, TRANSFORMER_KEYS)
    (root / "config.json").write_text(json.dumps(config_to_dict(config, TRANSFORMER_KEYS)))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in HartTransformer(config, vocab_size=64, channels=8).state_dict().items()}
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    live = sum(tensor.nbytes for tensor in state.values())
    state["attn_bias_for_masking"] = torch.ones(live // 8)
    write(root / "fp32.safetensors", state)
    write(root / "fp32.bin", state)
    write(root / "bf16.safetensors", {name: tensor.bfloat16() for name, tensor in state.items()})
    return live


@linux
@pytest.mark.parametrize("load", LOADS, ids=" as ".join)
def test_loading_peaks_below_1_3_times_the_size(peaks: dict[tuple[str, str], float], load: tuple[str, str]) -> None:
    low, high = LOADS[load]
    assert high < 1.3  # what the issue asks
    assert low < peaks[load] < high
