"""What the server and a worker say to each other: plain values, sent through a pipe between two processes of this program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Options = tuple[tuple[str, Any], ...]  # arguments of a pipeline's call that a client gave, by name and in order


class RowId(NamedTuple):
    """A job's number, which no other job of this server has, and which of its pictures it is."""

    job: int
    place: int


@dataclass(frozen=True)
class Picture:
    """8-bit pixels: 3 * width * height bytes of RGB, or width * height of a mask, 255 where it is painted anew."""

    width: int
    height: int
    pixels: bytes


@dataclass(frozen=True)
class Given:
    """A picture to edit and its mask, which has the same size."""

    picture: Picture
    mask: Picture
    digest: str  # of both


@dataclass(frozen=True)
class Settings:
    """What rows must have in common to be drawn together."""

    size: int  # side in pixels
    options: Options = ()
    edited: str | None = None  # digest of what is edited


@dataclass(frozen=True)
class Row:
    """One picture to draw."""

    id: RowId
    prompt: str
    seed: int
    previews: int = 0  # how many pictures of it to send before it is finished


@dataclass(frozen=True)
class Facts:
    """What a worker says of its model."""

    name: str
    family: str
    sizes: tuple[int, ...]  # sides in pixels
    options: frozenset[str]  # names that `Settings.options` may have
    edits: bool
    answers: bool
    modes: tuple[str, ...]  # in which it reconstructs a given picture
    speeds: tuple[str, ...]  # values that the option speed may have
    guidance_scale: float  # the default
    num_scales: int  # or rows; how many steps there are to preview
    device: str
    dtype: str


# To the worker.


@dataclass(frozen=True)
class Draw:
    """Draw rows together; `given` is edited where it is not None."""

    rows: tuple[Row, ...]
    settings: Settings
    given: Given | None = None


@dataclass(frozen=True)
class Ask:
    """Answer a question; a question is texts and pictures as they follow each other."""

    id: RowId
    question: tuple[str | Picture, ...]
    history: tuple[tuple[tuple[str | Picture, ...], str], ...] = ()
    options: Options = ()


@dataclass(frozen=True)
class Reconstruct:
    """Send a picture through the tokenizer and back, in every mode."""

    id: RowId
    picture: Picture


@dataclass(frozen=True)
class Drop:
    """Nobody waits for these rows any more."""

    rows: tuple[RowId, ...]


@dataclass(frozen=True)
class Stop:
    """Finish what is being drawn, and end."""


Work = Draw | Ask | Reconstruct
ToWorker = Work | Drop | Stop

# From the worker.


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    facts: Facts


@dataclass(frozen=True)
class LoadFailed:
    """The model can't be loaded; the worker ends."""

    message: str


@dataclass(frozen=True)
class Preview:
    """A row's picture so far; `number` counts those of a row from 0."""

    row: RowId
    number: int
    picture: Picture


@dataclass(frozen=True)
class Drawn:
    """A row's picture."""

    row: RowId
    picture: Picture


@dataclass(frozen=True)
class Piece:
    """A piece of an answer."""

    row: RowId
    text: str


@dataclass(frozen=True)
class Answered:
    """The answer is complete."""

    row: RowId


@dataclass(frozen=True)
class Rebuilt:
    """A given picture as the model sees it, and what each mode makes of it."""

    row: RowId
    original: Picture
    modes: tuple[tuple[str, Picture], ...]


Reason = Literal["input", "refused", "memory", "failed"]


@dataclass(frozen=True)
class Failed:
    """A row that can't be drawn or answered: by the client's fault, by the safety model, for want of memory, or by ours."""

    row: RowId
    reason: Reason
    message: str


@dataclass(frozen=True)
class Finished:
    """The worker is done with the last of its work, which took it so long."""

    seconds: float


Outcome = Drawn | Answered | Rebuilt | Failed  # the last that is said of a row
FromWorker = Ready | LoadFailed | Preview | Piece | Outcome | Finished
