"""Measures of quality: known answers, what is refused, and what the results name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hart_infer import InputError
from hart_infer.batch.driver import run_batch
from hart_infer.batch.reading import read_table
from hart_infer.batch.worker import WorkerOptions
from tests.batch import stand_in

pytest.importorskip("torchmetrics")
pytest.importorskip("pyarrow")
RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate"
N, D = 64, 6


@pytest.fixture(scope="module", autouse=True)
def recipe() -> Iterator[None]:
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


@pytest.fixture
def features() -> torch.Tensor:
    """[N, D] with correlated columns."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=random) @ torch.randn(D, D, generator=random) + 3


class Means(torch.nn.Module):
    """A network of 12 features: the mean colour of each quarter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class LikeInception(torch.nn.Module):
    """Takes what inception-2015-12-05.pt takes; as many features as it is told."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = images.mean(dim=(1, 2, 3))[:, None].repeat(1, self.width)
        return features if return_features else features[:, :1]


def save_script(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


def write_pictures(folder: Path, count: int, *, seed: int, side: int = 8, suffix: str = ".png") -> Path:
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:03d}{suffix}")
    return folder


# ---- FID


def test_fid_of_a_set_with_itself_is_zero(features):
    from metrics import frechet_distance

    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9 * features.square().sum().item())


def test_fid_of_a_shift_is_its_square(features):
    from metrics import frechet_distance

    shift = torch.arange(D).double()
    assert frechet_distance(features.double(), features.double() + shift) == pytest.approx(shift.square().sum().item())


def test_fid_of_a_scaling_is_the_closed_form(features):
    from metrics import frechet_distance

    x, a = features.double(), 1.7
    expected = (a - 1) ** 2 * (x.mean(dim=0).square().sum() + torch.cov(x.T).trace())
    assert frechet_distance(x, a * x) == pytest.approx(expected.item())


def test_fid_of_unlike_covariances_is_the_published_formula(features):
    from metrics import frechet_distance

    other = torch.randn(50, D, generator=torch.Generator().manual_seed(1)).double() * torch.arange(1, D + 1)
    one, two = torch.cov(features.double().T), torch.cov(other.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).sqrt().sum()
    gap = (features.double().mean(dim=0) - other.mean(dim=0)).square().sum()
    expected = gap + one.trace() + two.trace() - 2 * cross
    assert frechet_distance(features, other) == pytest.approx(expected.item())


def test_statistics_stand_for_their_pictures(features):
    from metrics import Gaussian, fid, frechet_distance

    x, y = features.double(), features.double().flip(0)[:40] * 1.3
    statistics = Gaussian(x.mean(dim=0), torch.cov(x.T))
    assert frechet_distance(statistics, y) == pytest.approx(frechet_distance(x, y))
    assert fid(statistics, y).reference_halves == ()


def test_fid_says_how_far_it_can_be_trusted(features):
    from metrics import fid

    found = fid(features, features + 1, cuts=3, seed=5)
    assert found.value == pytest.approx(D, rel=1e-4) and not found.rank_deficient
    assert len(found.halves) == 6 and len(found.reference_halves) == 3 and min(found.reference_halves) > 0
    assert found == fid(features, features + 1, cuts=3, seed=5) != fid(features, features + 1, cuts=3, seed=6)
    assert fid(features[:D], features).rank_deficient


# ---- KID


def test_kid_of_two_points_is_the_kernel(features):
    from metrics import kid

    x, y = torch.ones(20, D).double(), torch.full((20, D), 2.0).double()
    found = kid(x, y)
    assert found.value == pytest.approx((1 + 1) ** 3 + (4 + 1) ** 3 - 2 * (2 + 1) ** 3)
    assert found.std == pytest.approx(0, abs=1e-9) and found.subset_size == 10


def test_kid_is_unbiased_and_has_a_spread():
    from metrics import kid

    random = torch.Generator().manual_seed(0)
    found = kid(torch.randn(400, D, generator=random), torch.randn(400, D, generator=random))
    assert found.std > 0 and abs(found.value) < 2 * found.std


def test_kid_follows_its_seed_and_leaves_the_global_one(features):
    from metrics import kid

    before = torch.random.get_rng_state()
    assert kid(features, features + 1, seed=1) == kid(features, features + 1, seed=1) != kid(features, features + 1, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())


# ---- pictures


def test_resizing_is_antialiased_and_leaves_its_own_size():
    from pictures import to_tensor

    fine = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = Image.fromarray(np.repeat(fine[..., None], 3, axis=2).astype(np.uint8))
    assert torch.equal(to_tensor(image, 64), to_tensor(image, None))
    assert (to_tensor(image, 16)[:, 2:-2, 2:-2] - 127.5).abs().max() < 1


def test_a_batch_brings_captions_weights_and_failures(tmp_path):
    from pictures import open_set

    (tmp_path / "rows.csv").write_text("id,prompt\na,cat\nb,nonsense\nc,dog\n")
    options = WorkerOptions(stand_in.load, str(tmp_path / "drawn"))
    run_batch(read_table(str(tmp_path / "rows.csv")).rows, options, chunk_size=2, described={"model": "m"})
    found = open_set(tmp_path / "drawn")
    assert (found.names, found.captions, found.failed) == (("a", "c"), ("cat", "dog"), 1)
    assert found.settings == {"made_by": "hart-infer batch", "model": "m", "weights": "0123"}
    (tmp_path / "drawn" / "manifest.parquet").unlink()
    with pytest.raises(InputError, match="not finished"):
        open_set(tmp_path / "drawn")


def test_what_is_no_set_is_refused(tmp_path):
    from pictures import open_set

    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no")
    for name in ("empty", "floats.npz", "pickled.npz", "text.npz", "missing"):
        with pytest.raises(InputError):
            open_set(tmp_path / name)


# ---- networks


def test_inception_is_told_from_other_networks(tmp_path):
    from networks import extract, load_network
    from pictures import open_set

    pictures, cpu = open_set(write_pictures(tmp_path / "a", 3, seed=0)), torch.device("cpu")
    right = load_network("inception", save_script(LikeInception(2048), tmp_path / "right.pt"), cpu)
    assert extract(right, pictures, size=None).values.shape == (3, 2048)
    narrow = load_network("inception", save_script(LikeInception(8), tmp_path / "narrow.pt"), cpu)
    with pytest.raises(InputError, match="2048"):
        extract(narrow, pictures, size=None)
    with pytest.raises(InputError, match="return_features"):
        load_network("inception", save_script(Means(), tmp_path / "other.pt"), cpu)


def test_a_pickle_is_not_loaded(tmp_path):
    from networks import load_network

    torch.save({"weights": torch.zeros(1)}, tmp_path / "pickle.pt")
    for kind in ("inception", "torchscript", "judge"):
        with pytest.raises(InputError):
            load_network(kind, tmp_path / "pickle.pt", torch.device("cpu"))


def test_the_judge_is_the_recipes_classifier(tmp_path):
    from networks import MINI, extract, load_network
    from pictures import open_set

    pytest.importorskip("resvg_py")
    sys.path.insert(0, str(MINI))
    from classifier import Classifier

    sys.path.remove(str(MINI))
    classifier = Classifier(5).eval()
    save_file(classifier.state_dict(), tmp_path / "judge.safetensors")
    pictures = open_set(write_pictures(tmp_path / "a", 2, seed=0, side=32))
    found = extract(load_network("judge", tmp_path / "judge.safetensors", torch.device("cpu")), pictures, size=None)
    pixels = np.stack([np.asarray(pictures.source.picture(i)[0]) for i in range(2)])
    with torch.inference_mode():
        expected = classifier.features(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    torch.testing.assert_close(found.values, expected)


# ---- the whole command


@pytest.fixture
def script(tmp_path) -> Path:
    return save_script(Means(), tmp_path / "means.pt")


def score(tmp_path: Path, script: Path, real: Path, drawn: Path, *more: str) -> int:
    from score import main

    options = ["--features", "torchscript", "--weights", str(script), "--device", "cpu"]
    return main([str(real), str(drawn), *options, "--out", str(tmp_path / "results.json"), *more])


def test_a_folder_with_itself(tmp_path, script, capsys):
    folder = write_pictures(tmp_path / "a", 40, seed=0)
    assert score(tmp_path, script, folder, folder) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["score"]["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["reference"] == found["drawn"] and found["drawn"]["formats"] == ["PNG"]
    assert found["features"]["network"] == "torchscript" and found["features"]["width"] == 12
    assert found["machine"]["torchmetrics"] and "compare with no published ones" in capsys.readouterr().out


def test_an_npz_holds_the_same_pictures(tmp_path, script):
    folder = write_pictures(tmp_path / "a", 20, seed=0)
    np.savez(tmp_path / "a.npz", arr_0=np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]))
    assert score(tmp_path, script, folder, tmp_path / "a.npz") == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["drawn"]["pixels"] == found["reference"]["pixels"] and found["score"]["fid"]["value"] < 1e-6


def test_unequal_sizes_are_refused_and_resized(tmp_path, script, capsys):
    small, large = write_pictures(tmp_path / "a", 8, seed=0), write_pictures(tmp_path / "b", 8, seed=0, side=16)
    assert score(tmp_path, script, small, large) == 1
    assert "--size" in capsys.readouterr().err and not (tmp_path / "results.json").exists()
    assert score(tmp_path, script, small, large, "--size", "8") == 0


def test_statistics_of_another_network_are_refused(tmp_path, script, capsys):
    folder = write_pictures(tmp_path / "a", 20, seed=0)
    np.savez(tmp_path / "right.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert score(tmp_path, script, tmp_path / "right.npz", folder) == 0
    assert json.loads((tmp_path / "results.json").read_text())["score"]["kid"] is None
    assert score(tmp_path, script, tmp_path / "wrong.npz", folder) == 1
    assert "2048" in capsys.readouterr().err


def test_a_broken_picture_is_named(tmp_path, script, capsys):
    folder = write_pictures(tmp_path / "a", 6, seed=0)
    (folder / "003.png").write_bytes(b"no picture")
    assert score(tmp_path, script, folder, folder) == 1
    assert "003.png" in capsys.readouterr().err


def test_only_equal_things_are_compared(tmp_path, script, capsys):
    from compare import main

    real, other = write_pictures(tmp_path / "real", 20, seed=0), write_pictures(tmp_path / "other", 20, seed=1)
    few = write_pictures(tmp_path / "few", 12, seed=1)
    for name, reference, drawn in (("a", real, other), ("b", real, real), ("c", other, other), ("d", real, few)):
        assert score(tmp_path, script, reference, drawn) == 0
        (tmp_path / "results.json").rename(tmp_path / f"{name}.json")
    files = {name: str(tmp_path / f"{name}.json") for name in "abcd"}
    capsys.readouterr()
    assert main([files["a"], files["b"]]) == 0
    assert "FID" in capsys.readouterr().out
    for name, reason in (("c", "reference.pixels"), ("d", "drawn.pictures")):
        assert main([files["a"], files[name]]) == 1
        assert reason in capsys.readouterr().err


# ---- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand random weights, with a tokenizer of letters."""
    import transformers

    pil = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {
        word: i for i, word in enumerate([*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])
    }
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": 53, "bos_token_id": 52}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    sides = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    transformers.CLIPProcessor(pil.CLIPImageProcessorPil(**sides), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine(tmp_path, clip_folder):
    from networks import clip_score, load_clip
    from pictures import PictureSet, open_set

    clip = load_clip(clip_folder, torch.device("cpu"))
    folder = open_set(write_pictures(tmp_path / "a", 3, seed=0))
    captions = ("cat", "dog", "a caption that is longer than twelve letters and so is cut")
    found = clip_score(clip, PictureSet(folder.name, folder.source, folder.names, captions))
    cosines = []
    for place, caption in enumerate(captions):
        image = clip.get_image_features(clip(images=[folder.source.picture(place)[0]], return_tensors="pt").pixel_values)
        words = clip(text=[caption], return_tensors="pt")
        assert words.input_ids.shape[1] <= 12 and words.input_ids[0, -1] == 53
        cosines.append(torch.cosine_similarity(image, clip.get_text_features(words.input_ids, words.attention_mask)).item())
    expected = 100 * torch.tensor(cosines).clamp(min=0)
    assert found.value == pytest.approx(expected.mean().item(), abs=1e-4) and found.pictures == 3
    assert found.standard_error == pytest.approx(expected.std().item() / 3**0.5, abs=1e-4)
    with pytest.raises(InputError, match="captions"):
        clip_score(clip, folder)


def test_clip_gives_features(tmp_path, clip_folder):
    from networks import extract, load_network
    from pictures import open_set

    pictures = open_set(write_pictures(tmp_path / "a", 3, seed=0))
    network = load_network("clip", clip_folder, torch.device("cpu"))
    assert extract(network, pictures, size=None).values.shape == (3, 8)
