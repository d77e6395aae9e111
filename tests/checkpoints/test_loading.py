"""From files to a pipeline: which weights, in what precision, with which text encoder."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hart_infer import HartPipeline
from hart_infer.checkpoints.llama import qwen2_name
from hart_infer.checkpoints.text_encoder import load_text_encoder
from hart_infer.errors import CheckpointNotFoundError, ConfigError, HartError, InputError, WeightsError
from hart_infer.models.text import TextEncoder
from hart_infer.pipelines.arguments import default_device

EncoderFolder = Callable[..., Path]


def load(path: str | Path, **options: Any) -> HartPipeline:
    return HartPipeline.from_pretrained(path, device="cpu", **options)


def encoder_of(pipe: HartPipeline) -> TextEncoder:
    assert pipe.text_encoder is not None
    return pipe.text_encoder


def tensors_of(pipe: HartPipeline) -> dict[str, Tensor]:
    """The text encoder's tensors by transformers' names."""
    return {qwen2_name(name): tensor for name, tensor in encoder_of(pipe).model.state_dict().items()}


@pytest.fixture
def encoder_folder(tmp_path: Path, text_tiny: Path) -> EncoderFolder:
    """A copy of the tiny text encoder without its trace, to change."""

    def copy(name: str = "text") -> Path:
        return Path(shutil.copytree(text_tiny, tmp_path / name, ignore=shutil.ignore_patterns("trace*")))

    return copy


def rewrite(file: Path, tensors: dict[str, Tensor]) -> None:
    file.unlink()  # the tensors may be views of it
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(kind: type[HartError], hart_tiny: Path, source: Path) -> str:
    with pytest.raises(kind) as caught:
        load(hart_tiny, text_encoder=source)
    message = str(caught.value)
    assert str(source) in message
    assert "\n" not in message
    return message


STRANGE_KEYS: dict[str, Any] = {
    "uncond_prob": 0.1, "image_size": 1024, "resume_from": "/home/someone/run", "ema_decay": 0.9999, "lr": 1e-4, "seed": None,
    "rope_theta": 10000.0, "use_flash": True, "max_position_embeddings": 16384, "tokenizer_path": "tok", "wandb": {"id": 3},
    "data": ["a", "b"], "prog_si": -1, "cond_dim": 1536, "layer_scale": 0, "init_std": 0.02, "qwen_path": "", "bf16": True,
    "gradient_checkpointing": False, "notes": "\u00e4",
}  # fmt: skip
RELEASED_FLAGS = {  # as a public port of the released weights has them
    "use_context_norm": True, "use_timestep_embed": True, "attn_type": "llama", "mlp_type": "llama", "disable_aln": True,
    "shared_aln": False, "attn_l2_norm": False, "use_cross_attn": False,
}  # fmt: skip


def test_a_released_checkpoint_loads_whatever_else_its_configuration_holds(
    hart_tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(STRANGE_KEYS) == 20
    root = shutil.copytree(hart_tiny, tmp_path / "strange", ignore=shutil.ignore_patterns("trace*"))
    for part in ("llm", "tokenizer"):
        file = root / part / "config.json"
        config = json.loads(file.read_text())
        if part == "llm":
            assert {key: config[key] for key in RELEASED_FLAGS} == RELEASED_FLAGS
            config["num_sampling_steps"] = 8
        file.write_text(json.dumps(STRANGE_KEYS | config))
    pipe = load(root, text_encoder=False)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2  # one for each file
    assert all(key in message for key in STRANGE_KEYS for message in warned)
    expected = load(hart_tiny, text_encoder=False)
    assert pipe.transformer.config == expected.transformer.config
    assert pipe.autoencoder.config == expected.autoencoder.config
    with pytest.raises(ConfigError, match="bf16, cond_dim"):
        load(root, text_encoder=False, strict_config=True)


@pytest.mark.parametrize("part", ["", "llm", "tokenizer"])
@pytest.mark.parametrize("as_text", [True, False])
def test_ema_is_the_default(hart_tiny: Path, part: str, as_text: bool) -> None:
    path = str(hart_tiny / part) if as_text else hart_tiny / part
    plain = load_file(hart_tiny / "llm/model.safetensors")["head.weight"]
    ema = torch.load(hart_tiny / "llm/ema_model.bin", weights_only=True)["head.weight"]
    assert not torch.equal(plain, ema)
    assert torch.equal(load(path, text_encoder=False).transformer.head.linear.weight, ema)
    assert torch.equal(load(path, text_encoder=False, use_ema=False).transformer.head.linear.weight, plain)


def dtypes(pipe: HartPipeline) -> dict[str, set[torch.dtype]]:
    autoencoder = pipe.autoencoder.state_dict().items()
    return {
        "transformer": {p.dtype for p in pipe.transformer.parameters()},
        "autoencoder": {t.dtype for name, t in autoencoder if not name.startswith("quantizer.")},
        "quantizer": {p.dtype for p in pipe.autoencoder.quantizer.parameters()},
        "text_encoder": {p.dtype for p in encoder_of(pipe).model.parameters()},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_one_precision_for_all_but_the_quantizer(hart_tiny: Path, text_tiny: Path, dtype: torch.dtype | None) -> None:
    pipe = load(hart_tiny, text_encoder=text_tiny, torch_dtype=dtype)
    kept = dtype or torch.float32  # what is stored
    assert pipe.dtype == kept
    assert dtypes(pipe) == {
        "transformer": {kept},
        "autoencoder": {kept},
        "quantizer": {torch.float32},
        "text_encoder": {kept},
    }


def test_no_dtype_is_the_transformers_stored_one(hart_tiny: Path, text_tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    shutil.copytree(hart_tiny / "llm", root / "llm", ignore=shutil.ignore_patterns("ema*"))
    shutil.copytree(hart_tiny / "tokenizer", root / "tokenizer")
    stored = load_file(root / "llm/model.safetensors")
    save_file(
        {name: t.bfloat16() if t.is_floating_point() else t for name, t in stored.items()}, root / "llm/model.safetensors"
    )
    pipe = load(root, text_encoder=text_tiny)
    assert {name: found for name, found in dtypes(pipe).items() if name != "quantizer"} == {
        name: {torch.bfloat16} for name in ("transformer", "autoencoder", "text_encoder")
    }


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn, "bfloat16"])
def test_a_dtype_to_compute_in(hart_tiny: Path, dtype: Any) -> None:
    with pytest.raises(InputError) as caught:
        load(hart_tiny, torch_dtype=dtype)
    assert f"must be one of torch.float32, torch.bfloat16, torch.float16, not {dtype!r}" in str(caught.value)


def test_default_device(hart_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, device in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert default_device() == torch.device(device)
    assert HartPipeline.from_pretrained(hart_tiny, text_encoder=False).device == torch.device("cpu")


@pytest.mark.parametrize("folder", ["ckpt/text_encoder", "ckpt/text-encoder", "Qwen2-VL-1.5B-Instruct"])
def test_the_text_encoder_beside_is_found(hart_tiny: Path, tmp_path: Path, encoder_folder: EncoderFolder, folder: str) -> None:
    for part in ("llm", "tokenizer"):
        shutil.copytree(hart_tiny / part, tmp_path / "ckpt" / part)
    encoder_folder(folder)
    for where in ("ckpt", "ckpt/llm"):
        assert encoder_of(load(tmp_path / where)).width == 48
        assert load(tmp_path / where, text_encoder=False).text_encoder is None


def test_a_text_encoder_by_its_path(
    hart_tiny: Path, tmp_path: Path, encoder_folder: EncoderFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = encoder_folder()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    stored = load_file(folder / "model.safetensors")
    for source in (folder, str(folder), "~/text"):
        loaded = tensors_of(load(hart_tiny, text_encoder=source))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


def test_a_text_encoder_of_another_width(hart_tiny: Path, text_tiny: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2Model

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 900}
    Qwen2Model(Qwen2Config(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path / "text")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text_tiny / name, tmp_path / "text")
    message = refusal(ConfigError, hart_tiny, tmp_path / "text")
    assert "gives 32 features" in message
    assert "expects 48" in message
    assert "text_encoder=" in message


def test_a_text_encoder_that_is_not_qwen2(hart_tiny: Path, encoder_folder: EncoderFolder) -> None:
    folder = encoder_folder()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "architectures": ["LlamaModel"]}))
    assert "is a llama model; only qwen2 is supported" in refusal(ConfigError, hart_tiny, folder)


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    rewrite(folder / "model.safetensors", tensors)


def test_a_text_encoder_with_missing_weights(hart_tiny: Path, encoder_folder: EncoderFolder) -> None:
    folder = encoder_folder()
    change_weights(folder, lambda tensors: (tensors.pop("norm.weight"), tensors.pop("layers.1.mlp.up_proj.weight")))
    message = refusal(WeightsError, hart_tiny, folder)
    assert "missing: layers.1.mlp.up.weight, norm.weight" in message


def test_a_text_encoder_with_weights_of_another_shape(hart_tiny: Path, encoder_folder: EncoderFolder) -> None:
    folder = encoder_folder()
    change_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(7)}))
    assert "wrong shape: norm.weight has [7] instead of [48]" in refusal(WeightsError, hart_tiny, folder)


def test_a_text_encoder_with_a_language_models_head(hart_tiny: Path, text_tiny: Path, encoder_folder: EncoderFolder) -> None:
    """What the released one is: the encoder under `model.`, and a head that isn't used."""
    folder = encoder_folder()
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"lm_head.weight": torch.ones(900, 48)}
    rewrite(folder / "model.safetensors", renamed)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForCausalLM"]}))
    loaded = tensors_of(load(hart_tiny, text_encoder=folder))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_truncated_text_encoder(hart_tiny: Path, encoder_folder: EncoderFolder) -> None:
    folder = encoder_folder()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "model.safetensors is damaged or not a weights file" in refusal(WeightsError, hart_tiny, folder)


def test_a_text_encoder_without_weights(hart_tiny: Path, encoder_folder: EncoderFolder) -> None:
    folder = encoder_folder()
    (folder / "model.safetensors").unlink()
    assert "has no weights: expected model.safetensors" in refusal(CheckpointNotFoundError, hart_tiny, folder)


def test_a_text_encoder_without_its_tokenizer(hart_tiny: Path, encoder_folder: EncoderFolder) -> None:
    folder = encoder_folder()
    (folder / "tokenizer.json").unlink()  # transformers 5 would go on with an empty vocabulary
    assert "has no tokenizer: tokenizer.json is not in it" in refusal(CheckpointNotFoundError, hart_tiny, folder)


def test_a_tokenizer_that_cannot_pad(text_tiny: Path) -> None:
    encoder = load_text_encoder(text_tiny)
    encoder.tokenizer.pad_token = None
    with pytest.raises(WeightsError, match="no padding token; HART pads every prompt"):
        TextEncoder(encoder.model, encoder.tokenizer)


@pytest.mark.parametrize("what", ["an id", "the padding token"])
def test_a_tokenizer_that_is_larger_than_the_embedding(hart_tiny: Path, encoder_folder: EncoderFolder, what: str) -> None:
    folder = encoder_folder()
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    if what == "an id":
        added = {"id": rows + 5, "content": "<|far|>", "special": True}
        added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append(added)
    else:
        config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 40}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:40].clone()
        rewrite(folder / "model.safetensors", tensors)
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(WeightsError, match=r"tokenizer has ids up to \d+, and its embedding has \d+ rows"):
        load(hart_tiny, text_encoder=folder)


def test_a_text_encoder_in_a_bin_file(hart_tiny: Path, encoder_folder: EncoderFolder) -> None:
    folder = encoder_folder()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    loaded = tensors_of(load(hart_tiny, text_encoder=folder))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


class Payload:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_text_encoder_with_code_in_it_is_refused_and_not_run(
    hart_tiny: Path, tmp_path: Path, encoder_folder: EncoderFolder
) -> None:
    folder, trap = encoder_folder(), tmp_path / "sprung"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, "hook": Payload(trap)}, folder / "pytorch_model.bin")
    message = refusal(WeightsError, hart_tiny, folder)
    assert "was refused, as reading it could run code" in message
    assert not trap.exists()


def test_a_text_encoders_own_code_is_not_run(hart_tiny: Path, tmp_path: Path, encoder_folder: EncoderFolder) -> None:
    folder, trap = encoder_folder(), tmp_path / "sprung"
    config = json.loads((folder / "config.json").read_text())
    remote = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": remote, "model_type": "evil"}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    refusal(ConfigError, hart_tiny, folder)
    assert not trap.exists()


def test_loading_is_quiet(hart_tiny: Path, encoder_folder: EncoderFolder, capfd: pytest.CaptureFixture[str]) -> None:
    folder = encoder_folder()
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(900, 48)}))  # worth a report
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(listener)
    try:
        load(hart_tiny, text_encoder=folder)
    finally:
        logging.getLogger("transformers").removeHandler(listener)
    assert said == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("file", "kind"),
    [("llm/ema_model.bin", WeightsError), ("tokenizer/model.safetensors", WeightsError), ("llm/config.json", ConfigError)],
)
def test_damage_names_the_file(hart_tiny: Path, tmp_path: Path, file: str, kind: type[HartError]) -> None:
    for part in ("llm", "tokenizer"):
        shutil.copytree(hart_tiny / part, tmp_path / part)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-100])
    with pytest.raises(kind, match=str(tmp_path / file)):
        load(tmp_path, text_encoder=False)


def test_weights_of_another_configuration(hart_tiny: Path, tmp_path: Path) -> None:
    for part in ("llm", "tokenizer"):
        shutil.copytree(hart_tiny / part, tmp_path / part)
    file = tmp_path / "llm/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"depth": 4, "diff_width": 32}))
    with pytest.raises(WeightsError) as caught:
        load(tmp_path, text_encoder=False)
    assert "missing: blocks.3.attn.proj.bias" in str(caught.value)
    assert "diffloss.net.input_proj.weight has [64, 8] instead of [32, 8]" in str(caught.value)


def test_the_errors_are_also_the_builtin_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "a" / "b" / "c")
    with pytest.raises(HartError):
        load(tmp_path)
