"""Captions: a picture's name, colour and number in many wordings, with its style unless that goes without saying."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from compose import COLOURS, plural
from data import STYLES
from training import Entry

PLAIN_SHARE = 0.5  # of the captions that could leave the style out, those that do
FREE = 0.6  # share of captions that follow no template
OTHERS = 0.5  # share of the words around what is wanted that mean something elsewhere
OWN_COLOUR = 0.2  # share of the captions that say the colour that a picture has by itself
NUMBER_WORDS = {2: ("two", "two", "2", "a pair of", "a couple of", "both"), 3: ("three", "three", "3", "a trio of")}
SYNONYMS = {"purple": ("purple", "violet"), "red": ("red", "crimson"), "pink": ("pink", "rose-coloured")}
BESIDE = ("on", "with", "in", "near", "under", "next to", "and", "over", "behind", "beside")
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
FRESH_TEMPLATES = (  # of no training caption either; train_text.py logs its scores with them, as with the ones above
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


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for; `name` is the subject's or a word for it."""

    name: str
    style: str | None = None
    colour: str | None = None
    number: int = 1

    @property
    def noun(self) -> str:
        """ "cat", "blue cat", "two cats"."""
        noun = f"{self.colour} {self.name}" if self.colour else self.name
        return noun if self.number == 1 else f"{NUMBER_WORDS[self.number][0]} {plural(noun)}"

    def phrase(self, random: Random) -> str:
        """The noun, with an article or another word for the number or the colour, perhaps."""
        colour = self.colour and random.choice(SYNONYMS.get(self.colour, (self.colour,)))
        noun = f"{colour} {self.name}" if colour else self.name
        if self.number > 1:
            return f"{random.choice(NUMBER_WORDS[self.number])} {plural(noun)}"
        if colour and random.random() < 0.1:
            noun = random.choice((f"{self.name} in {colour}", f"{self.name}, {colour}", f"{self.name} that is {colour}"))
        return random.choice((noun, with_article(noun), with_article(noun), f"the {noun}"))


def fill(template: str, wanted: Wanted) -> str:
    """A template's caption, in lower case."""
    noun = wanted.noun
    return template.format(a=noun if wanted.number > 1 else with_article(noun), name=noun, style=wanted.style).lower()


def freely(wanted: Wanted, random: Random, others: Sequence[str] = ()) -> str:
    """What is wanted, among words that mean nothing, and among `others`: so that any may stand there."""

    def fillers(most: int) -> str:
        words = random.sample(FILLERS, random.randint(0, most))
        words = [random.choice(others) if others and random.random() < OTHERS else word for word in words]
        return random.choice(BRACKETS).format(" ".join(words)) if words and random.random() < 0.15 else " ".join(words)

    subject = wanted.phrase(random)
    parts = [random.choice(BRACKETS).format(subject) if random.random() < 0.1 else subject]
    if wanted.style:
        parts.insert(random.randrange(2), random.choice(STYLE_PHRASES).format(style=wanted.style))
    spaced = [fillers(4)]
    for part in parts:
        spaced += [part, fillers(random.choice((0, 0, 1, 2)))]
    return random.choice((" ", " ", ", ")).join(filter(None, spaced)).lower()


def caption(wanted: Wanted, random: Random, others: Sequence[str] = ()) -> str:
    """A training caption; `others` as in `freely`."""
    if random.random() < FREE:
        return freely(wanted, random, others)
    return fill(random.choice(STYLED_TEMPLATES if wanted.style else PLAIN), wanted)


def beside(wanted: Wanted, other: str, random: Random) -> str:
    """A caption of what is wanted with another thing behind it, which is not drawn: "a cat on a sofa, noto style"."""
    text = f"{wanted.phrase(random)} {random.choice(BESIDE)} {with_article(other)}"
    return (f"{text}, {wanted.style} style" if wanted.style else text).lower()


def other_words(words: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of `words`, single ones, that say no name, colour, number or style; and, so that these stay a test, are in no
    template held out."""
    said = (*COLOURS, *(w for same in SYNONYMS.values() for w in same), *(w for same in NUMBER_WORDS.values() for w in same))
    texts = (*names, *said, *STYLES, *HELD_OUT_TEMPLATES, *FRESH_TEMPLATES)
    kept_out = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
    return sorted({word for word in words if word.isascii() and word.isalpha() and word.lower() not in kept_out})


def spoken(name: str) -> str:
    """A name without the quotation marks that nobody types."""
    return name.replace("“", "").replace("”", "").replace("’", "'")


def wanted_of(about: Entry, random: Random, name: str | None = None) -> Wanted:
    """What a training caption of a picture asks for, `name` in place of its own.

    Only the picture that goes without saying (`plain`) has captions without a style: were they to mean any of three, the
    codes of one scale, drawn independently, could not agree on which.
    """
    colour = about.colour if about.made or random.random() < OWN_COLOUR else None
    style = None if about.plain and random.random() < PLAIN_SHARE else about.style
    return Wanted(name or spoken(about.name), style, colour, about.number)


def any_wanted(name: str, random: Random, styles: Sequence[str]) -> Wanted:
    """A wish for any name, in a style, colour and number that there may be no picture of."""
    style = random.choice((None, *styles))
    kind = random.random()
    colour = random.choice(list(COLOURS)) if kind < 0.3 else None
    return Wanted(name, style, colour, random.choice((2, 3)) if kind > 0.8 else 1)
