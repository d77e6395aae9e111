"""The pictures for FID: the same whatever interrupts or splits the work, and the npz has what the PNGs have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

OPTIONS = ("--batch-size", "3", "--dtype", "fp32", "--device", "cpu")
NAMES = [f"{label:04d}-{index:05d}.png" for index in range(2) for label in range(10)]


@pytest.fixture(scope="module")
def script(benchmarks: None, whole_var_tiny: Path):
    import sample_for_fid

    sample_for_fid.var_tiny = whole_var_tiny
    return sample_for_fid


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run makes of two pictures a class: a folder of pictures and the npz beside it. The others draw one a class."""
    out = tmp_path_factory.mktemp("whole") / "pictures"
    assert draw(script, out, "--per-class", "2") == 0
    return out


def draw(script, out: Path, *more: str) -> int:
    return script.main([str(out), "--model", str(script.var_tiny), *OPTIONS, "--per-class", "1", *more])


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "settings.json"}


def assert_same(out: Path, whole: Path) -> None:
    """One picture a class, each that of the whole run, in the folder and in the npz."""
    found, expected = pictures(out), pictures(whole)
    assert found == {name: expected[name] for name in NAMES[:10]}
    assert np.array_equal(np.load(f"{out}.npz")["arr_0"], np.load(f"{whole}.npz")["arr_0"][:10])


def test_a_run_makes_every_picture(whole):
    assert sorted(pictures(whole)) == sorted(NAMES)
    assert len(set(pictures(whole).values())) == len(NAMES)


def test_the_npz_has_what_the_pictures_have(whole):
    with np.load(whole.with_name("pictures.npz")) as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (20, 256, 256, 3)
    for picture, name in zip(array, NAMES, strict=True):
        assert np.array_equal(picture, np.asarray(Image.open(whole / name)))


def test_a_picture_is_that_of_its_class_and_index(whole, whole_var_tiny):
    from hart_infer import VarPipeline

    pipe = VarPipeline.from_pretrained(whole_var_tiny, device="cpu")
    image = pipe(7, seed=7_000_001, preset="fid").images[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(whole / "0007-00001.png")))


def test_an_interrupted_run_goes_on(script, whole, tmp_path, monkeypatch):
    out = tmp_path / "pictures"
    save, saved = script.save_picture, []

    def interrupted(image, path):
        if len(saved) == 4:  # in the middle of a batch
            raise KeyboardInterrupt
        saved.append(save(image, path))

    monkeypatch.setattr(script, "save_picture", interrupted)
    assert draw(script, out) == 130
    assert len(pictures(out)) == 4 and not out.with_name("pictures.npz").exists()
    untouched = (out / NAMES[0]).stat().st_mtime_ns
    monkeypatch.setattr(script, "save_picture", save)
    assert draw(script, out) == 0
    assert_same(out, whole)
    assert (out / NAMES[0]).stat().st_mtime_ns == untouched


def test_an_interrupted_npz_leaves_nothing(script, whole, tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "read_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.write_npz([whole / name for name in NAMES], tmp_path / "x.npz")
    assert not any(tmp_path.iterdir())


def test_shards_together_are_one_run(script, whole, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert draw(script, out, "--shard", "1/2") == 0
    assert len(pictures(out)) == 4 and not out.with_name("pictures.npz").exists()
    assert "are missing" in capsys.readouterr().out
    assert draw(script, out, "--shard", "0/2") == 0
    assert_same(out, whole)


def test_other_settings_need_another_folder(script, whole, capsys):
    assert draw(script, whole, "--preset", "default") == 1
    assert "was begun with preset 'fid', not 'default'" in capsys.readouterr().err


def test_a_damaged_picture_is_named(script, whole, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((whole / NAMES[0]).read_bytes()[:1000])
    with pytest.raises(script.BenchmarkError, match="broken.png can't be read"):
        script.write_npz([broken], tmp_path / "x.npz")


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "0/0", "a/b"])
def test_a_shard_that_is_none_is_refused(script, shard, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        script.main([str(tmp_path), f"--shard={shard}"])
    assert not any(tmp_path.iterdir())
