"""hart-mini's measures: the judge is asked for what was wished, and a real picture is seen as itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hart_infer import InputError

pytest.importorskip("torchmetrics")
pytest.importorskip("pyarrow")
pytest.importorskip("resvg_py")
ROOT = Path(__file__).parents[2]
NAMES, STYLES = ("cat", "dog", "tree"), ("noto", "fluent", "twemoji")


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "evaluate"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine plain squares: the subject is how red they are, the style how green. One is held out."""
    about = [{"name": name, "style": style, "split": "train"} for name in NAMES for style in STYLES]
    about[4]["split"] = "style"
    pixels = np.zeros((9, 16, 16, 3), dtype=np.uint8)
    for i in range(9):
        pixels[i, ..., 0], pixels[i, ..., 1] = 100 * (i // 3), 100 * (i % 3)
    np.save(tmp_path / "pictures.npy", pixels)
    (tmp_path / "pictures.json").write_text(json.dumps(about))
    return tmp_path


class Seeing(torch.nn.Module):
    """A judge that reads subject and style off such squares."""

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = ((pictures.mean(dim=(2, 3)) + 1) * 127.5 / 100).round().long()
        return tuple(torch.nn.functional.one_hot(values[:, i], 3).float() for i in range(2))


def test_wishes_are_of_learned_pictures_in_other_words(data):
    from mini import read_wishes

    wishes = read_wishes(data, None, 100)
    assert sorted(w.index for w in wishes) == [0, 1, 2, 3, 5, 6, 7, 8]
    for w in wishes:
        assert NAMES[w.subject] in w.prompt and STYLES[w.style] in w.prompt and w.subject * 3 + w.style == w.index
    assert read_wishes(data, None, 3) == read_wishes(data, None, 3) and len(read_wishes(data, None, 3)) == 3


def test_classes_are_wished_for_by_name(data):
    from mini import read_class_wishes

    wishes = read_class_wishes(data, NAMES, 2)
    assert [(w.prompt, w.index, w.style) for w in wishes] == [("cat", 2, 2), ("dog", 5, 2)]
    assert len(read_class_wishes(data, NAMES, 100)) == 3
    with pytest.raises(InputError, match="no picture that var-mini learned of fog"):
        read_class_wishes(data, ["cat", "fog"], 2)


def test_only_the_vocabulary_is_wished_for(data, tmp_path):
    from mini import read_wishes

    (tmp_path / "known.txt").write_text("cat\n")
    assert {w.subject for w in read_wishes(data, tmp_path / "known.txt", 100)} == {0}
    (tmp_path / "known.txt").write_text("unicorn\n")
    with pytest.raises(InputError, match="unicorn"):
        read_wishes(data, tmp_path / "known.txt", 100)


def test_real_pictures_are_seen_as_themselves(data, monkeypatch):
    import mini
    from pictures import of_array

    monkeypatch.setattr(mini, "load_judge", lambda path: Seeing())
    wishes = mini.read_wishes(data, None, 100)
    pixels = np.load(data / "pictures.npy")
    seen = mini.see(of_array("real", pixels[[w.index for w in wishes]], [w.id for w in wishes]), wishes, Path("judge"), 16)
    assert (seen.subject.value, seen.style.value, seen.subject.pictures) == (1.0, 1.0, 8)
    shuffled = pixels[[w.index // 3 * 3 + (w.index + 1) % 3 for w in wishes]]  # the style after it
    seen = mini.see(of_array("other", shuffled, [w.id for w in wishes]), wishes, Path("judge"), 16)
    assert (seen.subject.value, seen.style.value) == (1.0, 0.0)
