"""Captions: a picture's name or keywords in many wordings, with its style unless it is the one that goes without saying."""

from __future__ import annotations

import re
from random import Random
from typing import Any

PLAIN_SHARE = 0.5  # of the captions that could leave the style out, those that do
BY_KEYWORDS = 0.2  # share of captions made of keywords instead of the name
FREE = 0.6  # share of captions that follow no template
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
STYLE_PHRASES = (
    "{style} style", "in {style}", "like {style}", "{style} version", "from {style}", "{style}", "style {style}",
    "by {style}", "as in {style}", "{style} look", "the {style} one", "[{style}]", "{style}!", "- {style}", "{style} -",
    "'{style}'", "{style}'s", "using {style}", "after {style}", "{style} edition", "made by {style}", "for {style}",
    "{style}, of course", "not without {style}",
)  # fmt: skip
FILLERS = """
    a about above again all also always and another any anyone are artwork at be beautiful because been being best better
    big bit bring but buy by can card cartoon clear clearly come could create cute day design detailed did do each easily
    enough ever every everyone fancy few find fine first for friend from fun get give go going good got great had half
    happens has have he hello help her here high him his how however i idea if important in into is it its just keep kind
    know large last later least left less let little long look lot lovely made make many may maybe mean might mine minute
    moment more most much must my near need never new nice no nothing now of off often ok old on once only or other our out
    over own paint painting part people perfect person photo piece place plain possible pretty print put quality quick
    quickly quite rather really right said same say scene send she should side simple since sketch small so some something
    soon sort sticker still such sure take tell than thank thanks that their them then there these they thing think this
    those through time to today together tomorrow too try turn under until up us use very view want wanted was we well were
    what when where which while who whole why with without wonderful work world write yes yet you your
""".split()  # of HELD_OUT_TEMPLATES' words "a", "i", "it" and "to" alone
BRACKETS = ("({})", "[{}]", '"{}"', "'{}'", "{}:", "{}.", "{}!", "{}?", "- {}", "{};")
HELD_OUT_TEMPLATES = (  # wordings that no training caption has
    "draw me {a} the way {style} does",
    "one {style}-style {name}, please",
    "I would like to see {a} ({style})",
    "{style} icon showing {a}",
    "show {name} as {style} would draw it",
)
FRESH_TEMPLATES = (  # written when the weights were done, to be scored once; the ones above were looked at on the way
    "could we get {a} rendered by {style}",
    "{name}? yes, the {style} kind",
    "an illustration depicting {a}, as designed by {style}",
    "{style} emoji set: {name}",
    "generate {a} with {style} looks",
    "imagine {a} painted by the {style} team",
    "hey, i'd love {a} ({style} flavour)",
    "{name} // {style}",
)
_NO_ARTICLE = re.compile(r"^(a|an|the) |s$|^(two|three) |\d")
_AN = re.compile(r"(?!uni|eu|one\b|us)[aeiou]")


def with_article(name: str) -> str:
    """ "cat" -> "a cat"; plurals and the like stay as they are."""
    if _NO_ARTICLE.search(name) and not name.endswith(("ss", "us", "bus")):
        return name
    return f"{'an' if _AN.match(name.lower()) else 'a'} {name}"


def fill(template: str, name: str, style: str) -> str:
    """A template's caption, in lower case."""
    return template.format(a=with_article(name), name=name, style=style).lower()


def freely(name: str, style: str | None, random: Random) -> str:
    """A name, and a style if there is one, among words that mean nothing: so that any others may stand there."""

    def fillers(most: int) -> str:
        words = random.sample(FILLERS, random.randint(0, most))
        return random.choice(BRACKETS).format(" ".join(words)) if words and random.random() < 0.15 else " ".join(words)

    subject = random.choice((name, with_article(name), with_article(name), f"the {name}"))
    parts = [random.choice(BRACKETS).format(subject) if random.random() < 0.1 else subject]
    if style:
        parts.insert(random.randrange(2), random.choice(STYLE_PHRASES).format(style=style))
    spaced = [fillers(4)]
    for part in parts:
        spaced += [part, fillers(random.choice((0, 0, 1, 2)))]
    return random.choice((" ", " ", ", ")).join(filter(None, spaced)).lower()


def caption(about: dict[str, Any], random: Random) -> str:
    """A training caption of the picture described by an entry of `Pictures.about`.

    Only the picture that goes without saying (`about["plain"]`) has captions without a style: were they to mean any of
    three, the codes of one scale, drawn independently, could not agree on which.
    """
    name = about["name"].replace("“", "").replace("”", "").replace("’", "'")
    if about["telling"] and random.random() < BY_KEYWORDS:
        words = random.sample(about["telling"], min(len(about["telling"]), random.randint(1, 2)))
        name = random.choice((" ".join(words), f"{name} {words[0]}", f"{words[0]} {name}"))
    styled = not about["plain"] or random.random() >= PLAIN_SHARE
    if random.random() < FREE:
        return freely(name, about["style"] if styled else None, random)
    return fill(random.choice(STYLED_TEMPLATES if styled else PLAIN), name, about["style"])
