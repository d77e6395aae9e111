"""One clean folder, whole or not at all, that loads back identically."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import hart_infer
from hart_infer import HartPipeline
from hart_infer.checkpoints import saving
from hart_infer.checkpoints.saving import check_destination, check_shard_size
from hart_infer.errors import InputError, OutputError

PARTS = ("transformer", "autoencoder", "text_encoder")
WEIGHTS = (huggingface_hub, "save_torch_state_dict")  # what writes them
FULL = OSError(errno.ENOSPC, "No space left on device")
RUST_FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions, links and limits")
Load = Callable[..., HartPipeline]


@pytest.fixture(scope="session")
def load(hart_tiny: Path, text_tiny: Path) -> Load:
    """Load a folder on the CPU; the released tiny checkpoint unless said."""

    def from_pretrained(path: Path = hart_tiny, **options: Any) -> HartPipeline:
        options = {"device": "cpu", **({"text_encoder": text_tiny} if path == hart_tiny else {}), **options}
        pipe = HartPipeline.from_pretrained(path, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return from_pretrained


@pytest.fixture
def bare(pipe: HartPipeline) -> HartPipeline:
    """The shared pipeline without its text encoder."""
    return HartPipeline(pipe.transformer, pipe.autoencoder)


@pytest.fixture(scope="module")
def half(load: Load) -> HartPipeline:
    """Another one, in bf16 and without a text encoder."""
    return load(text_encoder=False, torch_dtype=torch.bfloat16)


def state(pipe: HartPipeline) -> dict[str, Tensor]:
    modules = {"transformer": pipe.transformer, "autoencoder": pipe.autoencoder}
    if pipe.text_encoder is not None:
        modules["text_encoder"] = pipe.text_encoder.model
    return {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}


def assert_identical(pipe: HartPipeline, other: HartPipeline) -> None:
    ours, theirs = state(pipe), state(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, torch.equal(tensor, theirs[name])) == (theirs[name].dtype, True), name


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "1MB"])
def test_what_is_saved_loads_back_identically(load: Load, tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    pipe = load(torch_dtype=dtype)
    saved = pipe.save_pretrained(tmp_path / "saved", max_shard_size=shard_size)
    assert saved == tmp_path / "saved"
    again = load(saved)  # the stored dtype, the text encoder inside
    assert again.dtype == dtype
    assert_identical(pipe, again)
    assert again.transformer.config == pipe.transformer.config
    assert again.autoencoder.config == pipe.autoencoder.config
    pictures = [p("a cat on a mat", seed=5, output_type="pt").images for p in (pipe, again)]
    assert torch.equal(*pictures)


def test_the_quantizer_is_saved_in_fp32(load: Load, bare: HartPipeline, half: HartPipeline, tmp_path: Path) -> None:
    exact = {name: t for name, t in state(bare).items() if name.startswith("autoencoder.quantizer.")}
    saved = half.save_pretrained(tmp_path / "saved")
    again = state(load(saved, text_encoder=False, torch_dtype=torch.bfloat16))
    assert all(torch.equal(again[name], tensor) for name, tensor in exact.items())
    assert {t.dtype for name, t in again.items() if name not in exact} == {torch.bfloat16}


@pytest.mark.parametrize("with_text", [True, False])
def test_the_folder_holds_what_it_should_and_nothing_else(
    load: Load, pipe: HartPipeline, bare: HartPipeline, tmp_path: Path, with_text: bool
) -> None:
    saved = (pipe if with_text else bare).save_pretrained(tmp_path / "saved")
    parts = PARTS if with_text else PARTS[:2]
    index = json.loads((saved / "model_index.json").read_text())
    assert index == {
        "_class_name": "HartPipeline",
        "_hart_infer_version": hart_infer.__version__,
        "parts": list(parts),
        "defaults": {
            "guidance_scale": 4.5,
            "top_p": 0.0,
            "use_system_prompt": True,
            "residual_temperature": 1.0,
            "late_temperature": 1.0,
        },
    }
    names = set(content(saved))
    for part in PARTS[:2]:
        assert {name for name in names if name.startswith(f"{part}/")} == {f"{part}/config.json", f"{part}/model.safetensors"}
    assert {name.split("/")[0] for name in names} == {"model_index.json", *parts}
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".txt", ".jinja"}  # nothing pickled
    again = load(saved) if with_text else load(saved, text_encoder=False)
    assert (again.text_encoder is not None) == with_text


def test_shards_are_no_larger_than_asked(load: Load, bare: HartPipeline, tmp_path: Path) -> None:
    saved = bare.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    for part in PARTS[:2]:
        shards = sorted((saved / part).glob("model-*-of-*.safetensors"))
        assert len(shards) > 3
        for shard in shards:
            with safe_open(shard, framework="pt") as file:
                assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 1_000_000  # noqa: SIM118
        index = json.loads((saved / part / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert_identical(load(saved, text_encoder=False), bare)


@pytest.mark.parametrize("size", ["", "5", "5XB", "five GB", "infGB", "nanGB"])
def test_a_bad_shard_size(bare: HartPipeline, tmp_path: Path, size: str) -> None:
    with pytest.raises(InputError, match="max_shard_size must be a size such as"):
        bare.save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_fewer_bytes_than_the_released_layout(bare: HartPipeline, half: HartPipeline, hart_tiny: Path, tmp_path: Path) -> None:
    def size(folder: Path, *names: str) -> int:
        return sum((folder / name).stat().st_size for name in names)

    ours = ("transformer/model.safetensors", "autoencoder/model.safetensors")
    released = size(hart_tiny, "llm/ema_model.bin", "tokenizer/model.safetensors")
    live = sum(tensor.nbytes for tensor in state(bare).values())
    fp32 = size(bare.save_pretrained(tmp_path / "fp32"), *ours)
    assert live < fp32 < released
    assert fp32 - live < 50_000  # headers
    bf16 = size(half.save_pretrained(tmp_path / "bf16"), *ours)
    assert bf16 < fp32 * 0.55


def test_home_is_expanded(bare: HartPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    bare.save_pretrained("~/models/hart")
    assert (tmp_path / "models/hart/model_index.json").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["models"]


def test_an_empty_folder_is_filled(load: Load, bare: HartPipeline, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    assert_identical(load(bare.save_pretrained(tmp_path / "saved"), text_encoder=False), bare)


@posix
def test_the_folder_is_as_readable_as_any(bare: HartPipeline, tmp_path: Path) -> None:
    saved = bare.save_pretrained(tmp_path / "saved")
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"thesis.tex": "x"}, "is not a saved hart_infer checkpoint"),
        ({"llm/config.json": "{}", "tokenizer/config.json": "{}"}, "is not a saved hart_infer checkpoint"),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}', "vae/x": ""}, "is not a saved hart_infer checkpoint"),
        ({"model_index.json": "["}, "is not a saved hart_infer checkpoint"),
        ({"model_index.json": "[1]"}, "is not a saved hart_infer checkpoint"),
        ({"model_index.json": '{"_hart_infer_version": "0"}', "notes.txt": "x", ".git/HEAD": ""}, "also holds .git, notes.txt"),
    ],
    ids=["files", "released", "another library's", "broken index", "odd index", "more inside"],
)
def test_a_foreign_folder_is_not_touched(bare: HartPipeline, tmp_path: Path, files: dict[str, str], words: str) -> None:
    target = tmp_path / "target"
    for name, text in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(OutputError) as caught:
        bare.save_pretrained(target)
    assert str(caught.value).startswith(str(target))
    assert words in str(caught.value)
    assert "new or empty folder" in str(caught.value)
    assert content(tmp_path) == before


def test_the_shard_size_goes_to_those_who_make_the_shards(
    pipe: HartPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(*WEIGHTS, lambda *_, max_shard_size, **__: asked.append(max_shard_size))
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="0.5mb")
    assert asked == ["0.5mb"] * 3


@pytest.mark.parametrize("size", ["0.5MB", "3 kb", "1TB"])
def test_good_shard_sizes(size: str) -> None:
    check_shard_size(size)


def test_the_check_of_the_destination_makes_nothing(tmp_path: Path) -> None:
    assert check_destination(tmp_path / "a" / "b") == tmp_path.resolve() / "a" / "b"
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(bare: HartPipeline, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(OutputError, match="target is a file; give a new or empty folder"):
        bare.save_pretrained(tmp_path / "target")
    with pytest.raises(OutputError, match="can't be written"):
        bare.save_pretrained(tmp_path / "target" / "below")
    assert content(tmp_path) == {"target": b"mine"}


def test_an_older_save_is_replaced(load: Load, pipe: HartPipeline, half: HartPipeline, tmp_path: Path) -> None:
    saved = pipe.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    half.save_pretrained(saved)
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    assert not (saved / "text_encoder").exists()
    assert not list(saved.rglob("*-of-*"))
    assert_identical(load(saved, text_encoder=False), half)


def test_a_pipeline_can_replace_the_folder_that_it_was_loaded_from(load: Load, bare: HartPipeline, tmp_path: Path) -> None:
    saved = bare.save_pretrained(tmp_path / "saved")
    pipe = load(saved, text_encoder=False)  # its weights are views of the files
    pipe.save_pretrained(saved)
    assert_identical(pipe, bare)
    assert_identical(load(saved, text_encoder=False), bare)


@posix
def test_a_link_is_followed(load: Load, bare: HartPipeline, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    bare.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_identical(load(tmp_path / "disk", text_encoder=False), bare)


def failing(error: BaseException, *, after: int = 0, then: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does as another, and fails after a while."""
    calls = iter(range(after))

    def function(*args: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return then(*args, **options)

    return function


@pytest.fixture
def older(bare: HartPipeline, tmp_path: Path) -> Iterator[Path]:
    """A save that must still be there, and nothing beside it, when the test is over."""
    saved = bare.save_pretrained(tmp_path / "parent" / "saved")
    before = content(tmp_path)
    yield saved
    assert content(tmp_path) == before
    assert [entry.name for entry in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("where", "after", "error"),
    [
        (WEIGHTS, 0, FULL),
        (WEIGHTS, 1, FULL),  # half is written
        (WEIGHTS, 1, RUST_FULL),
        ((Path, "write_text"), 0, FULL),
        ((Path, "write_text"), 2, FULL),  # the index, last of all
        ((Path, "rename"), 0, FULL),
        ((Path, "rename"), 1, FULL),  # the old one has been moved aside
    ],
)
def test_a_failing_write_leaves_the_old_one(
    half: HartPipeline, older: Path, where: tuple[Any, str], after: int, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(saving, "_exchange", lambda a, b: False)  # as where names can't be exchanged
        if where[1] == "rename" and after == 1:
            patch.setattr(Path, "rename", failing_once(error))
        else:
            patch.setattr(*where, failing(error, after=after, then=getattr(*where)))
        with pytest.raises(OutputError) as caught:
            half.save_pretrained(older)
    message = str(caught.value)
    assert message.startswith(f"{older} can't be written (")
    assert "No space left on device" in message
    assert "free space or choose another folder" in message


def failing_once(error: Exception) -> Callable[..., Path]:
    """`Path.rename` that fails at its second call only."""
    rename, calls = Path.rename, iter(range(10))

    def function(self: Path, target: Path) -> Path:
        if next(calls) == 1:
            raise error
        return rename(self, target)

    return function


def test_the_old_one_is_never_deleted_while_it_is_not_back(
    half: HartPipeline, bare: HartPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = bare.save_pretrained(tmp_path / "saved")
    before = content(saved)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "_exchange", lambda a, b: False)
        patch.setattr(Path, "rename", failing(FULL, after=1, then=Path.rename))
        with pytest.raises(OutputError):
            half.save_pretrained(saved)
    (kept,) = tmp_path.glob(".saved.*/old")
    assert content(kept) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
@pytest.mark.parametrize("after", [0, 1])
def test_an_interruption_leaves_the_old_one(
    half: HartPipeline, older: Path, error: BaseException, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*WEIGHTS, failing(error, after=after, then=getattr(*WEIGHTS)))
        with pytest.raises(type(error)):
            half.save_pretrained(older)


def test_a_failing_text_encoder_leaves_the_old_one(load: Load, older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(torch_dtype=torch.bfloat16)
    assert pipe.text_encoder is not None
    monkeypatch.setattr(pipe.text_encoder.tokenizer, "save_pretrained", failing(FULL, then=print))
    with pytest.raises(OutputError, match="No space left on device"):
        pipe.save_pretrained(older)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """The kernel refuses to write beyond `limit` bytes of a file, as it does on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
@pytest.mark.parametrize("limit", [100, 1_000_000])  # a configuration and the weights are larger
def test_a_write_that_the_system_refuses(half: HartPipeline, older: Path, limit: int) -> None:
    with file_size_limit(limit), pytest.raises(OutputError, match=r"saved can't be written \(.*File too large"):
        half.save_pretrained(older)


def test_nothing_is_left_of_a_failed_first_save(bare: HartPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*WEIGHTS, failing(FULL, after=1, then=getattr(*WEIGHTS)))
    with pytest.raises(OutputError):
        bare.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(bare: HartPipeline, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match=r"can't be written \(Permission denied\)"):
            bare.save_pretrained(tmp_path / "saved")
    finally:
        tmp_path.chmod(0o700)


def test_a_parent_that_refuses(bare: HartPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("hart_infer.checkpoints.saving.tempfile.mkdtemp", failing(refusal, then=print))
    with pytest.raises(OutputError, match=r"saved can't be written \(Permission denied\)"):
        bare.save_pretrained(tmp_path / "saved")


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="names can't be exchanged")
def test_there_is_never_a_moment_without_a_folder(bare: HartPipeline, tmp_path: Path) -> None:
    """So a kill between any two steps leaves the old one or the new one."""
    saved = bare.save_pretrained(tmp_path / "saved")
    if not saving._exchange(*(made.mkdir() or made for made in (tmp_path / "a", tmp_path / "b"))):
        pytest.skip("this file system can't exchange names")
    missing, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            if not (saved / "model_index.json").exists():
                missing.append(True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        bare.save_pretrained(saved)
    done.set()
    watcher.join()
    assert not missing


def test_a_kill_after_the_exchange_leaves_the_new_one(
    half: HartPipeline, bare: HartPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = bare.save_pretrained(tmp_path / "saved")
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "rmtree", lambda *args, **kwargs: None)  # all that a killed process would not do
        half.save_pretrained(saved)
    whole = content(saved)
    assert content(half.save_pretrained(tmp_path / "other")) == whole


@pytest.mark.skipif(os.name != "posix", reason="permissions")
@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_the_umask_is_honoured(bare: HartPipeline, tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        saved = bare.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(entry.stat().st_mode) for entry in saved.rglob("*") if entry.is_file()}
    assert modes == {file}
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in (saved, *saved.glob("*/"))} == {folder}
