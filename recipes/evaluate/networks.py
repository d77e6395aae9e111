"""Networks that turn pictures into features. Their weights are local files; nothing is downloaded, and nothing unpickled."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from metrics import Mean, mean_of
from pictures import PictureSet, Read, Reader
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from tqdm import tqdm

from hart_infer import InputError

MINI = Path(__file__).resolve().parents[1] / "mini"
INCEPTION_WIDTH = 2048


@dataclass(frozen=True)
class Network:
    """`features` maps pictures [N, 3, h, w], fp32 in 0..255, to [N, D]."""

    kind: str
    file: str
    sha256: str  # of the weights, 16 hexadecimal digits
    device: torch.device
    features: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features:
    """The features [N, D] of a set, in the order of its names."""

    values: Tensor
    read: Read


def extract(network: Network, pictures: PictureSet, *, size: int | None, batch_size: int = 32) -> Features:
    """Return the features of all pictures. Raises InputError."""
    reader = Reader(pictures, size)
    parts: list[Tensor] = []
    with torch.inference_mode(), tqdm(total=len(pictures.source), desc=pictures.name, unit="picture", disable=None) as bar:
        for images in reader.batches(batch_size):
            parts.append(_checked(network, network.features(images.to(network.device)), len(images)).cpu())
            bar.update(len(images))
    return Features(torch.cat(parts), reader.found)


def _checked(network: Network, features: Tensor, count: int) -> Tensor:
    features = features.reshape(count, -1).float()
    if not features.isfinite().all():
        raise InputError(f"{network.file} gives features that are not finite, so its weights are not what they should be.")
    if network.kind == "inception" and features.shape[1] != INCEPTION_WIDTH:
        raise InputError(
            f"{network.file} gives {features.shape[1]} features a picture, not {INCEPTION_WIDTH}: it is not the Inception "
            "network that FID is defined by. --features torchscript takes any."
        )
    return features


# ---- kinds


def _inception(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The TorchScript file inception-2015-12-05.pt: TensorFlow's weights, its resizing to 299, its last pooling."""
    script: Any = _script(path, device)
    if not any(argument.name == "return_features" for argument in script.forward.schema.arguments):
        raise InputError(f"{path} takes no argument return_features: it is not inception-2015-12-05.pt.")
    return lambda images: script(images, return_features=True)


def _torchscript(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    return _script(path, device)


def _script(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not a TorchScript file.") from error


def _clip(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    clip = load_clip(path, device)

    def features(images: Tensor) -> Tensor:
        pixels = clip(images=list(images.round().byte().cpu()), return_tensors="pt").pixel_values
        return clip.get_image_features(pixels.to(device))

    return features


def _judge(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    judge: Any = load_judge(path).to(device)
    return lambda images: judge.features(images / 127.5 - 1)


KINDS: dict[str, Callable[[Path, torch.device], Callable[[Tensor], Tensor]]] = {
    "inception": _inception,
    "torchscript": _torchscript,
    "clip": _clip,
    "judge": _judge,
}


def load_network(kind: str, weights: Path, device: torch.device) -> Network:
    """Load a network from its file, or CLIP from its folder. Raises InputError."""
    if not weights.exists():
        raise InputError(f"{weights} does not exist.")
    return Network(kind, weights.name, digest_of(weights), device, KINDS[kind](weights, device))


def load_judge(path: Path) -> nn.Module:
    """Load what `recipes/mini/classifier.py` trained: maps [N, 3, h, w] in -1..1 to logits of subject and style."""
    sys.path.insert(0, str(MINI))
    try:
        from classifier import Classifier
    except ImportError as error:
        raise InputError(
            f"the judge needs what recipes/mini needs ({error}): pip install -r {MINI}/requirements.txt."
        ) from error
    finally:
        sys.path.remove(str(MINI))
    try:
        weights = load_file(path)
        judge = Classifier(len(weights["subject.weight"]))
        judge.load_state_dict(weights)
    except (RuntimeError, KeyError, OSError, SafetensorError) as error:
        raise InputError(f"{path} is not what recipes/mini/classifier.py of this version writes.") from error
    return judge.eval().requires_grad_(False)


def digest_of(path: Path) -> str:
    """Hash a file, or all files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


# ---- CLIP


class Clip:
    """transformers' CLIP as torchmetrics calls it: features as tensors, and captions cut to its length with their end kept."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor, self.config = model, processor, model.config

    def __call__(self, **inputs: Any) -> Any:
        """Process pictures or captions."""
        return self.processor(**inputs, **({"truncation": True} if "text" in inputs else {}))

    def to(self, device: torch.device) -> Clip:
        """Move the model."""
        self.model.to(device)
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """[N, 3, h, w] -> [N, D]."""
        return _tensor(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[N, T] -> [N, D]."""
        return _tensor(self.model.get_text_features(input_ids=tokens, attention_mask=mask))


def _tensor(found: Any) -> Tensor:
    """transformers 5 wraps features, 4 returns them."""
    return found if isinstance(found, Tensor) else found.pooler_output


def load_clip(folder: Path, device: torch.device) -> Clip:
    """Load a folder such as openai/clip-vit-large-patch14's. Raises InputError."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a folder with transformers' CLIP and its processor.") from error
    return Clip(model.eval().requires_grad_(False).to(device), processor)


def clip_score(clip: Clip, pictures: PictureSet) -> Mean:
    """Return the mean CLIP score of pictures and their captions, by torchmetrics. Raises InputError."""
    return mean_of(torch.tensor(list(_clip_scores(clip, pictures))))


def _clip_scores(clip: Clip, pictures: PictureSet) -> Iterator[float]:
    if pictures.captions is None:
        raise InputError(f"{pictures.name} has no captions; a CLIP score takes a folder that hart-infer batch wrote.")
    device = next(clip.model.parameters()).device
    images = Reader(pictures, None).batches(1)
    with torch.inference_mode():
        for image, caption in zip(images, tqdm(pictures.captions, desc="CLIP score", disable=None), strict=True):
            yield float(torchmetrics_clip_score(image[0].byte().to(device), caption, lambda: (clip, clip)))
