"""VILA-U's checkpoints: which files, which keys, which tensors; what is refused, and what is saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hart_infer.checkpoints import weights
from hart_infer.checkpoints.hub import HubOptions
from hart_infer.checkpoints.vila_u import (
    Parts,
    VilaUCheckpoint,
    VilaUDefaults,
    find_checkpoint,
    inspect_checkpoint,
    is_vila_u,
    save,
)
from hart_infer.errors import CheckpointNotFoundError, ConfigError, HartError, InputError, OutputError, WeightsError
from hart_infer.models.vila_u.siglip import SIGLIP_CONFIGS
from tests.hub import HubServer
from tests.released_vila_u import (
    CODES,
    DEPTH,
    SIGLIP_LAYERS,
    WIDTH,
    states,
    vocab_size,
    write_checkpoint,
)

pytest.importorskip("sentencepiece", reason="the extra vila-u is not installed")  # by `make newest` and `make oldest`

REPO = "mit-han-lab/vila-u-tiny"
CONFIGS = ["config.json", "llm/config.json", "mm_projector/config.json", "vision_tower/config.json"]
OTHERS = ["llm/added_tokens.json", "llm/generation_config.json", "vision_tower/siglip/config.json"]
FILES = ["llm/model.safetensors", "llm/tokenizer.model", "mm_projector/model.safetensors", "vision_tower/model.safetensors"]
KINDS: list[dict[str, Any]] = [{}, {"key_heads": 2, "shared": False}]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["merged", "grouped"])
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released checkpoint. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def released(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(whole, tmp_path / "released"))


def load(found: VilaUCheckpoint, dtype: torch.dtype | None = None) -> dict[str, nn.Module]:
    return {
        "llama": found.load_llama(dtype),
        "vision_tower": found.load_vision_tower(dtype),
        "depth_transformer": found.load_depth_transformer(dtype),
        "projector": found.load_projector(dtype),
    }


def parts(found: VilaUCheckpoint, dtype: torch.dtype | None = None) -> Parts:
    modules: Any = load(found, dtype)
    rest = {name: getattr(found, name) for name in ("settings", "answers", "defaults")}
    return Parts(**modules, **rest, projector_type=found.projector, tokenizer=found.load_tokenizer())


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) and x[key].dtype == y[key].dtype for key in x)


def all_equal(a: VilaUCheckpoint, b: VilaUCheckpoint) -> bool:
    x, y = load(a), load(b)
    return all(equal(x[name], y[name]) for name in x)


def edit(folder: Path, file: str, **changes: Any) -> None:
    """Change keys of a JSON file, nested ones by `a.b`; None removes."""
    values = json.loads((folder / file).read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        inner = values
        for name in above:
            inner = inner[name]
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    (folder / file).write_text(json.dumps(values))


def refusal(folder: Path, kind: type[HartError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        find_checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def store(folder: Path, part: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / part / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


@every_kind
def test_sizes_come_from_the_files(tmp_path: Path, kind: dict[str, Any]) -> None:
    found = find_checkpoint(write_checkpoint(tmp_path, **kind))
    assert (found.llama.vocab_size, found.llama.rope_factor, found.llama.rms_norm_eps) == (vocab_size(), 2.0, 1e-5)
    assert found.llama.num_key_value_heads == kind.get("key_heads", 4)
    assert (found.vision.grid, found.vision.depth, found.vision.n_embed) == (4, DEPTH, (CODES,))
    assert (found.vision.num_hidden_layers, found.vision.attention_levels) == (SIGLIP_LAYERS, (1,))
    assert (found.depth.num_slots, found.depth.num_layers, found.depth.num_heads) == (DEPTH, 2, 2)
    assert (found.settings.tokenizer_model_max_length, found.settings.num_video_frames) == (600, 8)
    assert (found.answers.temperature, found.answers.top_k, found.answers.max_length) == (0.7, 50, 99)
    assert (found.defaults.guidance_scale, found.defaults.top_k, found.defaults.top_p) == (3.0, 900, 0.96)


@every_kind
def test_values_arrive(tmp_path: Path, kind: dict[str, Any]) -> None:
    modules = load(find_checkpoint(write_checkpoint(tmp_path, **kind)), torch.float32)
    stored = {name: tensor for state in states(**kind).values() for name, tensor in state.items()}
    llama, tower, depth, projector = (module.state_dict() for module in modules.values())
    siglip = "rqvaesiglip.siglip_model.vision_model"

    def merged(prefix: str, names: tuple[str, ...], suffix: str) -> Tensor:
        return torch.cat([stored[f"{prefix}.{name}{suffix}"] for name in names])

    qkv = ("q_proj", "k_proj", "v_proj")
    if kind:
        assert torch.equal(llama["layers.1.attn.k.weight"], stored["model.layers.1.self_attn.k_proj.weight"])
        assert torch.equal(tower["quantizer.codebooks.2.weight"], stored["rqvaesiglip.quantizer.codebooks.2.weight"])
    else:
        assert torch.equal(llama["layers.1.attn.qkv.weight"], merged("model.layers.1.self_attn", qkv, ".weight"))
    assert torch.equal(llama["layers.0.mlp_norm.weight"], stored["model.layers.0.post_attention_layernorm.weight"])
    for suffix in (".weight", ".bias"):
        found = tower[f"encoder.layers.1.attn.qkv{suffix}"]
        assert torch.equal(found, merged(f"{siglip}.encoder.layers.1.self_attn", qkv, suffix))
        found = tower[f"decoder.up_1_attn_1.qkv{suffix}"]
        assert torch.equal(found, merged("rqvaesiglip.decoder.up.1.attn.1", ("q", "k", "v"), suffix))
        found = depth[f"blocks.1.attn.qkv{suffix}"]
        expected = merged("rqtransformer.head_transformer.blocks.1.attn", ("query", "key", "value"), suffix)
        assert torch.equal(found, expected)
    assert torch.equal(
        tower["decoder.up_0_block_0.shortcut.weight"], stored["rqvaesiglip.decoder.up.0.block.0.nin_shortcut.weight"]
    )
    assert torch.equal(depth["slot_embed"], stored["rqtransformer.pos_emb_d"][0])
    assert torch.equal(depth["code_embed.weight"], stored["rqtransformer.in_mlp_1.weight"])
    assert torch.equal(depth["hidden_embed.weight"], stored["rqtransformer.in_mlp_2.weight"])
    assert torch.equal(projector["layers.1.bias"], stored["layers.2.bias"])


def test_nothing_useless_is_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = weights._open

    def spy(file: Path) -> tuple[list[str], Callable[[str], Tensor]]:
        names, get = real(file)
        return names, lambda name: (read.append(name), get(name))[1]

    monkeypatch.setattr(weights, "_open", spy)
    load(find_checkpoint(whole), torch.float32)
    last = f"layers.{SIGLIP_LAYERS - 1}."
    useless = ("text_model", "head.probe", "post_layernorm", "logit_", "_ema", "inv_freq", f"vision_model.encoder.{last}")
    assert not [name for name in read if any(word in name for word in useless)]
    assert len(read) == len(set(read))  # each once


def test_copies_of_a_shared_codebook_are_not_read(released: Path) -> None:
    plain = find_checkpoint(released)
    expected = deepcopy(plain.load_vision_tower(torch.float32))  # not mapped: the file is rewritten, by some versions in place

    def copy(state: dict[str, Tensor]) -> None:
        for i in range(1, DEPTH):
            name = f"rqvaesiglip.quantizer.codebooks.{i}.weight"
            state[name] = state["rqvaesiglip.quantizer.codebooks.0.weight"].clone()

    store(released, "vision_tower", copy)
    assert equal(find_checkpoint(released).load_vision_tower(torch.float32), expected)


@pytest.mark.parametrize("part", ["", "llm", "vision_tower", "mm_projector", "model", "model/llm"])
def test_the_folder_or_a_part_of_it_or_the_one_above(whole: Path, tmp_path: Path, part: str) -> None:
    root = Path(shutil.copytree(whole, tmp_path / ("above/model" if part.startswith("model") else "above")))
    for where in {tmp_path / "above" / part, root, tmp_path / "above"}:
        found = find_checkpoint(where)
        assert found.llama_files == (root / "llm/model.safetensors",)
        assert found.tokenizer == root / "llm/tokenizer.model"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@every_kind
def test_shards(tmp_path: Path, kind: dict[str, Any], suffix: str) -> None:
    folder = write_checkpoint(tmp_path / "a", **kind)
    expected = find_checkpoint(folder)
    sharded = Path(shutil.copytree(folder, tmp_path / "b"))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for part in ("llm", "vision_tower", "mm_projector"):
        state = load_file(sharded / part / "model.safetensors")
        (sharded / part / "model.safetensors").unlink()
        for i in range(2):  # q, k and v may part
            half = {name: state[name] for name in sorted(state)[i::2]}
            file = sharded / part / f"{stem}-0000{i + 1}-of-00002.{suffix}"
            save_file(half, file) if suffix == "safetensors" else torch.save(half, file)
    assert all_equal(find_checkpoint(sharded), expected)
    (sharded / f"llm/{stem}-00002-of-00002.{suffix}").unlink()
    assert f"1 of 2 shards of llm/{stem}.{suffix}" in refusal(sharded, CheckpointNotFoundError)


@every_kind
def test_saved_and_loaded_it_is_bit_identical(tmp_path: Path, kind: dict[str, Any]) -> None:
    found = find_checkpoint(write_checkpoint(tmp_path / "released", **kind))
    defaults = VilaUDefaults(guidance_scale=2.0, top_k=0, top_p=0.5)
    saved = save(tmp_path / "own", replace(parts(found), defaults=defaults), max_shard_size="20KB")
    again = find_checkpoint(saved)
    assert all_equal(found, again)
    assert again.defaults == defaults
    for name in ("llama", "vision", "depth", "projector", "settings", "answers"):
        assert getattr(again, name) == getattr(found, name)
    assert again.load_tokenizer().encode("a cat") == found.load_tokenizer().encode("a cat")
    assert not again.released
    names = {path.name for path in saved.iterdir()}
    assert names == {"model_index.json", "llm", "vision_tower", "depth_transformer", "mm_projector", "tokenizer.model"}
    save(saved, parts(again), max_shard_size="5GB")  # onto itself
    assert all_equal(found, find_checkpoint(saved))
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"also holds notes\.txt"):
        save(saved, parts(found), max_shard_size="5GB")


def test_saved_in_bf16(whole: Path, tmp_path: Path) -> None:
    found = parts(find_checkpoint(whole), torch.bfloat16)
    again = load(find_checkpoint(save(tmp_path / "own", found, max_shard_size="5GB")))
    assert equal(again["llama"], found.llama)
    assert {tensor.dtype for tensor in again["vision_tower"].state_dict().values()} == {torch.bfloat16}


def test_a_bad_shard_size(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_shard_size"):
        save(tmp_path / "own", parts(find_checkpoint(whole)), max_shard_size="many")


@pytest.mark.parametrize(("kind", "layers"), [("identity", ()), ("linear", ("layers",)), ("mlp3x_gelu", (0, 2, 4))])
def test_other_projectors(released: Path, tmp_path: Path, kind: str, layers: tuple[Any, ...]) -> None:
    edit(released, "mm_projector/config.json", mm_projector_type=kind)
    (released / "mm_projector/model.safetensors").unlink()
    names = ["layers" if layer == "layers" else f"layers.{layer}" for layer in layers]
    state = {f"{name}.{what}": torch.full((WIDTH,) * n, i + 1.0) for i, name in enumerate(names) for what, n in TENSORS}
    if state:
        save_file(state, released / "mm_projector/model.safetensors")
    found = find_checkpoint(released)
    loaded = found.load_projector(None).state_dict()
    assert [float(loaded[f"layers.{i}.weight"][0, 0]) for i in range(len(layers))] == [i + 1.0 for i in range(len(layers))]
    again = find_checkpoint(save(tmp_path / "own", parts(found), max_shard_size="5GB"))
    assert again.projector == kind
    assert all_equal(found, again)


TENSORS = (("weight", 2), ("bias", 1))


@pytest.mark.parametrize("name", SIGLIP_CONFIGS)
def test_released_siglips_are_known_by_heart(released: Path, name: str) -> None:
    config = SIGLIP_CONFIGS[name]
    grid, width = config.grid, config.hidden_size
    edit(
        released,
        "vision_tower/config.json",
        rqvaesiglip__pretrained_model=name,
        rqvaesiglip__embed_dim=width,
        rqvaesiglip__latent_shape=[grid, grid, width],
        rqvaesiglip__code_shape=[grid, grid, DEPTH],
        rqtransformer__block_size=[grid, grid, DEPTH],
        rqtransformer__input_embed_dim_1=width,
    )
    edit(released, "config.json", mm_hidden_size=width)
    shutil.rmtree(released / "vision_tower/siglip")
    vision = find_checkpoint(released).vision
    assert (vision.hidden_size, vision.image_size, vision.patch_size, vision.grid) == (
        width,
        config.image_size,
        config.patch_size,
        grid,
    )
    known = {"google/siglip-large-patch16-256": (1024, 4096, 24, 16, 256, 16)}
    known["google/siglip-so400m-patch14-384"] = (1152, 4304, 27, 16, 384, 14)
    assert tuple(vars(config).values()) == known[name]


TOWER, SIGLIP = "vision_tower/config.json", "vision_tower/siglip/config.json"
CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "grids": (TOWER, {"rqvaesiglip__latent_shape": [8, 8, WIDTH]}, "[8, 8, 32] and code_shape [4, 4, 3] have different grids"),
    "tower": (SIGLIP, {"vision_config__image_size": 40}, "5 x 5 positions of a picture of 40 pixels"),
    "block": (TOWER, {"rqtransformer__block_size": [4, 4, 2]}, "block_size [4, 4, 2] is not rqvaesiglip's code_shape"),
    "bottleneck": (TOWER, {"rqvaesiglip__bottleneck_type": "vq"}, "bottleneck_type = 'vq' is not supported; 'rq' is"),
    "width": (TOWER, {"rqvaesiglip__latent_shape": [4, 4, 16]}, "latent_shape has 16 channels, and embed_dim is 32"),
    "siglip": (TOWER, {"rqvaesiglip__pretrained_model": "google/other"}, "'google/other' is not a SigLIP whose"),
    "outside": (TOWER, {"rqvaesiglip__pretrained_model": "../siglip"}, "pretrained_model '../siglip' is not a SigLIP whose"),
    "codes": (TOWER, {"rqtransformer__vocab_size": 41}, "a codebook has 40 codes, and the depth transformer draws 41"),
    "list": (TOWER, {"rqvaesiglip__n_embed": [40, 40]}, "n_embed must have one entry"),
    "input": (TOWER, {"rqtransformer__input_embed_dim_2": 64}, "the Llama is 32 wide, and the depth transformer's input 64"),
    "features": (TOWER, {"rqtransformer__input_embed_dim_1": 64}, "features have 32 channels, and the depth transformer's 64"),
    "head": (TOWER, {"rqtransformer__head__block": {"n_head": 5}}, "embed_dim 24 must split into 5 heads"),
    "gelu": (TOWER, {"rqtransformer__head__block": {"n_head": 2, "gelu": "v2"}}, "gelu = 'v2' is not supported"),
    "no head": (TOWER, {"rqtransformer__head": None}, "rqtransformer: head must be an object, not None"),
    "decoder": (TOWER, {"rqvaesiglip__ddconfig__out_ch": 4}, "out_ch = 4 is not supported"),
    "missing": (TOWER, {"rqvaesiglip__n_embed": None}, "rqvaesiglip lacks n_embed"),
    "no tower": (TOWER, {"rqvaesiglip": None}, "rqvaesiglip must be an object, not None"),
    "rope": ("llm/config.json", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic' is not"),
    "rope type": ("llm/config.json", {"rope_scaling": [2.0]}, "rope_scaling must be an object"),
    "activation": ("llm/config.json", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; 'silu' is"),
    "biases": ("llm/config.json", {"attention_bias": True}, "attention_bias = True is not supported"),
    "tied": ("llm/config.json", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
    "head width": ("llm/config.json", {"head_dim": 16}, "head_dim 16 is not hidden_size / num_attention_heads 8"),
    "model type": ("config.json", {"model_type": "llava"}, "model_type = 'llava' is not supported; 'vila_u_llama' is"),
    "aspect": ("config.json", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio must be one of resize, pad"),
    "frames": ("config.json", {"num_video_frames": 0}, "num_video_frames must be positive"),
    "start": ("config.json", {"mm_use_im_start_end": False}, "mm_use_im_start_end = False is not supported"),
    "hidden": ("config.json", {"hidden_size": 64}, "hidden_size is 64, and the part's own config says 32"),
    "elsewhere": ("config.json", {"llm_cfg": "/home/me/llama"}, "llm_cfg names another checkpoint, '/home/me/llama'"),
    "added": ("llm/added_tokens.json", {"<im_start>": 7}, "<im_start> is 7, not"),
    "no video": ("config.json", {"mm_use_vi_start_end": False}, "<vi_start> is one, and mm_use_vi_start_end is false"),
    "projector": ("mm_projector/config.json", {"mm_projector_type": "resampler"}, "'resampler' is not supported"),
    "beams": ("llm/generation_config.json", {"num_beams": 4}, "num_beams = 4 is not supported"),
    "penalty": ("llm/generation_config.json", {"repetition_penalty": 1.2}, "repetition_penalty = 1.2 is not supported"),
    "temperature": ("llm/generation_config.json", {"temperature": 0}, "temperature must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_change_the_numbers_is_refused_by_name(released: Path, change: str) -> None:
    file, changes, words = CHANGES[change]
    edit(released, file, **changes)
    message = refusal(released)
    assert words in message
    assert str(released) in message


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"llm_cfg": "llm", "vision_tower_cfg": "./vision_tower"}),
        ("config.json", {"tune_language_model": True, "vision_tower_lr": None, "resume_path": "/x"}),
        ("llm/config.json", {"num_key_value_heads": None}),
        ("llm/config.json", {"rope_scaling": {"rope_type": "linear", "factor": 2}}),
        (
            "llm/config.json",
            {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}},
        ),
        ("llm/generation_config.json", {"pad_token_id": 0, "min_new_tokens": 0, "eos_token_id": [2]}),
        (TOWER, {"rqvaesiglip__decay": 0.99, "rqvaesiglip__ckpt_path": "/x", "rqvaesiglip__ddconfig__dropout": 0.5}),
    ],
)
def test_what_changes_nothing_is_ignored(
    whole: Path, released: Path, file: str, changes: Mapping[str, Any], caplog: Any
) -> None:
    edit(released, file, **changes)
    expected, found = find_checkpoint(whole), find_checkpoint(released)
    for name in ("llama", "vision", "depth", "projector", "settings", "answers"):
        assert getattr(found, name) == getattr(expected, name)
    assert not caplog.records


def test_unknown_keys_give_one_warning_or_are_refused(released: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(released, "llm/config.json", a_new_trick=1, another=2)
    find_checkpoint(released)
    (record,) = caplog.records
    assert "llm/config.json has keys" in record.getMessage()
    assert "a_new_trick, another" in record.getMessage()
    with pytest.raises(ConfigError, match="a_new_trick"):
        find_checkpoint(released, strict_config=True)


def test_unknown_keys_of_a_saved_folder_too(released: Path, tmp_path: Path) -> None:
    saved = save(tmp_path / "own", parts(find_checkpoint(released)), max_shard_size="5GB")
    edit(saved, "llm/config.json", a_new_trick=1)
    find_checkpoint(saved)
    with pytest.raises(ConfigError, match="a_new_trick"):
        find_checkpoint(saved, strict_config=True)


def test_answers_without_a_file_and_without_keys(released: Path) -> None:
    (released / "llm/generation_config.json").write_text('{"do_sample": null, "eos_token_id": [2, 7]}')
    found = find_checkpoint(released).answers
    assert (found.do_sample, found.temperature, found.top_k, found.top_p, found.max_length) == (False, 1.0, 50, 1.0, 4096)
    assert found.eos_token_id == (2, 7)
    (released / "llm/generation_config.json").unlink()
    assert find_checkpoint(released).answers.do_sample


def test_codebooks_of_their_own_sizes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shared=False)
    edit(folder, TOWER, rqvaesiglip__n_embed=[CODES] * DEPTH)
    found = find_checkpoint(folder)
    assert found.vision.vocab_sizes == (CODES,) * DEPTH
    found.load_vision_tower(None)


@pytest.mark.parametrize("name", [*CONFIGS, "llm/tokenizer.model"])
def test_a_missing_file(released: Path, name: str) -> None:
    (released / name).unlink()
    assert ("holds no VILA-U checkpoint" if name == TOWER else f"lacks {name};") in refusal(released, CheckpointNotFoundError)


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
def test_missing_weights(released: Path, part: str) -> None:
    (released / part / "model.safetensors").unlink()
    assert f"no weights in {part}/" in refusal(released, CheckpointNotFoundError)


def misfit(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(find_checkpoint(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_codebook_smaller_than_its_config_says(released: Path) -> None:
    name = "rqvaesiglip.quantizer.codebooks.0.weight"
    store(released, "vision_tower", lambda state: state.update({name: state[name][:-5].clone()}))
    assert f"wrong shape: {name} has [36, 32] instead of [41, 32]" in misfit(released)


MISSING = {
    "model.layers.1.self_attn.k_proj.weight": "layers.1.attn.k_weight",
    "model.norm.weight": "norm.weight",
    "rqvaesiglip.decoder.mid.attn_1.v.bias": "decoder.mid_attn_1.v_bias",
    "rqvaesiglip.siglip_model.vision_model.encoder.layers.0.self_attn.q_proj.bias": "encoder.layers.0.attn.q_bias",
    "rqtransformer.head_transformer.blocks.0.attn.query.weight": "blocks.0.attn.q_weight",
    "rqtransformer.pos_emb_d": "slot_embed",
    "layers.2.bias": "layers.1.bias",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(released: Path, name: str) -> None:
    part = "vision_tower" if name.startswith("rq") else "llm" if name.startswith("model") else "mm_projector"
    store(released, part, lambda state: state.pop(name))
    assert misfit(released).endswith(f"missing: {MISSING[name]}.")


@pytest.mark.parametrize("name", ["model.layers.2.norm.weight", "model.layers.9.self_attn.q_proj.weight"])
def test_an_unexpected_tensor_is_named(released: Path, name: str) -> None:
    store(released, "llm", lambda state: state.update({name: torch.ones(2, 2)}))
    assert misfit(released).endswith(f"unexpected: {name}.")


def test_a_third_of_the_wrong_shape(released: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    store(released, "llm", lambda state: state.update({name: state[name][:16].clone()}))
    assert f"{name} has [16, 32] instead of [32, 32]" in misfit(released)


@pytest.mark.parametrize(("name", "words"), [("HartPipeline", "'HartPipeline', not of VilaUPipeline"), (None, "None, not of")])
def test_another_pipeline_s_folder(tmp_path: Path, name: str | None, words: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert words in refusal(tmp_path)


def test_a_damaged_index(whole: Path, tmp_path: Path) -> None:
    saved = save(tmp_path / "own", parts(find_checkpoint(whole)), max_shard_size="5GB")
    edit(saved, "model_index.json", defaults={"guidance_scale": 1e9})
    assert "model_index.json: defaults: guidance_scale must be" in refusal(saved)
    edit(saved, "model_index.json", defaults=[1])
    assert "defaults must be an object" in refusal(saved)
    edit(saved, "model_index.json", defaults={"luck": 7})
    assert "luck" in refusal(saved)


def test_telling_it_from_hart(whole: Path) -> None:
    names = [path.relative_to(whole).as_posix() for path in whole.rglob("*")]
    assert is_vila_u(names)
    assert is_vila_u([f"model/{name}" for name in names])
    assert not is_vila_u(["llm/config.json", "tokenizer/config.json"])


@pytest.fixture
def hub(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with the checkpoint and much else, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        publish(server, whole, "")
        yield server


def publish(hub: HubServer, whole: Path, inside: str) -> None:
    root = hub.root / REPO
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root / inside)
    for name in ("README.md", "trainer_state.json", "llm/pytorch_model.bin", "llm/optimizer.bin", "llm/tokenizer.json"):
        (root / inside / name).write_text("clutter")


NEEDED = sorted([*CONFIGS, *OTHERS, *FILES])


@pytest.mark.parametrize("inside", ["", "model"])
def test_only_the_needed_files_are_downloaded(hub: HubServer, whole: Path, inside: str) -> None:
    publish(hub, whole, inside)
    prefix = f"{inside}/" if inside else ""
    found = find_checkpoint(REPO)
    assert hub.downloaded(REPO) == [prefix + name for name in NEEDED]
    assert all_equal(found, find_checkpoint(whole))
    hub.stop()
    again = find_checkpoint(REPO)  # from the cache
    assert (again.llama_files, again.vision) == (found.llama_files, found.vision)
    assert find_checkpoint(REPO, hub=HubOptions(local_files_only=True)) == again


def test_a_bad_configuration_is_found_before_weights_are_downloaded(hub: HubServer) -> None:
    edit(hub.root / REPO, "llm/config.json", hidden_act="gelu")
    with pytest.raises(ConfigError, match="hidden_act"):
        find_checkpoint(REPO)
    assert not [name for name in hub.downloaded(REPO) if name.endswith((".safetensors", ".bin", ".model"))]


def test_looking_downloads_no_weights(hub: HubServer, whole: Path) -> None:
    found = inspect_checkpoint(REPO)
    assert (found.llama_files, found.vision_files, found.projector_files) == ((), (), ())
    assert hub.downloaded(REPO) == sorted([*CONFIGS, *OTHERS])
    assert found.llama == find_checkpoint(whole).llama
    assert inspect_checkpoint(whole) == find_checkpoint(whole)
