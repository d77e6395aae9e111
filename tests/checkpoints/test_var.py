"""VAR's files: what follows from tensors, hostile contents, choice among several, the project's own layout, the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from torch import Tensor

from hart_infer import HartPipeline, VarPipeline
from hart_infer.checkpoints import weights
from hart_infer.checkpoints.hub import HubOptions
from hart_infer.checkpoints.var import RENAMES, find_checkpoint, is_var
from hart_infer.checkpoints.weights import tensor_shapes
from hart_infer.errors import CheckpointNotFoundError, ConfigError, HartError, InputError, WeightsError
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.var import VarTransformer
from tests.golden.data import VAR_CHECKPOINTS
from tests.golden.recorded_var import released_folder
from tests.hub import HubServer
from tests.released_var import (
    CHANNELS,
    CLASSES,
    DEPTH,
    HEADS,
    SHARES,
    SIDES,
    VOCABULARY,
    WIDTH,
    autoencoder_state,
    transformer_state,
    write_checkpoint,
)

REPO = "FoundationVision/var"
State = dict[str, Any]
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the released layout. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("released"))


@pytest.fixture
def folder(tmp_path: Path, released: Path) -> Path:
    """A folder of the test's own, with links to the released files."""
    own = tmp_path / "own"
    own.mkdir()
    for file in released.iterdir():
        (own / file.name).symlink_to(file)
    return own


def load(path: Path | str, **options: Any) -> VarPipeline:
    pipe = VarPipeline.from_pretrained(path, **{"device": "cpu", **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def put(folder: Path, name: str, content: Any) -> None:
    """Replace a file, which may be a link."""
    (folder / name).unlink(missing_ok=True)
    torch.save(content, folder / name)


def refusal(path: Path | str, kind: type[HartError] = WeightsError, **options: Any) -> str:
    """The one sentence or two with which a checkpoint is refused."""
    with pytest.raises(kind) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert message.endswith(".")
    return message


def state(pipe: VarPipeline) -> dict[str, Tensor]:
    return {f"{part}.{name}": t for part, module in pipe.components.items() for name, t in module.state_dict().items()}


def assert_identical(pipe: VarPipeline, other: VarPipeline) -> None:
    ours, theirs = state(pipe), state(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, torch.equal(tensor, theirs[name])) == (theirs[name].dtype, True), name


# Names and what follows from them.


@pytest.mark.golden
@pytest.mark.parametrize("name", VAR_CHECKPOINTS)
def test_released_names_become_exactly_the_modules(name: str, tmp_path: Path) -> None:
    found = find_checkpoint(released_folder(name, tmp_path / "var"))
    parts: list[tuple[Path, Callable[[], torch.nn.Module]]] = [
        (found.transformer_files[0], lambda: VarTransformer(found.transformer, vocab_size=1024, channels=8)),
        (found.autoencoder_files[0], lambda: Autoencoder(found.autoencoder)),
    ]
    for file, build in parts:
        renamed = {key: RENAMES(key) for key in tensor_shapes(file)}
        dead = {key for key, ours in renamed.items() if ours is None}
        assert dead == {key for key in renamed if is_dead(key)}
        live = [ours for ours in renamed.values() if ours is not None]
        assert len(set(live)) == len(live)
        with torch.device("meta"):
            expected = set(build().state_dict())
        merged = {key for key in expected if key.endswith("attn.qkv.bias")}
        assert set(live) == (expected - merged) | {f"{key}[{i}]" for key in merged for i in (0, 2)}


def is_dead(name: str) -> bool:
    dead = ("attn_bias_for_masking", "lvl_1L", "quantize.ema_vocab_hit_SV")
    return name in dead or name.endswith(".zero_k_bias")


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "sides", "shared"),
    [
        ("var-tiny", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), False),
        ("var-tiny-shared", (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), True),
    ],
)
def test_released_schedules_follow_from_tensors(name: str, sides: tuple[int, ...], shared: bool, tmp_path: Path) -> None:
    """And one autoencoder's file serves both, whatever number of scales its hit counts have."""
    found = find_checkpoint(released_folder(name, tmp_path / "var"))
    assert found.transformer.patch_nums == found.autoencoder.v_patch_nums == sides
    assert (found.transformer.shared_aln, found.transformer.num_classes) == (shared, 10)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("share", [4, 1, 0])
def test_everything_follows_from_tensors(tmp_path: Path, shared: bool, share: int) -> None:
    folder = write_checkpoint(
        tmp_path, variant="d99", transformer=transformer_state(shared=shared), autoencoder=autoencoder_state(share=share)
    )
    pipe = load(folder)
    config, autoencoder = pipe.transformer.config, pipe.autoencoder.config
    assert (config.patch_nums, config.num_classes, config.embed_dim) == (SIDES, CLASSES, WIDTH)
    assert (config.num_heads, config.depth, config.mlp_ratio, config.shared_aln) == (HEADS, DEPTH, 4.0, shared)
    assert (autoencoder.v_patch_nums, autoencoder.vocab_size, autoencoder.z_channels) == (SIDES, VOCABULARY, CHANNELS)
    assert (autoencoder.ch, autoencoder.ch_mult, autoencoder.share_quant_resi) == (32, (1, 1, 1), share)
    assert len(pipe.autoencoder.quantizer.phi) == (share or len(SIDES))
    stored = autoencoder_state(share=share)
    for i, phi in enumerate(pipe.autoencoder.quantizer.phi):
        assert torch.equal(phi.weight, stored[f"{SHARES[share].format(i)}.weight"])
    assert pipe(0, seed=0, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize("depth", [1, 11])
def test_depth_is_that_of_the_blocks_and_not_of_the_name(tmp_path: Path, depth: int) -> None:
    """Eleven, so that block 10 comes before block 2 in the order of names."""
    folder = write_checkpoint(tmp_path, variant="d2", transformer=transformer_state(depth=depth))
    assert load(folder).transformer.depth == depth


def test_values_arrive(released: Path) -> None:
    pipe = load(released)
    transformer, ours = torch.load(released / "var_test.pth"), pipe.transformer.state_dict()
    for name, tensor in transformer.items():
        mapped, _, part = (RENAMES(name) or "").partition("[")
        if mapped:
            stored = ours[mapped].view(3, -1)[int(part[0])] if part else ours[mapped]
            assert torch.equal(stored.flatten(), tensor.flatten()), name
    assert torch.equal(pipe.autoencoder.quantizer.codebook.weight, autoencoder_state()["quantize.embedding.weight"])


def test_dead_buffers_may_be_missing_or_of_any_shape(tmp_path: Path) -> None:
    transformer, autoencoder = transformer_state(), autoencoder_state()
    expected = load(write_checkpoint(tmp_path / "whole"))
    odd = {"attn_bias_for_masking": torch.ones(3, dtype=torch.int8), "blocks.0.attn.zero_k_bias": torch.ones(2, 2)}
    assert_identical(load(write_checkpoint(tmp_path / "odd", transformer=transformer | odd)), expected)
    for name in [name for name in transformer if is_dead(name) and name != "lvl_1L"]:
        del transformer[name]
    del autoencoder["quantize.ema_vocab_hit_SV"]
    few = write_checkpoint(tmp_path / "few", transformer=transformer, autoencoder=autoencoder)
    assert_identical(load(few), expected)


@linux
def test_tensors_stay_views_of_the_pickles(released: Path) -> None:
    pipe = load(released)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [[int(end, 16) for end in m[0].split("-")] for m in maps if m[-1] == str((released / "var_test.pth").resolve())]
    for name, tensor in pipe.transformer.state_dict().items():
        mapped = any(start <= tensor.data_ptr() < stop for start, stop in spans)
        assert mapped != name.endswith("qkv.bias"), name


# Hostile contents.


def levels(sides: tuple[int, ...] = SIDES) -> Tensor:
    return torch.cat([torch.full((side * side,), i) for i, side in enumerate(sides)])[None]


BAD_LEVELS: dict[str, Callable[[], Tensor]] = {
    "negative": lambda: levels() - 1,
    "unsorted": lambda: levels().flip(1),
    "mixed": lambda: levels()[:, torch.randperm(levels().shape[1], generator=torch.Generator().manual_seed(0))],
    "not squares": lambda: levels()[:, :-1],
    "floats": lambda: levels().float(),
    "int32": lambda: levels().int(),
    "booleans": lambda: levels() > 0,
    "nan": lambda: torch.full((1, 130), torch.nan),
    "empty": lambda: torch.zeros(1, 0, dtype=torch.int64),
    "no dimension": lambda: torch.tensor(3),
    "a number beyond all": lambda: torch.full((1, 130), 2**62),
    "one number too large": lambda: torch.cat([levels(), torch.full((1, 1), 2**40)], dim=1),
    "long": lambda: torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**30),
    "long in two dimensions": lambda: torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2**30),
    "more than memory holds": lambda: torch.arange(1000)[:, None].expand(1000, 2**40),
}


@pytest.mark.parametrize("how", BAD_LEVELS)
def test_levels_that_count_off_no_squares(folder: Path, how: str) -> None:
    put(folder, "var_test.pth", transformer_state() | {"lvl_1L": BAD_LEVELS[how]()})
    assert "is not a VAR transformer: " in refusal(folder)


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        ((1, 0, 2), "must rise from 1"),
        ((1,), "must rise from 1 and have at least two entries"),
        ((2, 3), "must rise from 1"),
        ((1, 3, 2), "must rise from 1"),
        ((1, 2, 2), "must rise from 1"),
        (tuple(range(1, 66)), "at most 64 entries of at most 1024, not 65 sides"),
        ((1, 1025), "at most 64 entries of at most 1024"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_sides_that_no_schedule_has(folder: Path, sides: tuple[int, ...], words: str) -> None:
    put(folder, "var_test.pth", transformer_state() | {"lvl_1L": levels(sides)})
    message = refusal(folder, ConfigError)
    assert words in message
    assert "var_test.pth" in message


def test_sides_that_the_other_tensors_do_not_have(folder: Path) -> None:
    put(folder, "var_test.pth", transformer_state() | {"lvl_1L": levels((1, 2, 3, 4, 5))})
    message = refusal(folder)
    assert f"pos_1LC has [130, {WIDTH}] instead of [55, {WIDTH}]" in message
    assert f"lvl_embed.weight has [6, {WIDTH}] instead of [5, {WIDTH}]" in message


def without(given: State, *names: str) -> State:
    return {name: tensor for name, tensor in given.items() if name not in names}


@pytest.mark.parametrize(
    "name",
    [
        "lvl_1L",
        "pos_1LC",
        "class_emb.weight",
        "word_embed.weight",
        "head.weight",
        "blocks.0.attn.scale_mul_1H11",
        "blocks.0.ffn.fc1.weight",
    ],
)
def test_a_file_without_what_its_configuration_follows_from(folder: Path, name: str) -> None:
    put(folder, "var_test.pth", without(transformer_state(), name))
    assert f"is not a VAR transformer: it lacks {name}, or has it in another shape." in refusal(folder)
    put(folder, "var_test.pth", transformer_state() | {name: torch.tensor(1.0)})
    assert f"it lacks {name}, or has it in another shape." in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.ones(3)},
        {},
        {f"layers.{i}.weight": torch.ones(3, 3) for i in range(50)},
        autoencoder_state(),
    ],
    ids=["one tensor", "nothing", "another model", "an autoencoder"],
)
def test_a_state_dict_of_no_family(folder: Path, content: State) -> None:
    put(folder, "var_test.pth", content)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'var_test.pth'} is not a VAR transformer: it lacks ")


def test_a_transformer_for_an_autoencoder(folder: Path) -> None:
    put(folder, "vae_test.pth", transformer_state())
    assert "vae_test.pth is not VAR's autoencoder: it lacks encoder.conv_in.weight" in refusal(folder)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_shared_adaln_without_its_shared_map(folder: Path, part: str) -> None:
    """As of a d36 file that was cut or thinned."""
    put(folder, "var_test.pth", without(transformer_state(shared=True), f"shared_ada_lin.1.{part}"))
    words = {"weight": "lacks shared_ada_lin.1.weight", "bias": "missing: shared_modulation.bias"}
    assert words[part] in refusal(folder)


def test_blocks_of_both_kinds(folder: Path) -> None:
    mixed = transformer_state(shared=True)
    del mixed["blocks.1.ada_gss"]
    mixed |= {"blocks.1.ada_lin.1.weight": torch.ones(6 * WIDTH, WIDTH), "blocks.1.ada_lin.1.bias": torch.ones(6 * WIDTH)}
    put(folder, "var_test.pth", mixed)
    message = refusal(folder)
    assert "missing: blocks.1.modulation.table" in message
    assert "unexpected: blocks.1.ada_lin.1.bias, blocks.1.ada_lin.1.weight" in message


def test_a_block_that_is_missing(folder: Path) -> None:
    cut = {name: tensor for name, tensor in transformer_state().items() if not name.startswith("blocks.1.")}
    put(folder, "var_test.pth", cut)
    assert "missing: blocks.1." in refusal(folder)


@pytest.mark.parametrize("index", [1023, 9999])
def test_a_block_far_off(folder: Path, index: int) -> None:
    """Refused at once, and no memory of so many blocks is asked for."""
    put(folder, "var_test.pth", transformer_state() | {f"blocks.{index}.attn.proj.bias": torch.ones(WIDTH)})
    if index > 1023:
        assert "depth must be at most 1,024" in refusal(folder, ConfigError)
    else:
        assert "missing: blocks." in refusal(folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"class_emb.weight": torch.ones(1, WIDTH)}, "num_classes must be positive"),
        ({"class_emb.weight": torch.ones(0, WIDTH)}, "num_classes must be positive"),
        ({"word_embed.weight": torch.ones(0, CHANNELS)}, "embed_dim must be positive"),
        ({"blocks.0.attn.scale_mul_1H11": torch.ones(1, 3, 1, 1)}, "must split into 3 heads"),
        ({"blocks.0.attn.scale_mul_1H11": torch.ones(1, 0, 1, 1)}, "num_heads must be positive"),
        ({"blocks.0.ffn.fc1.weight": torch.ones(0, WIDTH)}, "mlp_ratio must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_out_of_range(folder: Path, changed: State, words: str) -> None:
    put(folder, "var_test.pth", transformer_state() | changed)
    message = refusal(folder, ConfigError)
    assert words in message
    assert "var_test.pth" in message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"quantize.embedding.weight": torch.ones(32, CHANNELS)}, "draws 64 codes of 4 channels, and"),
        ({"quantize.embedding.weight": torch.ones(VOCABULARY, 8)}, "has 64 of 8; both must come from the same checkpoint."),
    ],
    ids=["codes", "channels"],
)
def test_an_autoencoder_of_another_checkpoint(folder: Path, changed: State, words: str) -> None:
    put(folder, "vae_test.pth", autoencoder_state() | changed)
    message = refusal(folder, ConfigError)
    assert words in message
    assert "both must come from the same checkpoint" in message


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)}, ConfigError, "ch must be a multiple of norm_groups 32"),
        ({"encoder.conv_in.weight": torch.ones(48, 3, 3, 3)}, ConfigError, "ch_mult must have positive entries"),
        ({"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}, ConfigError, "ch must be"),
        ({"encoder.conv_in.weight": torch.ones(32)}, WeightsError, "is not VAR's autoencoder: it lacks encoder.conv_in.weight"),
        ({"quantize.quant_resi.qresi_ls.4.weight": torch.ones(1)}, ConfigError, "share_quant_resi must be one of 0, 1, 4"),
        ({"decoder.more": torch.ones(1)}, WeightsError, "unexpected: decoder.more"),
        ({"encoder.down.1.block.0.conv1.weight": torch.ones(31, 32, 3, 3)}, ConfigError, "ch_mult must have positive entries"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_autoencoder_that_is_none(folder: Path, changed: State, kind: type[HartError], words: str) -> None:
    put(folder, "vae_test.pth", autoencoder_state() | changed)
    assert words in refusal(folder, kind)


class Payload:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["var_test.pth", "vae_test.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    trap, file = tmp_path / "sprung", folder / name
    good = transformer_state() if name.startswith("var") else autoencoder_state()
    file.unlink()
    torch.save(good | {"hook": Payload(trap)}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(folder)
    assert "was refused, as reading it could run code" in message
    assert not trap.exists()
    torch.load(file, weights_only=False)  # the trap works
    assert trap.exists()


@pytest.mark.parametrize(
    "content",
    [torch.ones(3), [torch.ones(3)], {"trainer": {"vae_local": {"x": torch.ones(3)}}}, {"epoch": 3}, {0: torch.ones(3)}, None],
    ids=["tensor", "list", "nested", "number", "numbered", "none"],
)
@pytest.mark.parametrize("name", ["var_test.pth", "vae_test.pth"])
def test_a_pickle_that_is_no_state_dict(folder: Path, name: str, content: Any) -> None:
    put(folder, name, content)
    assert f"{name} must hold a plain dictionary of tensors" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>"])
def test_a_damaged_file(folder: Path, content: bytes) -> None:
    (folder / "var_test.pth").unlink()
    (folder / "var_test.pth").write_bytes(content)
    assert "damaged" in refusal(folder)


# Which files.


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["var_d16.pth"], True),
        (["README.md", "vae_ch160v4096z32.pth"], False),
        (["var_.pth"], False),
        (["var_d16.safetensors"], False),
        (["sub/var_d16.pth"], False),
        (["my_var_d16.pth"], False),
        ([], False),
    ],
)
def test_names_of_a_released_folder(names: list[str], known: bool) -> None:
    assert is_var(names) is known


def test_several_need_a_variant(folder: Path) -> None:
    (folder / "var_d30.pth").symlink_to(folder / "var_test.pth")
    put(folder, "var_d16.pth", transformer_state(depth=1))
    message = refusal(folder, CheckpointNotFoundError)
    assert message.endswith("has several VAR models; choose one by variant= (--variant): d16, d30, test.")
    assert load(folder, variant="d16").transformer.depth == 1
    assert load(folder, variant="d30").transformer.depth == DEPTH


def test_one_needs_none_and_may_be_named(released: Path) -> None:
    assert_identical(load(released), load(released, variant="test"))


@pytest.mark.parametrize("variant", ["d16", "", "../test", "test.pth", "te.t"])
def test_an_unknown_variant(released: Path, variant: str) -> None:
    message = refusal(released, CheckpointNotFoundError, variant=variant)
    assert message.endswith(f"has no variant {variant!r}; it has test.")


def test_no_autoencoder(folder: Path) -> None:
    (folder / "vae_test.pth").unlink()
    assert "must hold one autoencoder, vae_*.pth, and has none." in refusal(folder, CheckpointNotFoundError)


def test_two_autoencoders(folder: Path) -> None:
    (folder / "vae_other.pth").symlink_to(folder / "vae_test.pth")
    assert "and has 2 (vae_other.pth, vae_test.pth)." in refusal(folder, CheckpointNotFoundError)


@pytest.mark.parametrize("name", ["var_test.pth", "vae_test.pth"])
def test_a_file_instead_of_its_folder(released: Path, name: str) -> None:
    message = refusal(released / name, CheckpointNotFoundError)
    assert message == f"{released / name} is a file; give the checkpoint's folder."


def test_a_folder_of_nothing(tmp_path: Path) -> None:
    assert "holds no VAR checkpoint" in refusal(tmp_path, CheckpointNotFoundError)
    assert "is neither an existing folder nor a Hub id" in refusal(tmp_path / "gone", CheckpointNotFoundError)


def test_other_families_folders_by_the_wrong_class(released: Path, hart_tiny: Path, tmp_path: Path) -> None:
    assert "holds no VAR checkpoint" in refusal(hart_tiny, CheckpointNotFoundError)
    assert "is a checkpoint of 'HartPipeline', not of VarPipeline" in refusal("hart-mini", ConfigError)
    saved = load(released).save_pretrained(tmp_path / "saved")
    for folder, kind, words in (
        (released, CheckpointNotFoundError, "holds no HART checkpoint"),
        (saved, ConfigError, "is a checkpoint of 'VarPipeline', not of HartPipeline"),
    ):
        with pytest.raises(kind, match=words):
            HartPipeline.from_pretrained(folder, text_encoder=False, device="cpu")


def test_bad_arguments_of_loading(released: Path) -> None:
    for options in ({"dtype": torch.int8}, {"device": "nope"}, {"local_files_only": "no"}):
        with pytest.raises(InputError):
            load(released, **options)


# The project's own layout.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "200KB"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_saved_loads_back_identically(tmp_path: Path, dtype: torch.dtype, shard_size: str, shared: bool) -> None:
    released = write_checkpoint(tmp_path / "released", transformer=transformer_state(shared=shared))
    pipe = load(released, dtype=dtype)
    saved = pipe.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    again = load(saved)
    assert again.dtype == dtype
    assert_identical(pipe, again)
    assert again.transformer.config == pipe.transformer.config
    assert again.autoencoder.config == pipe.autoencoder.config
    assert torch.equal(*(p(2, seed=5, output_type="pt").images for p in (pipe, again)))
    assert {tensor.dtype for tensor in again.autoencoder.quantizer.state_dict().values()} == {torch.float32}


def test_the_folder_holds_what_it_should_and_nothing_else(released: Path, tmp_path: Path) -> None:
    saved = load(released).save_pretrained(tmp_path / "saved")
    names = {file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file()}
    parts = ("transformer", "autoencoder")
    assert names == {"model_index.json", *(f"{part}/{name}" for part in parts for name in ("config.json", "model.safetensors"))}
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "VarPipeline"
    assert index["defaults"] == {"guidance_scale": 4.0, "top_k": 900, "top_p": 0.95, "late_temperature": 1.0}
    assert index["parts"] == list(parts)


NAMES = [["dog", "hound"], "cat", "tram", ["café"], "tree"]


def test_names_of_classes_are_read_and_saved(folder: Path, tmp_path: Path) -> None:
    (folder / "classes.json").write_text(json.dumps(NAMES))
    pipe = load(folder)
    assert pipe.labels.index("Hound") == 0
    saved = pipe.save_pretrained(tmp_path / "saved")
    again = load(saved)
    assert again.labels.names == pipe.labels.names
    assert torch.equal(*(p("café", seed=1, output_type="latent").images for p in (pipe, again)))
    again.save_pretrained(saved)  # over itself, the names included
    assert load(saved).labels.names == pipe.labels.names


@pytest.mark.parametrize("content", ["[", '["a"]', "{}", '"dog"', "[1, 2, 3, 4, 5]"], ids=str)
def test_names_of_classes_that_are_none(folder: Path, content: str) -> None:
    (folder / "classes.json").write_text(content)
    assert "classes.json" in refusal(folder, ConfigError)


def saved_with(released: Path, folder: Path, **changed: Any) -> Path:
    """A saved checkpoint whose `model_index.json` has been changed by hand."""
    saved = load(released).save_pretrained(folder)
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps(index | changed))
    return saved


def test_defaults_of_a_saved_checkpoint(released: Path, tmp_path: Path) -> None:
    pipe = load(saved_with(released, tmp_path / "saved", defaults={"guidance_scale": 2, "top_k": 7}))
    assert (pipe.defaults.guidance_scale, pipe.defaults.top_k, pipe.defaults.top_p) == (2.0, 7, 0.95)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"defaults": [1]}, "defaults must be an object"),
        ({"defaults": {"top_q": 1}}, "top_q"),
        ({"defaults": {"top_p": 1.5}}, "top_p must be from 0 to 1"),
        ({"defaults": {"top_k": -1}}, "top_k must be 0 or more"),
        ({"defaults": {"guidance_scale": 1e9}}, "guidance_scale must be from 0 to 1000"),
        ({"defaults": {"late_temperature": 0.0}}, "late_temperature must be from 0.01 to 100"),
        ({"_class_name": "FluxPipeline"}, "is a checkpoint of 'FluxPipeline', not of VarPipeline"),
        ({"_class_name": None}, "not of VarPipeline"),
    ],
    ids=str,
)
def test_an_index_that_was_spoilt(released: Path, tmp_path: Path, changed: State, words: str) -> None:
    assert words in refusal(saved_with(released, tmp_path / "saved", **changed), ConfigError)


def test_parts_that_do_not_fit_each_other(released: Path, tmp_path: Path) -> None:
    saved = load(released).save_pretrained(tmp_path / "saved")
    file = saved / "autoencoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"v_patch_nums": [1, 2, 3, 4]}))
    message = refusal(saved, ConfigError)
    assert "patch_nums [1, 2, 3, 4, 6, 8] are not the autoencoder's v_patch_nums [1, 2, 3, 4]" in message


# The Hub.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with VAR's repository as it is laid out, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):  # which of them has it depends on the version
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def published(hub: HubServer, released: Path) -> HubServer:
    root = hub.root / REPO
    root.mkdir(parents=True)
    for depth in (16, 20, 24, 30, 36):
        (root / f"var_d{depth}.pth").symlink_to(released / "var_test.pth")
    (root / "vae_ch160v4096z32.pth").symlink_to(released / "vae_test.pth")
    (root / "README.md").write_text("clutter")
    return hub


def test_only_the_needed_files_are_downloaded(published: HubServer, released: Path) -> None:
    pipe = load(REPO, variant="d20")
    assert published.downloaded(REPO) == ["vae_ch160v4096z32.pth", "var_d20.pth"]
    assert pipe.name == REPO
    assert torch.equal(*(p(1, seed=2, output_type="latent").images for p in (pipe, load(released))))
    published.requests.clear()
    load(REPO, variant="d24")  # of the same autoencoder
    assert published.downloaded(REPO) in ([], ["var_d24.pth"])  # [] where the same content is known to be in the cache


def test_a_choice_downloads_nothing(published: HubServer) -> None:
    message = refusal(REPO, CheckpointNotFoundError)
    assert message == f"{REPO} has several VAR models; choose one by variant= (--variant): d16, d20, d24, d30, d36."
    assert "it has d16, d20" in refusal(REPO, CheckpointNotFoundError, variant="d17")
    assert published.downloaded(REPO) == []


def test_without_the_hub(published: HubServer) -> None:
    assert "is not in the local cache" in refusal(REPO, CheckpointNotFoundError, variant="d16", local_files_only=True)
    found = find_checkpoint(REPO, variant="d16")
    published.stop()
    assert find_checkpoint(REPO, variant="d16", hub=HubOptions(local_files_only=True)) == found
    assert load(REPO, local_files_only=True).transformer.depth == DEPTH  # the only one in the cache


def test_names_of_classes_come_along(published: HubServer) -> None:
    (published.root / REPO / "classes.json").write_text(json.dumps(NAMES))
    assert load(REPO, variant="d16").labels.index("tram") == 2
    assert published.downloaded(REPO) == ["classes.json", "vae_ch160v4096z32.pth", "var_d16.pth"]


def test_what_was_saved_and_uploaded(hub: HubServer, released: Path) -> None:
    pipe = load(released)
    saved = pipe.save_pretrained(hub.root / "someone/var", max_shard_size="200KB")
    files = sorted(file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file())
    (saved / "samples.png").write_text("clutter")
    assert_identical(load("someone/var"), pipe)
    assert hub.downloaded("someone/var") == [name for name in files if ".index." not in name]


def test_pickles_are_never_read_with_code_allowed(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, Any]] = []
    load_pickle = torch.load

    def spy(*args: Any, **options: Any) -> Any:
        asked.append((options.get("weights_only"), options.get("mmap")))
        return load_pickle(*args, **options)

    monkeypatch.setattr(weights.torch, "load", spy)
    load(released)
    assert set(asked) == {(True, True)}
