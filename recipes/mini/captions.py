"""Captions: a picture's name or keywords in many wordings, with its style in most of them."""

from __future__ import annotations

import re
from random import Random
from typing import Any

STYLED = 0.7  # share of captions that name the style
BY_KEYWORDS = 0.25  # share of captions made of keywords instead of the name
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


def caption(about: dict[str, Any], random: Random) -> str:
    """A training caption of the picture described by a row of pictures.json."""
    name = about["name"].replace("“", "").replace("”", "").replace("’", "'")
    if about["keywords"] and random.random() < BY_KEYWORDS:
        words = random.sample(about["keywords"], min(len(about["keywords"]), random.randint(1, 3)))
        name = random.choice((" ".join(words), f"{name} {words[0]}", f"{words[0]} {name}"))
    templates = STYLED_TEMPLATES if random.random() < STYLED else PLAIN
    return fill(random.choice(templates), name, about["style"])
