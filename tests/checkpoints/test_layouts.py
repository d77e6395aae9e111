"""Where a checkpoint's files are: layouts, names, choices. No weights are read, so empty files stand for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hart_infer.checkpoints.hart import Defaults, HartCheckpoint, find_checkpoint
from hart_infer.checkpoints.text_encoder import find_text_encoder
from hart_infer.errors import CheckpointNotFoundError, ConfigError

RELEASED = ("llm/model.safetensors", "llm/ema_model.bin", "tokenizer/model.safetensors")
OWN = ("model_index.json", "transformer/model.safetensors", "autoencoder/model.safetensors")
CONFIGURED = {"llm": "llm", "tokenizer": "tokenizer", "transformer": "llm", "autoencoder": "tokenizer"}
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, hart_tiny: Path) -> Make:
    """Make a checkpoint's folder of some files, with the configurations that belong to them."""

    def build(*names: str, root: str = "ckpt") -> Path:
        folder = tmp_path / root
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}" if name.endswith(".json") else "")
        for part, source in CONFIGURED.items():
            if (folder / part).is_dir():
                (folder / part / "config.json").write_bytes((hart_tiny / source / "config.json").read_bytes())
        return folder

    return build


def names(found: HartCheckpoint, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in (*found.transformer_files, *found.autoencoder_files)]


def refusal(where: str | Path, **options: Any) -> str:
    with pytest.raises(CheckpointNotFoundError) as caught:
        find_checkpoint(where, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "part"),
    [(RELEASED, ""), (RELEASED, "llm"), (RELEASED, "tokenizer"), (OWN, ""), (OWN, "transformer"), (OWN, "autoencoder")],
)
def test_the_folder_or_a_part_of_it(make: Make, files: tuple[str, ...], part: str) -> None:
    root = make(*files)
    found = find_checkpoint(root / part)
    first = "llm/ema_model.bin" if files is RELEASED else OWN[1]
    assert names(found, root) == [first, files[2]]
    assert found.transformer.patch_nums == found.autoencoder.v_patch_nums == (1, 2, 3, 4, 6, 8)
    assert find_checkpoint(f"{root / part}/") == replace(found, name=f"{root / part}/")


def test_defaults_are_the_indexs(make: Make) -> None:
    root = make(*OWN)
    assert find_checkpoint(root).defaults == Defaults(guidance_scale=4.5, use_system_prompt=True)
    (root / "model_index.json").write_text('{"defaults": {"guidance_scale": 3, "use_system_prompt": false}}')
    assert find_checkpoint(root).defaults == Defaults(guidance_scale=3.0, use_system_prompt=False)
    (root / "model_index.json").write_text('{"defaults": {"guidance": 3}}')
    for wrong, message in (
        ('{"guidance": 3}', "defaults has keys that hart_infer does not know: guidance"),
        ('{"top_k": 50}', "defaults has keys that hart_infer does not know: top_k"),
        ("null", "defaults must be an object, not None"),
        ('{"guidance_scale": NaN}', "guidance_scale must be from 0 to 1000, not nan"),
        ('{"guidance_scale": 1001}', "guidance_scale must be from 0 to 1000, not 1001"),
        ('{"guidance_scale": 1' + "0" * 400 + "}", "guidance_scale must be a number that fits a float"),
    ):
        (root / "model_index.json").write_text(f'{{"defaults": {wrong}}}')
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(root)


def test_a_part_by_a_relative_path(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(*RELEASED)
    for where, cwd in ((".", root), ("llm", root), (".", root / "llm"), ("..", root / "llm"), ("ckpt/llm", root.parent)):
        monkeypatch.chdir(cwd)
        found = find_checkpoint(where)
        assert [file.resolve() for file in found.autoencoder_files] == [(root / RELEASED[2]).resolve()]


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_part_that_is_a_link_belongs_to_the_folder_with_the_link(make: Make, tmp_path: Path) -> None:
    root = make(*RELEASED)
    (root / "llm").rename(tmp_path / "elsewhere")
    (root / "llm").symlink_to(tmp_path / "elsewhere")
    assert names(find_checkpoint(root / "llm"), root) == [RELEASED[1], RELEASED[2]]


def test_home_is_expanded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(*RELEASED)
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("USERPROFILE", str(root.parent))
    assert names(find_checkpoint("~/ckpt"), root) == [RELEASED[1], RELEASED[2]]


def test_the_projects_layout_wins_where_both_are(make: Make) -> None:
    root = make(*OWN, *RELEASED)
    assert names(find_checkpoint(root), root) == [OWN[1], OWN[2]]


@pytest.mark.parametrize(
    "where", ["nowhere", "./no/where", "../nowhere", "/no/where/at/all", "~/nowhere", "a/b/c", "C:\\models", "x\0y", "n" * 300]
)
def test_what_is_no_folder_and_no_hub_id(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(where)
    assert message.startswith(where)
    assert "neither an existing folder nor a Hub id (owner/name); check the path" in message


def test_a_file_in_place_of_the_folder(make: Make) -> None:
    file = make(*RELEASED) / RELEASED[0]
    assert refusal(file) == f"{file} is a file; give the checkpoint's folder."


@pytest.mark.parametrize("files", [(), ("model.safetensors", "config.json"), ("tokenizer/model.safetensors",)])
def test_a_folder_without_a_checkpoint(make: Make, files: tuple[str, ...]) -> None:
    root = make(*files)
    message = refusal(root)
    assert message.startswith(f"{root} holds no HART checkpoint")
    assert "llm/config.json" in message
    assert "llm/ folder" in message


@pytest.mark.parametrize("missing", ["llm/config.json", "tokenizer/config.json"])
def test_a_missing_configuration_is_named(make: Make, missing: str) -> None:
    root = make(*RELEASED)
    (root / missing).unlink()
    assert missing in refusal(root)


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (("llm/x", *RELEASED[2:]), {}, "no weights in llm/: expected ema_model.safetensors or model.safetensors"),
        (RELEASED[:2], {}, "no weights in tokenizer/: expected model.safetensors"),
        (RELEASED[1:], {"use_ema": False}, "no weights in llm/: expected model.safetensors"),
        (RELEASED, {"variant": "fp16"}, "no weights in llm/: expected ema_model.fp16.safetensors or model.fp16.safetensors"),
        ((OWN[0], "transformer/x", OWN[2]), {}, "no weights in transformer/: expected model.safetensors"),
        (("llm/xmodel.safetensors", "llm/model.safetensors.tmp", RELEASED[2]), {}, "no weights in llm/"),
    ],
)
def test_missing_weights_are_named(make: Make, files: tuple[str, ...], options: dict[str, Any], words: str) -> None:
    root = make(*files)
    message = refusal(root, **options)
    assert message.startswith(str(root))
    assert words in message
    assert ".bin" in message


@pytest.mark.parametrize(
    ("files", "options", "chosen"),
    [
        (RELEASED, {}, "llm/ema_model.bin"),
        (RELEASED, {"use_ema": False}, "llm/model.safetensors"),
        ((*RELEASED, "llm/ema_model.safetensors"), {}, "llm/ema_model.safetensors"),
        (("llm/model.safetensors",), {}, "llm/model.safetensors"),  # no EMA there
        (("llm/model.safetensors", "llm/pytorch_model.bin"), {}, "llm/model.safetensors"),
        (("llm/pytorch_model.bin",), {}, "llm/pytorch_model.bin"),
        (("llm/model.bin", "llm/pytorch_model.bin"), {}, "llm/model.bin"),
        (("llm/model.safetensors", "llm/model.fp16.safetensors"), {}, "llm/model.safetensors"),
    ],
)
def test_which_weights_of_the_transformer(make: Make, files: tuple[str, ...], options: dict[str, Any], chosen: str) -> None:
    root = make(*files, "tokenizer/model.safetensors")
    assert names(find_checkpoint(root, **options), root) == [chosen, "tokenizer/model.safetensors"]


def test_no_ema_in_the_projects_layout(make: Make) -> None:
    root = make(*OWN, "transformer/ema_model.safetensors")
    assert names(find_checkpoint(root), root)[0] == OWN[1]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("pytorch_model.bin",), "pytorch_model.bin"),
        (("model.bin", "pytorch_model.bin"), "model.bin"),
        (("model.safetensors", "pytorch_model.bin"), "model.safetensors"),
    ],
)
def test_which_weights_of_the_autoencoder(make: Make, files: tuple[str, ...], chosen: str) -> None:
    root = make(*RELEASED[:2], *(f"tokenizer/{file}" for file in files))
    assert names(find_checkpoint(root), root)[1] == f"tokenizer/{chosen}"


@pytest.mark.parametrize(
    "shards",
    [
        ["model.fp16.safetensors"],
        ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
        ["pytorch_model.fp16.bin"],
    ],
)
def test_a_variant(make: Make, shards: list[str]) -> None:
    files = [f"{part}/{shard}" for part in ("llm", "tokenizer") for shard in shards]
    root = make(*RELEASED, *files)
    with pytest.raises(CheckpointNotFoundError, match="not as variant 'fp16'; pass use_ema=False .* or drop the variant"):
        find_checkpoint(root, variant="fp16")
    assert names(find_checkpoint(root, variant="fp16", use_ema=False), root) == files
    (root / "llm/ema_model.bin").unlink()
    assert names(find_checkpoint(root, variant="fp16"), root) == files


def test_an_ema_variant(make: Make) -> None:
    files = ["llm/ema_model.fp16.safetensors", "tokenizer/model.fp16.safetensors"]
    root = make(*RELEASED, *files, "llm/model.fp16.safetensors")
    assert names(find_checkpoint(root, variant="fp16"), root) == files


def test_a_variant_is_a_name_not_a_pattern(make: Make) -> None:
    root = make(*RELEASED, "llm/model.fp16.safetensors", "tokenizer/model.fp16.safetensors")
    assert "expected ema_model.fp...safetensors" in refusal(root, variant="fp..")


def shards(folder: str, count: int, stem: str = "model", suffix: str = "safetensors") -> list[str]:
    return [f"{folder}/{stem}-{i:05}-of-{count:05}.{suffix}" for i in range(1, count + 1)]


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("ema_model", "bin"), ("pytorch_model", "bin")])
def test_all_shards_in_order(make: Make, stem: str, suffix: str) -> None:
    files = shards("llm", 11, stem, suffix) + shards("tokenizer", 2)
    root = make(*files, "llm/model.safetensors.index.json")
    assert names(find_checkpoint(root), root) == files


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_incomplete_set_of_shards(make: Make, lost: int) -> None:
    files = shards("llm", 3)
    root = make(*files[:lost], *files[lost + 1 :], RELEASED[2])
    message = refusal(root)
    assert "2 of 3 shards of llm/model.safetensors" in message
    assert "copy the others" in message


def test_one_file_beside_old_shards(make: Make) -> None:
    root = make(*shards("llm", 3)[:2], "llm/model.safetensors", RELEASED[2])
    assert names(find_checkpoint(root), root)[0] == "llm/model.safetensors"


def test_scales_of_the_two_configurations_must_agree(make: Make) -> None:
    root = make(*RELEASED)
    file = root / "tokenizer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"v_patch_nums": [1, 2, 3]}))
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(root)
    assert str(root) in str(caught.value)
    assert "patch_nums [1, 2, 3, 4, 6, 8]" in str(caught.value)
    assert "v_patch_nums [1, 2, 3]" in str(caught.value)


def test_a_model_index_of_another_library(make: Make) -> None:
    root = make(
        "model_index.json", "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
    )
    assert "no weights in transformer/" in refusal(root)


TEXT = ("config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize("folder", ["text_encoder", "text-encoder"])
@pytest.mark.parametrize("files", [RELEASED, OWN])
def test_a_text_encoder_inside(make: Make, files: tuple[str, ...], folder: str) -> None:
    root = make(*files, *(f"{folder}/{name}" for name in TEXT))
    make("config.json", root="Qwen2-VL-1.5B-Instruct")  # comes second
    assert find_checkpoint(root).text_encoder == root / folder
    assert find_checkpoint(root / files[1].split("/")[0]).text_encoder == root / folder


def test_a_folder_is_no_text_encoder_without_its_configuration(make: Make) -> None:
    assert find_checkpoint(make(*RELEASED, "text_encoder/model.safetensors")).text_encoder is None


@pytest.mark.parametrize("where", [".", "llm"])
def test_the_released_text_encoder_beside(make: Make, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(*RELEASED)
    beside = make("config.json", root="Qwen2-VL-1.5B-Instruct")
    assert find_checkpoint(root / where).text_encoder == beside
    monkeypatch.chdir(root)
    found = find_checkpoint(where).text_encoder
    assert found is not None
    assert found.resolve() == beside.resolve()


def test_no_text_encoder(make: Make) -> None:
    assert find_checkpoint(make(*RELEASED)).text_encoder is None


def test_find_text_encoder_in_a_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(*TEXT, root="text")
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("USERPROFILE", str(root.parent))
    assert find_text_encoder(root) == root
    assert find_text_encoder("~/text") == root
    for wrong in (root / "model.safetensors", root.parent):
        with pytest.raises(CheckpointNotFoundError, match=r"is not a text encoder's folder: config\.json is not in it"):
            find_text_encoder(wrong)
    with pytest.raises(CheckpointNotFoundError, match="neither an existing folder nor a Hub id"):
        find_text_encoder(root / "nowhere" / "at" / "all")
