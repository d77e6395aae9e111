"""Draw rows, or answer a question, with a worker's pipeline; what fails for one row leaves the others alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import HartError, InputError, OutOfMemoryError
from ..pipelines.checks import factored
from .protocol import (
    Answered,
    Ask,
    Draw,
    Drawn,
    Failed,
    FromWorker,
    Picture,
    Piece,
    Preview,
    Reason,
    Rebuilt,
    Reconstruct,
    Row,
    RowId,
)
from .safety import RefusedError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.outputs import Step
    from .model import Model

LOG = logging.getLogger(__name__)
Send = Callable[[FromWorker], None]
IsDropped = Callable[[RowId], bool]


class EveryoneLeftError(Exception):
    """Nobody waits for any row of the batch."""


def preview_steps(count: int, num_steps: int) -> list[int]:
    """Return after which of `num_steps` steps `count` previews are made: evenly spread, none after the last step."""
    return sorted({(number + 1) * num_steps // (count + 1) - 1 for number in range(count)} - {-1, num_steps - 1})


def draw(model: Model, job: Draw, send: Send, is_dropped: IsDropped) -> None:
    """Draw a job's rows together and send what becomes of each."""
    arguments: dict[Row, Any] = {}
    negative = [text for name, text in job.settings.options if name == "negative_prompt"]
    for row in job.rows:
        try:
            _judge(model, row.prompt, *negative)
            arguments[row] = model.argument(row.prompt)
        except Exception as error:
            if is_broken(error):
                raise
            send(failure(row.id, error))
    if arguments:
        _Batch(model, job, send, is_dropped, arguments).draw(list(arguments))


class _Batch:
    """A job's rows whose prompts can be drawn."""

    def __init__(self, model: Model, job: Draw, send: Send, is_dropped: IsDropped, arguments: dict[Row, Any]) -> None:
        self._model, self._job, self._send, self._is_dropped, self._arguments = model, job, send, is_dropped, arguments
        self._sent_previews: set[tuple[RowId, int | None]] = set()

    def draw(self, rows: Sequence[Row]) -> None:
        """Draw rows together; if that fails, one by one, to find which of them fails."""
        rows = [row for row in rows if not self._is_dropped(row.id)]
        if not rows:
            return
        try:
            images = self._call(rows)
        except EveryoneLeftError:
            return
        except Exception as error:
            if is_broken(error):
                raise
            if len(rows) == 1:
                return self._send(failure(rows[0].id, error))
        else:
            for row, image in zip(rows, images, strict=True):
                self._send(Drawn(row.id, sent(image)))
            return
        for row in rows:
            self.draw([row])

    def _call(self, rows: Sequence[Row]) -> list[Image]:
        settings, pipe = self._job.settings, self._model.pipe
        prompts, repeats = factored([self._arguments[row] for row in rows])
        arguments: dict[str, Any] = dict(settings.options)
        if self._job.given is not None:
            arguments["edit"] = pipe.edit(received(self._job.given.picture), received(self._job.given.mask, "L"))
        images: list[Image] = pipe(
            prompts,
            num_images_per_prompt=repeats,
            seed=[row.seed for row in rows],
            size=settings.size,
            reproducible=self._model.reproducible,
            callback_on_step_end=lambda step: self._after(step, rows),
            **arguments,
        ).images
        return images

    def _after(self, step: Step, rows: Sequence[Row]) -> None:
        """Send the previews that are due after a step. Raises EveryoneLeftError, which ends the call."""
        waiting = [i for i, row in enumerate(rows) if not self._is_dropped(row.id)]
        if not waiting:
            raise EveryoneLeftError
        numbers = {i: self._preview_due(rows[i], step) for i in waiting}
        due = [i for i, number in numbers.items() if number is not None]
        if not due:
            return
        for i, image in zip(due, replace(step, f_hat=step.f_hat[due]).preview(), strict=True):
            number = numbers[i] or 0
            self._sent_previews.add((rows[i].id, number))
            self._send(Preview(rows[i].id, number, sent(image)))

    def _preview_due(self, row: Row, step: Step) -> int | None:
        """Return the number of the preview that a row needs after a step; None for none, or one that was sent before."""
        steps = preview_steps(row.previews, step.num_scales)
        number = steps.index(step.index) if step.index in steps else None
        return None if (row.id, number) in self._sent_previews else number


def answer(model: Model, job: Ask, send: Send, is_dropped: IsDropped) -> None:
    """Answer a question piece by piece."""
    try:
        _judge(model, "\n".join(_texts(job)))
        history = [(_message(question), reply) for question, reply in job.history]
        pieces = model.pipe.answer(None, _message(job.question), history=history, stream=True, **dict(job.options))
        for piece in pieces:
            if is_dropped(job.id):
                return pieces.close()
            send(Piece(job.id, piece))
    except Exception as error:
        if is_broken(error):
            raise
        return send(failure(job.id, error))
    send(Answered(job.id))


def reconstruct(model: Model, job: Reconstruct, send: Send) -> None:
    """Send a picture through the tokenizer and back, in every mode of the model's."""
    from ..images.tensors import fit

    try:
        original = fit(received(job.picture), max(model.pipe.sizes))
        modes = tuple((mode, sent(model.reconstructed(original, mode))) for mode in model.modes)
    except Exception as error:
        if is_broken(error):
            raise
        return send(failure(job.id, error))
    send(Rebuilt(job.id, sent(original), modes))


def is_broken(error: Exception) -> bool:
    """Return whether the device fails from now on, so that only a new process can draw."""
    return "CUDA error" in str(error)


def failure(row: RowId, error: Exception) -> Failed:
    """Return what to say of a row that raised `error`; log what nobody foresaw, not its words: they may quote a request."""
    if isinstance(error, HartError):
        reasons: dict[type[HartError], Reason] = {RefusedError: "refused", InputError: "input", OutOfMemoryError: "memory"}
        reason: Reason = next((reason for kind, reason in reasons.items() if isinstance(error, kind)), "failed")
        return Failed(row, reason, str(error))
    LOG.error("a row failed", exc_info=error, extra={"error": type(error).__name__})
    return Failed(row, "failed", f"The picture could not be made: {type(error).__name__}. The server's log says more.")


def _judge(model: Model, *texts: str) -> None:
    """Raise RefusedError for a text that the safety model, if there is one, objects to."""
    if model.judge is not None:
        for text in texts:
            model.judge.check(text)


def _texts(job: Ask) -> list[str]:
    """Return all that a client wrote, the model's earlier answers too, as the client says that they were."""
    history = [part for question, reply in job.history for part in (*question, reply)]
    return [part for part in (*history, *job.question) if isinstance(part, str)]


def sent(image: Image) -> Picture:
    """Return an RGB image as a message has it."""
    return Picture(image.width, image.height, image.tobytes())


def received(picture: Picture, mode: Literal["RGB", "L"] = "RGB") -> Image:
    """Return a message's pixels as an image."""
    from PIL import Image

    return Image.frombytes(mode, (picture.width, picture.height), picture.pixels)


def _message(parts: Sequence[str | Picture]) -> list[str | Image]:
    return [part if isinstance(part, str) else received(part) for part in parts]
