"""Loading through huggingface_hub, against a stand-in of the Hub on loopback."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hart_infer import HartPipeline
from hart_infer.checkpoints.hart import HartCheckpoint, find_checkpoint, inspect_checkpoint
from hart_infer.checkpoints.hub import PAUSES, HubOptions
from hart_infer.checkpoints.text_encoder import find_text_encoder
from hart_infer.errors import CheckpointNotFoundError, ConfigError, OutputError
from tests.hub import HubServer

OFFLINE = HubOptions(local_files_only=True)

REPO, TEXT_REPO = "mit-han-lab/hart-tiny", "mit-han-lab/Qwen2-VL-1.5B-Instruct"
CONFIGS = ["llm/config.json", "tokenizer/config.json"]
EMA = ["llm/config.json", "llm/ema_model.bin", "tokenizer/config.json", "tokenizer/model.safetensors"]
PLAIN = ["llm/config.json", "llm/model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors"]
TEXT = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
CLUTTER = ["README.md", ".gitattributes", "llm/optimizer.bin", "tokenizer/pytorch_model.bin", "figures/cat.png"]
Publish = Callable[..., None]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with one HART repository, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):  # which of them has it depends on the version
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def publish(hub: HubServer, hart_tiny: Path, text_tiny: Path) -> Publish:
    """Put a repository on the Hub: the released tiny checkpoint, or files by their names."""

    def put(repo: str = REPO, files: dict[str, Path | str] | None = None) -> None:
        if files is None:
            files = {name: hart_tiny / name for name in {*EMA, *PLAIN}} | dict.fromkeys(CLUTTER, "clutter")
        for name, source in files.items():
            target = hub.root / repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, Path):
                target.symlink_to(source)
            else:
                target.write_text(source)

    return put


@pytest.fixture
def published(hub: HubServer, publish: Publish) -> HubServer:
    publish()
    return hub


@pytest.fixture
def text_files(text_tiny: Path) -> dict[str, Path | str]:
    return {name: text_tiny / name for name in TEXT}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits between attempts; the waits that were asked for."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def find(repo: str = REPO, **options: Any) -> HartCheckpoint:
    hub = {field.name: options.pop(field.name) for field in fields(HubOptions) if field.name in options}
    return find_checkpoint(repo, **{"with_text_encoder": False, **options}, hub=HubOptions(**hub))


def refusal(repo: str = REPO, **options: Any) -> str:
    with pytest.raises(CheckpointNotFoundError) as caught:
        find(repo, **options)
    message = str(caught.value)
    assert message.startswith(repo)
    return message


def weights(found: HartCheckpoint) -> list[str]:
    files = (*found.transformer_files, *found.autoencoder_files)
    assert all(file.is_file() for file in files)
    return [f"{file.parent.name}/{file.name}" for file in files]


@pytest.mark.parametrize(("use_ema", "files"), [(True, EMA), (False, PLAIN)])
def test_only_the_needed_files_are_downloaded(published: HubServer, use_ema: bool, files: list[str]) -> None:
    found = find(use_ema=use_ema)
    assert weights(found) == [files[1], files[3]]
    assert published.downloaded(REPO) == files


def test_nothing_is_downloaded_twice(published: HubServer) -> None:
    find()
    published.requests.clear()
    find()
    assert published.downloaded(REPO) == []
    find(use_ema=False)
    assert published.downloaded(REPO) == ["llm/model.safetensors"]


def test_a_picture_by_id_is_the_one_by_path(
    published: HubServer, publish: Publish, text_files: dict[str, Path | str], pipe: HartPipeline
) -> None:
    publish(TEXT_REPO, text_files)
    loaded = HartPipeline.from_pretrained(REPO, device="cpu")  # with the default text encoder
    loaded.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"seed": 3, "output_type": "pt"}
    assert torch.equal(loaded("a cat", **options).images, pipe("a cat", **options).images)
    assert loaded.name == REPO
    assert published.downloaded(TEXT_REPO) == TEXT


@pytest.mark.parametrize("suffix", ["", "/", "/llm", "/llm/", "/transformer"])
def test_forms_of_an_id(published: HubServer, suffix: str) -> None:
    assert weights(find(f"{REPO}{suffix}")) == [EMA[1], EMA[3]]


SHARDS = [f"llm/model-0000{i}-of-00002.safetensors" for i in (1, 2)]


BINS = ["llm/pytorch_model.bin", "tokenizer/pytorch_model.bin"]


@pytest.mark.parametrize(
    ("names", "options", "chosen"),
    [
        ([*SHARDS, "llm/model.safetensors.index.json", "tokenizer/model.safetensors"], {}, [*SHARDS, PLAIN[3]]),
        (
            ["llm/pytorch_model.bin", "tokenizer/pytorch_model.bin"],
            {},
            ["llm/pytorch_model.bin", "tokenizer/pytorch_model.bin"],
        ),
        (
            [*PLAIN[1::2], "llm/model.bf16.safetensors", "tokenizer/model.bf16.safetensors"],
            {"variant": "bf16"},
            ["llm/model.bf16.safetensors", "tokenizer/model.bf16.safetensors"],
        ),
        (PLAIN[1::2], {}, PLAIN[1::2]),  # no EMA there
    ],
    ids=["shards", "bin", "variant", "no EMA"],
)
def test_other_forms_of_weights(
    hub: HubServer, publish: Publish, hart_tiny: Path, names: list[str], options: dict[str, Any], chosen: list[str]
) -> None:
    publish(files={name: hart_tiny / name for name in CONFIGS} | {name: name for name in names})
    assert weights(find(**options)) == chosen
    assert hub.downloaded(REPO) == sorted([*CONFIGS, *chosen])
    assert weights(find(**options, local_files_only=True)) == chosen


@pytest.mark.parametrize("with_text_encoder", [True, False])
def test_what_was_saved_and_uploaded(hub: HubServer, pipe: HartPipeline, tmp_path: Path, with_text_encoder: bool) -> None:
    saved = pipe.save_pretrained(hub.root / REPO, max_shard_size="1MB")
    files = sorted(file.relative_to(saved).as_posix() for file in saved.rglob("*") if file.is_file())
    loaded = HartPipeline.from_pretrained(REPO, device="cpu", **({} if with_text_encoder else {"text_encoder": False}))
    assert (loaded.text_encoder is not None) == with_text_encoder
    state, expected = loaded.transformer.state_dict(), pipe.transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    wanted = [name for name in files if ".index." not in name and (with_text_encoder or "text_encoder/" not in name)]
    assert hub.downloaded(REPO) == wanted


def test_cache_dir_is_honoured(published: HubServer, tmp_path: Path) -> None:
    for cache in (tmp_path / "mine", str(tmp_path / "mine too")):
        found = find(cache_dir=cache)
        assert all(file.is_relative_to(cache) for file in found.transformer_files)
        assert find(cache_dir=cache, local_files_only=True) == found
    assert not (tmp_path / "cache").exists()
    refusal(local_files_only=True)


def test_revisions(published: HubServer, publish: Publish, tmp_path: Path) -> None:
    old = published.sha(REPO)
    by_name, by_sha = find(revision="main"), find(revision=old)
    assert by_name == by_sha == find()
    (published.root / REPO / "tokenizer/model.safetensors").unlink()
    publish(files={"tokenizer/model.safetensors": "new weights"})
    published.requests.clear()
    new = find()
    assert new != by_name
    assert new.autoencoder_files[0].read_text() == "new weights"
    assert published.downloaded(REPO) == ["tokenizer/model.safetensors"]  # the rest is the same
    assert find(revision=old, local_files_only=True) == by_name
    assert find(local_files_only=True) == new


def test_an_unknown_revision(published: HubServer) -> None:
    assert "has no revision 'v9'; check the name" in refusal(revision="v9")
    message = refusal(revision="v9", local_files_only=True)
    assert "is not in the local cache and local_files_only is set" in message
    assert published.downloaded(REPO) == []


@pytest.mark.parametrize("token", [None, "hf_mine"])
def test_an_unknown_repository(hub: HubServer, token: str | None) -> None:
    message = refusal("someone/else", token=token)
    assert "neither a folder here nor a repository on the Hub that you can read" in message
    assert "check the spelling" in message
    assert "token=" in message


@pytest.mark.parametrize("repo", ["a--b/c", "a/b..c", "a/-b-."])
def test_an_id_that_the_hub_cannot_have(hub: HubServer, repo: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is not a valid Hub id|neither an existing folder nor a Hub id"):
        find(repo)
    assert hub.requests == []


def test_the_token_is_sent(published: HubServer) -> None:
    published.gated[REPO] = {"hf_right"}
    find(token="hf_right")
    assert {request.token for request in published.requests} == {"hf_right"}
    assert published.downloaded(REPO) == EMA


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_a_gated_repository(published: HubServer, token: str | None) -> None:
    published.gated[REPO] = {"hf_right"}
    message = refusal(token=token)
    assert "is gated: ask for access on its page, then pass token=..." in message
    asked = [request.path for request in published.requests if request.path.endswith("llm/config.json")]
    assert len(asked) == 1  # asking again is of no use


def test_a_gate_that_closes_leaves_the_cache(published: HubServer) -> None:
    published.gated[REPO] = {"hf_right"}
    found = find(token="hf_right")
    assert find() == found
    assert find(local_files_only=True) == found


def test_a_token_that_was_never_stored(published: HubServer) -> None:
    assert "log in with `hf auth login`" in str(pytest.raises(CheckpointNotFoundError, find, token=True).value)


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def http_error(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"status {status}", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(401), "the Hub does not accept the token (401)"),
        (http_error(429), "the Hub answers with an error (429)"),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE"), "the Hub can't be reached (OfflineModeIsEnabled)"),
        (TimeoutError(), "the Hub can't be reached (TimeoutError)"),
    ],
    ids=["bad token", "too many requests", "offline mode", "timeout"],
)
def test_when_the_hub_cannot_be_asked(
    published: HubServer, error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "model_info", raising(error))
        assert f"is not in the local cache and {words}; connect, download it elsewhere" in refusal()
    warm = find()
    monkeypatch.setattr(HfApi, "model_info", raising(error))
    assert find() == warm


def be_unavailable(hub: HubServer, how: str) -> str:
    """Returns what an error should say of it."""
    if how == "stopped":
        hub.stop()
        return "the Hub can't be reached"
    hub.failing = 503
    return "the Hub answers with an error (503)"


@pytest.mark.parametrize("how", ["stopped", "503"])
def test_an_unavailable_server_with_a_warm_cache(
    published: HubServer,
    publish: Publish,
    text_files: dict[str, Path | str],
    pipe: HartPipeline,
    how: str,
    impatient: list[float],
) -> None:
    publish(TEXT_REPO, text_files)
    HartPipeline.from_pretrained(REPO, device="cpu")
    impatient.clear()
    be_unavailable(published, how)
    again = HartPipeline.from_pretrained(REPO, device="cpu")
    assert impatient == []  # no retries where the cache has it all, the text encoder's files included
    again.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"seed": 3, "output_type": "latent"}
    assert torch.equal(again("a cat", **options).images, pipe("a cat", **options).images)


@pytest.mark.parametrize("how", ["stopped", "503"])
def test_an_unavailable_server_with_a_cold_cache(published: HubServer, how: str, impatient: list[float]) -> None:
    words = be_unavailable(published, how)
    message = refusal()
    assert f"is not in the local cache and {words}" in message
    assert "pass the folder" in message


@pytest.mark.parametrize("warm", [True, False])
def test_a_server_that_goes_away_after_the_listing(
    published: HubServer, warm: bool, monkeypatch: pytest.MonkeyPatch, impatient: list[float]
) -> None:
    if warm:
        find()
    model_info = HfApi.model_info

    def ask_and_leave(*args: Any, **options: Any) -> Any:
        info = model_info(*args, **options)
        published.stop()
        return info

    monkeypatch.setattr(HfApi, "model_info", ask_and_leave)
    if warm:
        assert weights(find()) == [EMA[1], EMA[3]]
    else:
        message = refusal()
        assert "is not complete in the local cache (llm/config.json, tokenizer/config.json missing)" in message
        assert "the Hub can't be reached" in message


def test_local_files_only(published: HubServer) -> None:
    message = refusal(local_files_only=True)
    assert "is not in the local cache and local_files_only is set; connect" in message
    found = find()
    published.requests.clear()
    assert find(local_files_only=True) == found
    assert published.requests == []


def test_without_the_hub_plain_weights_are_not_taken_for_ema_in_silence(
    published: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    find(use_ema=False)
    assert weights(find(use_ema=False, local_files_only=True)) == [PLAIN[1], PLAIN[3]]
    assert not caplog.messages
    assert weights(find(local_files_only=True)) == [PLAIN[1], PLAIN[3]]
    (message,) = caplog.messages
    assert message.startswith(f"{REPO} in the local cache (local_files_only is set) has no EMA weights, so the plain ones")
    assert "use_ema=False" in message
    caplog.clear()
    find()
    assert weights(find(local_files_only=True)) == [EMA[1], EMA[3]]
    assert not caplog.messages


def test_a_checkpoint_is_inspected_without_its_weights(published: HubServer) -> None:
    for _ in range(2):
        found = inspect_checkpoint(REPO)
        assert found == inspect_checkpoint(REPO, hub=OFFLINE)
        assert (weights(found), published.downloaded(REPO)) == ([], CONFIGS)
    whole = find(use_ema=False)
    assert weights(inspect_checkpoint(REPO)) == []  # the EMA weights are not here
    assert inspect_checkpoint(REPO, use_ema=False) == inspect_checkpoint(REPO, use_ema=False, hub=OFFLINE) == whole


def test_an_incomplete_cache(published: HubServer) -> None:
    found = find()
    found.autoencoder_files[0].unlink()
    for how in ("local_files_only", "stopped"):
        if how == "stopped":
            published.stop()
        message = refusal(local_files_only=how == "local_files_only")
        assert f"{REPO} in the local cache" in message
        assert "has no weights in tokenizer/: expected model.safetensors" in message
    published.start()
    assert weights(find()) == [EMA[1], EMA[3]]


def test_a_text_encoder_that_is_not_in_the_cache_yet(
    published: HubServer, publish: Publish, text_files: dict[str, Path | str]
) -> None:
    publish(files={f"text_encoder/{name}": source for name, source in text_files.items()})
    find()
    assert find(local_files_only=True, with_text_encoder=True).text_encoder is None
    assert find(local_files_only=True).text_encoder is None
    find(with_text_encoder=True)
    found = find(local_files_only=True, with_text_encoder=True).text_encoder
    assert found is not None
    assert sorted(file.name for file in found.iterdir()) == TEXT


def test_a_cache_that_something_else_filled(published: HubServer) -> None:
    huggingface_hub.snapshot_download(REPO)
    published.stop()
    assert weights(find(local_files_only=True)) == weights(find()) == [EMA[1], EMA[3]]


def test_a_partial_cache_that_something_else_filled(published: HubServer) -> None:
    huggingface_hub.snapshot_download(REPO, allow_patterns=["*/config.json"])
    message = refusal(local_files_only=True)
    assert f"{REPO} in the local cache (local_files_only is set) " in message


@pytest.mark.parametrize("files", [["README.md"], ["config.json", "model.safetensors"], ["tokenizer/config.json"]])
def test_a_repository_without_a_checkpoint(hub: HubServer, publish: Publish, files: list[str]) -> None:
    publish(files=dict.fromkeys(files, "x"))
    assert "holds no HART checkpoint" in refusal()
    assert hub.downloaded(REPO) == []


def test_an_unsupported_configuration_is_refused_before_the_weights_come(
    published: HubServer, publish: Publish, hart_tiny: Path
) -> None:
    config = json.loads((hart_tiny / "llm/config.json").read_text()) | {"attn_type": "gpt2"}
    (published.root / REPO / "llm/config.json").unlink()
    publish(files={"llm/config.json": json.dumps(config)})
    with pytest.raises(ConfigError, match="attn_type = 'gpt2' is not supported"):
        find()
    assert published.downloaded(REPO) == CONFIGS


def test_an_interrupted_download_is_resumed(
    published: HubServer, hart_tiny: Path, monkeypatch: pytest.MonkeyPatch, impatient: list[float]
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64 * 1024)
    published.cut(REPO, EMA[1], after=2_000_000)
    found = find()
    whole = (hart_tiny / EMA[1]).read_bytes()
    assert found.transformer_files[0].read_bytes() == whole
    transfers = [r for r in published.requests if r.method == "GET" and r.path.endswith(EMA[1])]
    assert [request.status for request in transfers] == [200, 206]
    assert transfers[0].sent == 2_000_000
    assert transfers[1].range is not None
    start = int(transfers[1].range.removeprefix("bytes=").partition("-")[0])
    assert 2_000_000 - 64 * 1024 <= start <= 2_000_000  # what had arrived is kept
    assert transfers[1].sent == len(whole) - start


def test_a_download_that_breaks_off_again_and_again(
    published: HubServer, hart_tiny: Path, impatient: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    published.cut(REPO, EMA[1], after=0, times=1000)
    message = refusal()
    assert "is not complete in the local cache (llm/ema_model.bin missing) and the Hub can't be reached" in message
    assert caplog.text.count(f"Download of {REPO} was interrupted") == len(PAUSES)
    published.cuts.clear()
    published.cut(REPO, EMA[1], after=0, times=len(PAUSES))
    assert find().transformer_files[0].read_bytes() == (hart_tiny / EMA[1]).read_bytes()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_a_full_disk_is_not_an_unreachable_hub(
    published: HubServer, error: OSError, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def download(repo: str, **_: Any) -> str:
        calls.append(repo)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OutputError) as caught:
        find()
    assert str(caught.value).startswith(f"{REPO} can't be stored in the local cache")
    assert words in str(caught.value)
    assert "free space, or point cache_dir (HF_HOME for the command line) at another disk" in str(caught.value)
    assert len(calls) == 1  # another attempt would not help


def test_attempts_are_limited(published: HubServer, monkeypatch: pytest.MonkeyPatch, impatient: list[float]) -> None:
    calls: list[str] = []

    def download(repo: str, *, local_files_only: bool = False, **_: Any) -> str:
        calls.append("cache" if local_files_only else "hub")
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "the Hub can't be reached (ConnectionError)" in refusal()
    assert calls == ["hub"] * (len(PAUSES) + 1) + ["cache"]
    assert set(PAUSES) <= set(impatient)
    assert list(PAUSES) == sorted(PAUSES)


def test_a_commit_between_listing_and_download(published: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is downloaded is of the commit that was listed."""
    listed = published.sha(REPO)
    download, asked = huggingface_hub.snapshot_download, []

    def moved(repo: str, *, revision: str | None, **options: Any) -> str:
        asked.append(revision)
        root = Path(download(repo, revision=revision, **options))
        return str(root if revision == listed else Path(shutil.copytree(root, root.with_name("f" * 40), dirs_exist_ok=True)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", moved)
    assert find().transformer_files[0].parents[1].name == listed
    assert asked == [None, listed] * 2


def test_a_text_encoder_by_its_id(
    published: HubServer, publish: Publish, text_files: dict[str, Path | str], text_tiny: Path
) -> None:
    clutter = ["README.md", "pytorch_model.bin", "onnx/model.onnx", "onnx/config.json", "training_args.bin", "image.png"]
    publish("someone/text", text_files | dict.fromkeys(clutter, "clutter"))
    pipe = HartPipeline.from_pretrained(REPO, text_encoder="someone/text", device="cpu")
    assert pipe.text_encoder is not None
    assert published.downloaded("someone/text") == TEXT
    assert find_text_encoder("someone/text", OFFLINE).is_dir()


def test_a_text_encoder_of_which_only_a_part_is_in_the_cache(
    hub: HubServer, publish: Publish, text_files: dict[str, Path | str]
) -> None:
    publish("someone/text", text_files)
    huggingface_hub.snapshot_download("someone/text", allow_patterns=["*.json"])
    with pytest.raises(CheckpointNotFoundError, match=r"someone/text in the local cache .* holds no weights of a text encoder"):
        find_text_encoder("someone/text", OFFLINE)


def test_a_text_encoder_in_bin_files(hub: HubServer, publish: Publish) -> None:
    files = ["config.json", "pytorch_model.bin.index.json", *(f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2))]
    tokenizer = ["tokenizer_config.json", "vocab.json", "merges.txt"]
    publish("someone/text", {name: name for name in [*files, *tokenizer, "optimizer.bin"]})
    find_text_encoder("someone/text")
    assert hub.downloaded("someone/text") == sorted([*files, *tokenizer])


@pytest.mark.parametrize("folder", ["text_encoder", "text-encoder"])
def test_a_text_encoder_in_the_repository(
    published: HubServer, publish: Publish, text_files: dict[str, Path | str], folder: str
) -> None:
    publish(files={f"{folder}/{name}": source for name, source in text_files.items()} | {f"{folder}/README.md": "clutter"})
    assert HartPipeline.from_pretrained(REPO, text_encoder=False, device="cpu").text_encoder is None
    assert published.downloaded(REPO) == EMA
    assert HartPipeline.from_pretrained(REPO, device="cpu").text_encoder is not None
    assert published.downloaded(REPO) == sorted([*EMA, *(f"{folder}/{name}" for name in TEXT)])
    assert not [request for request in published.requests if TEXT_REPO in request.path]


@pytest.mark.parametrize("local", [True, False])
def test_the_default_text_encoder_is_asked_for_where_none_is_beside(
    published: HubServer, hart_tiny: Path, tmp_path: Path, local: bool
) -> None:
    source = str(shutil.copytree(hart_tiny, tmp_path / "ckpt")) if local else REPO
    with pytest.raises(CheckpointNotFoundError) as caught:
        HartPipeline.from_pretrained(source, device="cpu")
    message = str(caught.value)
    assert f"No text encoder is beside {source}" in message
    assert TEXT_REPO in message
    assert "text_encoder=" in message
    assert [request.path for request in published.requests if TEXT_REPO in request.path] == [f"/api/models/{TEXT_REPO}"]


def test_a_repository_without_a_text_encoder(published: HubServer) -> None:
    with pytest.raises(CheckpointNotFoundError, match=f"{REPO} holds no text encoder: config.json is not in it"):
        HartPipeline.from_pretrained(REPO, text_encoder=REPO, device="cpu")


def test_the_token_goes_to_the_text_encoder_too(
    published: HubServer, publish: Publish, text_files: dict[str, Path | str], tmp_path: Path
) -> None:
    publish(TEXT_REPO, text_files)
    published.gated |= {REPO: {"hf_right"}, TEXT_REPO: {"hf_right"}}
    with pytest.raises(CheckpointNotFoundError, match="is gated"):
        HartPipeline.from_pretrained(REPO, device="cpu")
    HartPipeline.from_pretrained(REPO, token="hf_right", cache_dir=tmp_path / "mine", device="cpu")
    assert (tmp_path / "mine" / f"models--{TEXT_REPO.replace('/', '--')}").is_dir()
    HartPipeline.from_pretrained(REPO, local_files_only=True, cache_dir=tmp_path / "mine", device="cpu")
