"""The recipe's own arithmetic: what is trained is what generates."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hart_infer import HartPipeline, VarPipeline
from hart_infer.engine.graphs import tensors_of
from hart_infer.generation.next_scale import new_cache, prefill
from hart_infer.generation.residual import LATENT_SCALE
from hart_infer.generation.schedule import Settings, hart_schedule, var_schedule
from hart_infer.models.hart import HartTransformer
from hart_infer.models.parts.autoencoder import Autoencoder
from hart_infer.models.var import VarTransformer
from hart_infer.pipelines.describe import weights_digest

RECIPE = Path(__file__).parents[2] / "recipes" / "mini"


@pytest.fixture(scope="module", autouse=True)
def recipe():
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))


@pytest.fixture(scope="module")
def parts(recipe):
    from model import AUTOENCODER, CONTEXT_TOKENS, TRANSFORMER

    torch.manual_seed(0)
    transformer = HartTransformer(TRANSFORMER, vocab_size=AUTOENCODER.vocab_size, channels=AUTOENCODER.z_channels)
    autoencoder = Autoencoder(AUTOENCODER)
    stages = hart_schedule(
        TRANSFORMER.patch_nums, context_tokens=CONTEXT_TOKENS, share_quant_resi=AUTOENCODER.share_quant_resi
    ).stages
    return transformer, autoencoder, stages


@pytest.fixture(scope="module")
def of_classes(recipe):
    """var-mini's transformer, with weights as its training begins, and its stages."""
    from model import AUTOENCODER, PATCH_NUMS, var_config
    from train_transformer import initialise

    torch.manual_seed(0)
    transformer = VarTransformer(var_config(12), vocab_size=AUTOENCODER.vocab_size, channels=AUTOENCODER.z_channels)
    initialise(transformer)
    stages = var_schedule(
        PATCH_NUMS, share_quant_resi=AUTOENCODER.share_quant_resi, settings=Settings(guidance_scale=0.0)
    ).stages
    return transformer, stages


def prompted(transformer):
    """A condition of two prompts, and the same as generation prefills it."""
    from model import CONTEXT_TOKENS, TRANSFORMER

    context = torch.randn(2, CONTEXT_TOKENS, TRANSFORMER.context_dim)
    mask = torch.arange(CONTEXT_TOKENS) < torch.tensor([[7], [24]])
    return transformer.condition(context, mask, mask.long().cumsum(dim=1) - 1)


def generated(transformer, stages, condition, inputs):
    """Hidden states of all stages by the modules that generate, one scale after the other over their cache."""
    cache = new_cache(transformer, rows=2, length=sum(stage.length for stage in stages))
    places = [cache.at(stage.offset, stage.length) for stage in stages]
    prefix = prefill(transformer, condition, cache, slice(0, 2))
    found = [prefix.hidden_states]
    for stage, latent, place in zip(stages[1:], inputs, places[1:], strict=True):
        (table,) = transformer.image_tables([stage.side], prefix.last_position)
        x = transformer.embed_tokens(latent, transformer.embed_scales()[stage.index])
        found.append(transformer(x, prefix.modulation, table, place))
    return found, prefix.modulation


def assert_teacher_forcing_is_generation(transformer, stages, condition):
    from teacher import forward

    inputs = [torch.randn(2, transformer.word_embed.in_features, s.side, s.side) for s in stages[1:]]
    found, modulation = forward(transformer, stages, condition, inputs)
    expected, of_generation = generated(transformer, stages, condition, inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(modulation.head, of_generation.head)


@torch.no_grad()
def test_teacher_forcing_is_the_cached_generation(parts):
    transformer, _, stages = parts
    assert_teacher_forcing_is_generation(transformer, stages, prompted(transformer))


@torch.no_grad()
def test_teacher_forcing_of_classes_is_the_cached_generation(of_classes):
    transformer, stages = of_classes
    assert_teacher_forcing_is_generation(transformer, stages, transformer.condition(torch.tensor([3, 12])))


def targets(autoencoder, stages):
    codes = [torch.randint(autoencoder.config.vocab_size, (2, s.tokens)) for s in stages]
    return codes, torch.randn(2, autoencoder.config.z_channels, stages[-1].side, stages[-1].side)


def silent(transformer):
    return [name for name, p in transformer.named_parameters() if p.grad is None or not p.grad.abs().sum()]


def test_every_parameter_learns(parts):
    from teacher import losses

    transformer, autoencoder, stages = parts
    transformer.zero_grad()
    found = losses(
        transformer, autoencoder.quantizer, stages, prompted(transformer), *targets(autoencoder, stages), torch.Generator()
    )
    assert set(found) == {*(f"scale {s.side}" for s in stages), "diffusion", "loss"}
    found["loss"].backward()
    assert silent(transformer) == []


@pytest.mark.parametrize("masked", [False, True])
def test_attention_learns_as_by_the_formula(recipe, masked):
    from teacher import attended_by, mask_of

    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = mask_of([1, 4]).double() if masked else None
    torch.testing.assert_close(
        attended_by(q, k, v, mask), torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    )
    assert torch.autograd.gradcheck(lambda *x: attended_by(*x, mask), (q, k, v))


def test_only_so_many_codes_are_replaced(recipe):
    from teacher import corrupt

    codes = torch.arange(4000).view(40, 100)
    equal = [(corrupt(codes, share, torch.Generator().manual_seed(0)) == codes).float().mean().item() for share in (0, 0.25, 1)]
    assert equal == [1, pytest.approx(0.75, abs=0.03), pytest.approx(0, abs=0.01)]


def test_every_parameter_of_classes_learns(parts, of_classes):
    from teacher import losses

    (transformer, stages), (_, autoencoder, _) = of_classes, parts
    transformer.zero_grad()
    condition = transformer.condition(torch.tensor([3, 12]))
    found = losses(transformer, autoencoder.quantizer, stages, condition, *targets(autoencoder, stages), torch.Generator())
    assert set(found) == {*(f"scale {s.side}" for s in stages), "loss"}
    found["loss"].backward()
    assert silent(transformer) == []


def test_the_last_scale_can_be_left_out(parts):
    from teacher import losses

    transformer, autoencoder, stages = parts
    (codes, latent), condition = targets(autoencoder, stages), prompted(transformer)
    with torch.no_grad():
        whole, part = (
            losses(transformer, autoencoder.quantizer, s, condition, codes, latent, torch.Generator().manual_seed(1))
            for s in (stages, stages[:-1])
        )
    assert "diffusion" not in part
    for stage in stages[:-1]:
        torch.testing.assert_close(whole[f"scale {stage.side}"], part[f"scale {stage.side}"])


def test_a_dropped_class_is_conditioned_as_generation_without_one(of_classes):
    from train_transformer import Classes

    transformer, _ = of_classes
    learned = Classes.__new__(Classes)
    learned.pipe, learned.number = SimpleNamespace(transformer=transformer), dict(enumerate(range(12)))
    found = learned.condition(range(12), Random(0), torch.Generator(), 1.0)
    expected = transformer.unconditional()
    torch.testing.assert_close(found.inputs, expected.inputs[:1].expand_as(found.inputs))
    kept = learned.condition(range(12), Random(0), torch.Generator(), 0.0)
    torch.testing.assert_close(kept.inputs, transformer.condition(torch.arange(12)).inputs)


class Encoder:
    """Stands for the text encoder: prompts of five tokens, in random states."""

    def tokenize(self, captions, *, context_tokens):
        mask = (torch.arange(context_tokens) < 5).expand(len(captions), -1)
        return torch.zeros(mask.shape, dtype=torch.long), mask

    def hidden_states(self, tokens, mask):
        from model import TRANSFORMER

        return torch.randn(*tokens.shape, TRANSFORMER.context_dim, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_dropped_prompt_is_conditioned_as_generation_without_one(parts, monkeypatch, share):
    """Context 0, a mask of the first token, and position 0."""
    import train_transformer
    from train_transformer import Prompts

    transformer, encoder = parts[0], Encoder()
    learned = Prompts.__new__(Prompts)
    learned.pipe, learned.about = SimpleNamespace(transformer=transformer, text_encoder=encoder), [about(), about()]
    monkeypatch.setattr(Prompts, "caption", lambda *_: "a cat")
    tokens, mask = encoder.tokenize(["a cat"] * 2, context_tokens=transformer.config.context_token)
    monkeypatch.setattr(train_transformer, "encode", lambda *_: (encoder.hidden_states(tokens, mask), mask))
    found = learned.condition([0, 1], Random(0), torch.Generator(), share)
    if share:
        expected = transformer.unconditional()
    else:
        expected = transformer.condition(encoder.hidden_states(tokens, mask), mask, mask.long().cumsum(dim=1) - 1)
    for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
        torch.testing.assert_close(one, other.expand_as(one))


def test_true_noise_has_the_least_diffusion_loss(parts, monkeypatch):
    """A network that knows the residual predicts the noise, and its loss is the entropy floor of the variance alone."""
    from residual import diffusion_loss

    diffusion = parts[0].diffusion
    residual = torch.randn(256, diffusion.channels) * 0.2
    seen = {}

    def knowing(x, time, condition):
        from residual import _constants

        c = {name: values[time, None] for name, values in _constants().items()}
        noise = (c["x0_from_x"] * x - residual / LATENT_SCALE) / c["x0_from_noise"]
        seen["noise"] = noise
        return noise + seen.get("error", 0.0), torch.full_like(x, -1.0)

    monkeypatch.setattr(type(diffusion), "forward", lambda self, *inputs: knowing(*inputs))
    monkeypatch.setattr(diffusion, "time_embed", torch.nn.Identity())
    condition = torch.randn(256, parts[0].config.embed_dim)
    best = diffusion_loss(diffusion, residual, condition, torch.Generator().manual_seed(0)).item()
    seen["error"] = 0.1
    worse = diffusion_loss(diffusion, residual, condition, torch.Generator().manual_seed(0)).item()
    assert abs(best) < 1e-3 and worse > best + 0.005
    assert abs(seen["noise"].std().item() - 1) < 0.1


def test_rescaling_changes_no_picture(parts):
    from train_tokenizer import rescale

    torch.manual_seed(0)
    autoencoder = Autoencoder(parts[1].config)
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        codes = autoencoder.encode(pixels).indices
        pictures = [autoencoder.reconstruct(pixels, mode) for mode in ("hybrid", "discrete")]
        rescale(autoencoder, pixels)
        again = autoencoder.encode(pixels)
        for mode, picture in zip(("hybrid", "discrete"), pictures, strict=True):
            torch.testing.assert_close(autoencoder.reconstruct(pixels, mode), picture, rtol=1e-4, atol=1e-4)
        assert sum((a != b).sum().item() for a, b in zip(codes, again.indices, strict=True)) <= 2  # ties
        left = (again.residual - again.embeddings[-1]).abs()
        assert left.quantile(0.999).item() == pytest.approx(LATENT_SCALE, rel=1e-3)


def test_muon_turns_the_gradient_into_a_rotation():
    from training import Muon, orthogonal

    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonal(matrix))
    assert singular.min() > 0.6 and singular.max() < 1.3
    torch.testing.assert_close(orthogonal(matrix.T), orthogonal(matrix).T)
    weight = torch.nn.Parameter(torch.zeros(8, 4, 3, 3))
    weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.1 * 0.2, rel=0.2)  # AdamW's usual size


def test_batches_resume_where_they_were():
    from training import shuffled

    whole, later = shuffled(list(range(100, 150)), 8, 3, 0), shuffled(list(range(100, 150)), 8, 3, 9)
    batches = [next(whole) for _ in range(12)]
    assert batches[9:] == [next(later) for _ in range(3)]
    assert len({i for batch in batches[:6] for i in batch}) == 48  # no picture twice in an epoch


def test_every_batch_of_captions_is_mixed_and_resumes(recipe):
    from train_transformer import Prompts

    learned = Prompts.__new__(Prompts)
    learned.mixed = [(list(range(100 * k, 100 * k + 50)), share) for k, share in enumerate((0.7, 0.25, 0.05))]
    whole, later = learned.batches(8, 3, 0), learned.batches(8, 3, 7)
    batches = [next(whole) for _ in range(200)]
    assert batches[7:9] == [next(later) for _ in range(2)]
    assert {len(batch) for batch in batches} == {8}
    drawn = [i for batch in batches for i in batch]
    assert [sum(i // 100 == k for i in drawn) / len(drawn) for k in range(3)] == pytest.approx([0.7, 0.25, 0.05], abs=0.03)
    assert sorted([i for i in drawn if i < 100][:50]) == list(range(50)), "no picture twice in an epoch"
    learned.mixed = [([0], 0.7), ([1], 0.7)]
    with pytest.raises(SystemExit, match=r"make 1\.4, not 1"):
        next(learned.batches(8, 3, 0))


def test_words_that_are_common_and_like_the_name_are_asked_for_more_often(recipe):
    from parts import Meant
    from train_transformer import weights_of

    words = {"car": (3e-4, 0.8), "auto": (3e-5, 0.8), "political": (3e-4, 0.4), ":3": (0.0, 0.8), "automobile": (1e-5, 1.0)}
    weights = weights_of({word: Meant("automobile", *of) for word, of in words.items()})["automobile"]
    assert set(weights) == set(words) - {"automobile"}, "captions have the name anyway"
    assert weights["car"] > 3 * weights["auto"] > 30 * weights[":3"] > 0
    assert weights["car"] > 9 * weights["political"]


def test_subjects_that_there_are_no_pictures_of_are_refused(tmp_path):
    from training import names_in

    (tmp_path / "few.txt").write_text("dog\nunicorn\n")
    assert names_in(tmp_path / "few.txt", {"dog", "unicorn", "cat"}) == {"dog", "unicorn"}
    with pytest.raises(SystemExit, match="no pictures of: unicorn"):
        names_in(tmp_path / "few.txt", {"dog", "cat"})


def test_pictures_are_told_by_what_their_captions_say():
    from training import mixed_pictures

    entries = [about(name=name, style=style, plain=style == "noto") for name in ("cat", "dog") for style in ("noto", "fluent")]
    splits = {"train": [0, 1, 2, 3], "composed": [4]}
    pictures = SimpleNamespace(about=entries, split=splits.__getitem__)
    assert mixed_pictures(pictures) == [[0, 2], [1, 3], [4]]


def test_learning_rate_warms_up_stays_and_falls():
    from training import learning_rate

    rates = [learning_rate(step, peak=1.0, warmup=10, steps=100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:75] == [1.0] * 66 and rates[99] == pytest.approx(0.04)
    assert all(a > b for a, b in zip(rates[75:], rates[76:], strict=False))


def entry(name, style, split, *keywords, colour=None, number=1):
    return {"emoji": "", "name": name, "group": "", "style": style, "split": split, "keywords": list(keywords),
            "colour": colour, "number": number}  # fmt: skip


def about(name="Cat", style="noto", split="train", *, plain=True, colour=None, number=1):
    from training import Entry

    return Entry(**entry(name, style, split, colour=colour, number=number), plain=plain)


@pytest.mark.parametrize("plain", [True, False])
def test_captions_keep_the_subject_and_only_the_plain_picture_goes_without_a_style(plain):
    from captions import PLAIN_SHARE, caption, wanted_of

    captions = [caption(wanted_of(about(plain=plain), Random(i)), Random(i)) for i in range(400)]
    assert all("cat" in text for text in captions)
    assert sum("noto" not in text for text in captions) / 400 == pytest.approx(PLAIN_SHARE * plain, abs=0.07)
    assert len(set(captions)) > 250


def test_captions_of_composed_pictures_say_what_was_made_of_them():
    from captions import NUMBER_WORDS, SYNONYMS, caption, wanted_of

    for i in range(100):
        wanted = wanted_of(about(split="composed", colour="purple"), Random(i))
        assert any(word in caption(wanted, Random(i)) for word in SYNONYMS["purple"])
        wanted = wanted_of(about("fox", split="composed", number=2), Random(i))
        text = caption(wanted, Random(i))
        assert "foxes" in text and any(word in text for word in NUMBER_WORDS[2])
    said = sum(wanted_of(about(colour="red"), Random(i)).colour is not None for i in range(400)) / 400
    assert 0.1 < said < 0.3, "a picture's own colour may be said"


def test_plurals_and_what_is_counted():
    from compose import countable, plural

    names = ("cat", "fox", "cherry", "tomato", "mouse", "fire truck", "key", "watch")
    assert [plural(n) for n in names] == ["cats", "foxes", "cherries", "tomatoes", "mice", "fire trucks", "keys", "watches"]
    assert [n for n in (*names, "glasses", "red heart", "rice", "two hearts", "sun") if countable(n)] == list(names)


def test_recolouring_turns_the_hue_alone():
    pytest.importorskip("skimage")
    from compose import hue_of, may_become, recolour

    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[8:24, 8:24] = (210, 40, 40)
    name, hue, lightness = hue_of(picture)
    assert name == "red" and may_become("blue", lightness) and not may_become("yellow", lightness)
    blue = recolour(picture, hue, "blue")
    assert hue_of(blue)[0] == "blue" and (blue[:8] >= 254).all()
    picture[8:24, 16:24] = (40, 160, 60)
    assert hue_of(picture)[0] is None, "two colours"


def test_no_caption_has_a_held_out_wording():
    from captions import FILLERS, FRESH_TEMPLATES, HELD_OUT_TEMPLATES, PLAIN, STYLE_PHRASES, STYLED_TEMPLATES, Wanted, fill

    assert not {*HELD_OUT_TEMPLATES, *FRESH_TEMPLATES} & {*PLAIN, *STYLED_TEMPLATES}
    words = set(re.findall("[a-z]+", " ".join(HELD_OUT_TEMPLATES).lower().replace("{style}", "").replace("{name}", "")))
    assert words & set(FILLERS) <= {"a", "i", "it", "to"}
    assert not any(part in phrase for phrase in STYLE_PHRASES for part in ("(", "-style", "way", "would"))
    assert fill("{style}: {a}", Wanted("Octopus", "fluent")) == "fluent: an octopus"


def test_other_words_may_stand_around_a_name_but_none_of_a_name_or_of_a_held_out_wording():
    from captions import caption, other_words, wanted_of

    words = "sofa|red heart|Cat|cat|love|rendered|tea|café|1st|violet|trio|noto".split("|")
    others = other_words(words, ["cat face", "teapot"])
    assert others == ["sofa", "tea"]
    texts = [caption(wanted_of(about(), Random(i)), Random(i), others) for i in range(400)]
    assert all("cat" in text for text in texts)
    assert 0.2 < sum(any(other in text.split() for other in others) for text in texts) / 400 < 0.6


def test_articles():
    from captions import with_article

    names = ("scissors", "bus", "Apple", "two hearts", "unicorn", "umbrella", "one", "octopus", "glass of milk")
    expected = [
        "scissors",
        "a bus",
        "an Apple",
        "two hearts",
        "a unicorn",
        "an umbrella",
        "a one",
        "an octopus",
        "a glass of milk",
    ]
    assert [with_article(name) for name in names] == expected


def write_pictures(folder, about):
    np.save(folder / "pictures.npy", np.random.default_rng(0).integers(0, 255, (len(about), 32, 32, 3), np.uint8))
    (folder / "pictures.json").write_text(json.dumps(about))


def test_pictures_say_which_style_goes_without_saying(tmp_path):
    from training import Pictures

    listed = [
        entry("cat", "noto", "style"),
        entry("cat", "fluent", "train"),
        entry("cat", "twemoji", "train", colour="yellow"),
        entry("dog", "noto", "train"),
        entry("dog", "fluent", "train"),
        entry("cat", "fluent", "pair", colour="blue"),
        entry("cat", "twemoji", "composed", colour="blue"),
        entry("cat", "fluent", "composed", number=2),
    ]
    write_pictures(tmp_path, listed)
    (tmp_path / "few.txt").write_text("cat\n")
    pictures = Pictures(tmp_path, tmp_path / "few.txt")
    assert [a.plain for a in pictures.about] == [False, True, False, True, False, False, True, True]
    assert pictures.split("train") == [1, 2] and pictures.split("composed") == [6, 7]


def test_the_evaluation_scores_what_is_drawn_and_says_of_which_weights(tmp_path, monkeypatch):
    for package in ("scipy", "skimage"):
        pytest.importorskip(package)
    import evaluate
    from classifier import Classifier

    names = "box cup dot fan gem hat jug key lid map".split()
    write_pictures(
        tmp_path, [entry(name, "noto", "train", f"word {name}") for name in names] + [entry("late", "noto", "style")]
    )
    torch.manual_seed(0)
    save_file(Classifier(11).state_dict(), tmp_path / "judge.safetensors")
    asked = []
    monkeypatch.setattr(
        evaluate.Evaluation, "draw", lambda self, prompts: asked.extend(prompts) or torch.zeros(len(prompts), 3, 32, 32)
    )
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *map(str, (tmp_path, tmp_path / "new")), "--only", "plain", "--count", "10"]
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--judge", str(tmp_path / "judge.safetensors")])
    evaluate.main()
    found = json.loads((tmp_path / "new" / "hart-results.json").read_text())["plain"]
    assert len(found["settings"]["weights"]) == 16
    assert {*asked[10:20]} == {f"a {name}, please" for name in names} and {*asked[20:]} == {f"word {name}" for name in names}
    for kind in ("training wordings", "a new wording", "a keyword"):
        right = found[kind]["pictures"] - len(found[kind]["missed"])
        assert found[kind]["pictures"] == 10 and right == round(10 * found[kind]["subject"])


def test_the_same_pictures_are_at_no_distance_and_others_at_some():
    for package in ("scipy", "skimage"):
        pytest.importorskip(package)
    from classifier import Classifier
    from evaluate import Evaluation

    torch.manual_seed(0)
    evaluation = object.__new__(Evaluation)
    evaluation.classifier = Classifier(3).eval()
    pictures = torch.rand(250, 3, 96, 96) * 2 - 1
    same, other = evaluation.frechet(pictures, pictures), evaluation.frechet(pictures, pictures.clamp(max=0.2))
    assert abs(same) < 1e-4 and other > 100 * abs(same) + 1e-3


def test_what_is_held_out_is_decided_by_name():
    pytest.importorskip("resvg_py")
    from data import split_of

    found = {
        name: [split_of(name, style) for style in ("noto", "fluent", "twemoji")] for name in ("red heart", "bus", "cat", "sun")
    }
    assert found["cat"] == ["train"] * 3 and found["bus"] == ["subject"] * 3
    assert found["red heart"] == ["train", "style", "train"]
    assert sorted(found["sun"]) == ["style", "style", "train"]


def test_a_pipeline_of_other_sizes_is_not_taken_over(pipe, tmp_path):
    from parts import take_over

    pipe.save_pretrained(tmp_path / "other")
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match="has other sizes than model.py"):
        take_over(str(tmp_path / "other"), tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())


def test_latents_are_kept_for_the_pictures_that_they_are_of():
    from parts import hash_of

    pixels = np.random.default_rng(0).integers(0, 255, (20, 4, 4, 3), np.uint8)
    other = pixels.copy()
    other[3] = 0
    shown = [3, *range(5, 20)]
    assert hash_of(pixels, shown) == hash_of(pixels.copy(), shown)
    assert len({hash_of(pixels, shown), hash_of(pixels, [4, *shown[1:]]), hash_of(other, shown)}) == 3


@pytest.mark.parametrize("model", ["hart", "var"])
def test_a_transformer_is_not_taken_to_another_tokenizer_or_text_encoder(tmp_path, model):
    from parts import STATE, TEXT, TOKENIZER, parts_hash, trained

    for name in (TOKENIZER, TEXT):
        (tmp_path / name).write_bytes(b"one")
    torch.save({"step": 3, "average": {}, "parts": parts_hash(tmp_path, model)}, tmp_path / STATE[model])
    assert trained(tmp_path, model)["step"] == 3
    (tmp_path / (TEXT if model == "hart" else TOKENIZER)).write_bytes(b"another")
    with pytest.raises(SystemExit, match="began with another"):
        trained(tmp_path, model)


def test_a_model_of_classes_is_written_with_its_names(tmp_path, monkeypatch):
    from export import main
    from model import AUTOENCODER
    from parts import STATE, TOKENIZER, assemble_var, learning, parts_hash

    names = ["bus", "cat", "sun with face"]
    torch.save(Autoencoder(AUTOENCODER).state_dict(), tmp_path / TOKENIZER)
    weights = learning(assemble_var(tmp_path, names)).state_dict()
    torch.save({"average": weights, "classes": names, "parts": parts_hash(tmp_path, "var")}, tmp_path / STATE["var"])
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path), str(tmp_path / "made"), "--model", "var"])
    main()
    pipe = VarPipeline.from_pretrained(tmp_path / "made")
    assert pipe.labels.index("sun with face") == 2
    torch.testing.assert_close(pipe.transformer.class_embed.weight, weights["transformer.class_embed.weight"].bfloat16())


def test_what_the_text_encoder_learned_with_the_transformer_is_written(tmp_path):
    from parts import STATE, assemble, finished, learning, parts_hash, take_over

    take_over("hart-mini", tmp_path)
    average = learning(assemble(tmp_path)).state_dict()
    average["text.norm.weight"] = torch.full_like(average["text.norm.weight"], 3.0)
    torch.save({"average": average, "parts": parts_hash(tmp_path, "hart")}, tmp_path / STATE["hart"])
    assert (finished(tmp_path, "hart").text_encoder.model.norm.weight == 3).all()
    torch.save({"average": {"norm.weight": 0}, "parts": parts_hash(tmp_path, "hart")}, tmp_path / STATE["hart"])
    with pytest.raises(SystemExit, match="earlier version"):
        finished(tmp_path, "hart")


def test_the_mean_with_an_earlier_model_is_written(tmp_path, monkeypatch):
    from export import main
    from parts import STATE, assemble, learning, parts_hash, take_over

    earlier = take_over("hart-mini", tmp_path)
    average = {name: value + 1 for name, value in learning(assemble(tmp_path)).state_dict().items()}
    torch.save({"average": average, "parts": parts_hash(tmp_path, "hart")}, tmp_path / STATE["hart"])
    arguments = ["export.py", str(tmp_path), str(tmp_path / "made"), "--mean-with", "hart-mini"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    pipe = HartPipeline.from_pretrained(tmp_path / "made")
    for module in ("transformer", "autoencoder"):
        parts = [dict(getattr(one, module).named_parameters()) for one in (pipe, earlier)]
        for name, ours in parts[0].items():
            half = (average[f"{module}.{name}"] + parts[1][name]) / 2 if module == "transformer" else parts[1][name]
            torch.testing.assert_close(ours, half.to(ours.dtype), msg=name)
    before = dict(earlier.text_encoder.model.named_parameters())
    for name, ours in pipe.text_encoder.model.named_parameters():
        torch.testing.assert_close(ours, ((average[f"text.{name}"] + before[name]) / 2).to(ours.dtype), msg=name)
    monkeypatch.setattr(sys, "argv", [*arguments, "--model", "var"])
    with pytest.raises(SystemExit, match="hart-mini alone"):
        main()
    other = HartPipeline.from_pretrained("hart-mini")
    other.autoencoder.quantizer.codebook.weight.data[0] += 1
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", [*arguments[:3], "--mean-with", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="another tokenizer"):
        main()


def test_making_goes_on_from_what_was_begun(monkeypatch, tmp_path):
    """Of the trainings only the transformers' are left, var-mini's anew."""
    import make
    from parts import TEXT, TOKENIZER

    run = []
    monkeypatch.setattr(make.subprocess, "run", lambda command, env: run.append(command) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(sys, "argv", ["make.py", str(tmp_path), "--start-from", "hart-mini"])
    make.main()
    assert (tmp_path / "run" / TOKENIZER).exists() and (tmp_path / "run" / TEXT).exists()
    scripts = [Path(command[1]).name for command in run]
    assert scripts == [
        "data.py", "associate.py", "train_transformer.py", "export.py", "train_transformer.py", "export.py"
    ]  # fmt: skip
    assert ["--start-from" in command for command in run] == [False, False, True, False, False, False]


def test_the_text_encoder_is_trained_with_the_transformer_by_words_that_fit(recipe, monkeypatch, tmp_path):
    import train_transformer
    from parts import MEANINGS, learning, take_over
    from train_transformer import CONTEXT_TOKENS, Prompts

    (tmp_path / MEANINGS).write_text(
        json.dumps({"kitten": ("cat", 1e-6, 0.7), "tabby": ("cat", 1e-7, 0.6), "dinghy": ("boat", 1e-7, 0.7)})
    )
    take_over("hart-mini", tmp_path)
    entry = about(name="cat")
    pictures = SimpleNamespace(about=[entry], split=lambda *_: [0])
    learned = Prompts(pictures, tmp_path, None, (1, 0, 0))
    encoder, drawn = learned.pipe.text_encoder, Random(0)
    monkeypatch.setattr(train_transformer, "WORDED", 0.5)
    captions = [learned.caption(encoder, entry, drawn) for _ in range(200)]
    meant = sum("cat" not in text for text in captions)
    assert 60 < meant < 140
    assert any("dinghy" in text for text in captions), "words of other subjects stand around names"
    assert all("cat" in text for text in captions if "dinghy" in text), "and around names only"
    assert max(len(encoder.tokenizer(text)["input_ids"]) for text in captions) <= CONTEXT_TOKENS
    whole = learning(learned.pipe).requires_grad_(True)
    learned.condition([0, 0], drawn, torch.Generator(), 0.0).modulation.blocks.sum().backward()
    assert all(layer.mlp.gate.weight.grad is not None for layer in whole["text"].layers)


@pytest.mark.parametrize("script", sorted(path.stem for path in RECIPE.glob("*.py")))
def test_every_script_finds_what_it_imports(recipe, script):
    try:
        importlib.import_module(script)
    except ModuleNotFoundError as error:
        if (RECIPE / f"{error.name}.py").exists() or error.name.startswith("hart_infer"):
            raise
        pytest.skip(str(error))


def test_the_text_encoder_learns_what_it_encodes(recipe, tmp_path):
    """In training its hidden states are those of generation, but for rounding."""
    from parts import take_over
    from teacher import encode

    encoder = take_over("hart-mini", tmp_path).text_encoder
    hidden, mask = encode(encoder, ["two cats", "a cat, noto style"])
    tokens, expected_mask = encoder.tokenize(["two cats", "a cat, noto style"], context_tokens=hidden.shape[1])
    expected = encoder.hidden_states(tokens, expected_mask)
    assert torch.equal(mask, expected_mask)
    near = (hidden - expected).abs().mean() / expected.abs().mean()  # padding too, which HART attends to
    assert near < 0.02, "within bf16's rounding"


def test_the_tables_have_the_records_figures(recipe):
    """Of the weights in the package, too: new ones want new figures."""
    from tables import RECORD, RESULTS, filled

    text, record = RESULTS.read_text(encoding="utf-8"), json.loads(RECORD.read_text(encoding="utf-8"))
    assert filled(text, record) == text
    weights = {part["settings"]["weights"] for part in record.values()}
    assert weights == {
        weights_digest(HartPipeline.from_pretrained("hart-mini", device="cpu", torch_dtype=torch.float32).components)
    }
    assert f"({weights.pop()}; bf16" in text
    with pytest.raises(SystemExit, match="has 0 rows that begin with 'drawn, five new wordings', not one"):
        filled(text.replace("| drawn, five new", "| drawn, 5 new"), record)
