"""Captions: a picture's name or keywords in many wordings, with its style in most of them."""

from __future__ import annotations

import re
from random import Random
from typing import Any

STYLED = 0.7  # share of captions that name the style
BY_KEYWORDS = 0.25  # share of captions made of keywords instead of the name
FREE = 0.4  # share of captions that follow no template
PLAIN = (
    "{a}",
    "{name}",
    "an emoji of {a}",
    "a picture of {a}",
    "{name} emoji",
    "a drawing of {a}",
    "an icon of {a}",
    "{name}, on a white background",
)
STYLED_TEMPLATES = (
    "{a}, {style} style",
    "{name}, {style} style",
    "{a} in {style} style",
    "{name} in the style of {style}",
    "{style} {name}",
    "a {style} emoji of {a}",
    "{style} style picture of {a}",
    "{name} emoji, {style}",
    "{style}: {name}",
    "a drawing of {a}, {style} style",
)
STYLE_PHRASES = ("{style} style", "in {style}", "like {style}", "{style} version", "from {style}", "{style}", "style {style}")
BEFORE = (
    "can i have", "make", "paint", "now", "create", "my", "this is", "here comes", "a small", "a big", "a nice", "hello",
    "sketch", "artwork of", "photo of", "a sticker with", "cartoon of", "look at", "we need", "maybe", "it is", "give us",
    "just", "some",
)  # fmt: skip
AFTER = (
    "thanks", "for my friend", "quickly", "if possible", "now", "for a card", "today", "in colour", "and nothing else", "ok",
)  # fmt: skip
HELD_OUT_TEMPLATES = (  # wordings that no training caption has
    "draw me {a} the way {style} does",
    "one {style}-style {name}, please",
    "I would like to see {a} ({style})",
    "{style} icon showing {a}",
    "show {name} as {style} would draw it",
)
_NO_ARTICLE = re.compile(r"^(a|an|the) |s$|^(two|three) |\d")


def with_article(name: str) -> str:
    """ "cat" -> "a cat"; plurals and the like stay as they are."""
    if _NO_ARTICLE.search(name) and not name.endswith(("ss", "us", "bus")):
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def fill(template: str, name: str, style: str) -> str:
    """A template's caption, in lower case."""
    return template.format(a=with_article(name), name=name, style=style).lower()


def freely(name: str, style: str | None, random: Random) -> str:
    """A name, and a style if there is one, among words that mean nothing: so that others may stand there."""
    parts = [random.choice((name, with_article(name)))]
    if style:
        parts.insert(random.randrange(2), random.choice(STYLE_PHRASES).format(style=style))
    words = (
        random.choice(BEFORE) if random.random() < 0.7 else "",
        *parts,
        random.choice(AFTER) if random.random() < 0.4 else "",
    )
    return random.choice((" ", " ", ", ")).join(filter(None, words)).lower()


def caption(about: dict[str, Any], random: Random) -> str:
    """A training caption of the picture described by a row of pictures.json."""
    name = about["name"].replace("“", "").replace("”", "").replace("’", "'")
    if about["keywords"] and random.random() < BY_KEYWORDS:
        words = random.sample(about["keywords"], min(len(about["keywords"]), random.randint(1, 3)))
        name = random.choice((" ".join(words), f"{name} {words[0]}", f"{words[0]} {name}"))
    styled = random.random() < STYLED
    if random.random() < FREE:
        return freely(name, about["style"] if styled else None, random)
    templates = STYLED_TEMPLATES if styled else PLAIN
    return fill(random.choice(templates), name, about["style"])
