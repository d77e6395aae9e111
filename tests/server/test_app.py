"""The API over an engine that draws at once: what is sent, what is checked, what is refused and how."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect

from hart_infer.server.gate import Gate
from hart_infer.server.jobs import AskJob, BusyError, DeadlineError, DrawJob, RowFailedError, UnavailableError
from hart_infer.server.keys import Keys, add_key
from hart_infer.server.log import JsonFormatter
from hart_infer.server.page import FOLDER
from hart_infer.server.pictures import READERS, in_turn
from hart_infer.server.protocol import Failed, Picture, RowId
from hart_infer.server.service import Service
from hart_infer.server.settings import make_settings
from tests.server import stand_in
from tests.server.fake import FakeEngine, client

pytestmark = pytest.mark.anyio
GENERATIONS, EDITS, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"


def decoded(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def png(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def events(text: str) -> list[dict[str, Any]]:
    """The data of a stream, whose names must be their types."""
    found = []
    for block in text.strip().replace("\r\n", "\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = json.loads(fields["data"])
        assert fields["event"] == data["type"]
        found.append(data)
    return found


def told(response: httpx2.Response, status: int) -> str:
    """The message of an error, whose form is checked."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")
    return str(error["message"])


# Pictures.


async def test_pictures_come_in_order_with_their_seeds() -> None:
    async with client() as http:
        answer = (await http.post(GENERATIONS, json={"prompt": "a cat", "n": 3, "seed": 7})).json()
    assert [each["seed"] for each in answer["data"]] == [7, 8, 9]
    assert [decoded(each["b64_json"]).convert("RGB").tobytes() for each in answer["data"]] == [
        stand_in.picture("a cat", seed, 2 * stand_in.SIDE).tobytes() for seed in (7, 8, 9)
    ]
    assert (answer["size"], answer["output_format"]) == ("32x32", "png")
    assert answer["created"] > 1e9


async def test_fresh_seeds_differ_and_draw_again() -> None:
    async with client() as http:
        first, second = [(await http.post(GENERATIONS, json={"prompt": "a"})).json()["data"][0] for _ in range(2)]
        again = (await http.post(GENERATIONS, json={"prompt": "a", "seed": first["seed"]})).json()["data"][0]
    assert first["seed"] != second["seed"]
    assert again == first


@pytest.mark.parametrize(("name", "expected"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
async def test_formats(name: str, expected: str) -> None:
    async with client() as http:
        body = {"prompt": "a", "output_format": name, "seed": 1}
        answer = (await http.post(GENERATIONS, json=body)).json()
        small = answer if name == "png" else (await http.post(GENERATIONS, json={**body, "output_compression": 5})).json()
    assert answer["output_format"] == name
    assert decoded(answer["data"][0]["b64_json"]).format == expected
    assert len(small["data"][0]["b64_json"]) <= len(answer["data"][0]["b64_json"])


async def test_what_changes_a_picture_reaches_the_engine() -> None:
    engine = FakeEngine()
    async with client(engine) as http:
        body = {"prompt": "a", "size": "16x16", "guidance_scale": 2, "negative_prompt": "b", "top_k": 0, "seed": 1, "n": 2}
        assert (await http.post(GENERATIONS, json=body)).status_code == 200
    (job,) = engine.jobs
    assert isinstance(job, DrawJob)
    assert (job.prompt, job.seeds, job.previews, job.given) == ("a", (1, 2), 0, None)
    assert job.settings.size == 16
    assert job.settings.options == (("guidance_scale", 2.0), ("negative_prompt", "b"), ("top_k", 0))


async def test_what_clients_send_by_habit_changes_nothing() -> None:
    habits = {"user": "u", "quality": "hd", "style": "vivid", "moderation": "low", "background": "auto", "size": "auto"}
    engine = FakeEngine()
    async with client(engine) as http:
        for body in ({}, habits, dict.fromkeys(habits)):
            assert (await http.post(GENERATIONS, json={"prompt": "a", "seed": 1, **body})).status_code == 200
    assert engine.jobs[0] == engine.jobs[1] == engine.jobs[2]


# Streams.


async def test_a_stream_has_previews_and_then_the_picture() -> None:
    async with client() as http:
        response = await http.post(GENERATIONS, json={"prompt": "a", "stream": True, "partial_images": 2, "seed": 5})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second, last = events(response.text)
    assert [each["type"] for each in (first, second, last)] == ["image_generation.partial_image"] * 2 + [
        "image_generation.completed"
    ]
    assert (first["partial_image_index"], second["partial_image_index"]) == (0, 1)
    assert decoded(second["b64_json"]).getpixel((0, 0)) == (1, 0, 0)
    assert decoded(last["b64_json"]).tobytes() == stand_in.picture("a", 5, 32).tobytes()
    assert last["usage"]["total_tokens"] == 0
    assert last["seed"] == 5


async def test_a_stream_of_several_tells_them_apart() -> None:
    async with client() as http:
        response = await http.post(GENERATIONS, json={"prompt": "a", "stream": True, "partial_images": 1, "seed": 5, "n": 2})
    assert [(each["index"], each["seed"], each["type"][17:]) for each in events(response.text)] == [
        (1, 6, "partial_image"),
        (1, 6, "completed"),
        (0, 5, "partial_image"),
        (0, 5, "completed"),
    ]


async def test_a_stream_that_fails_ends_with_an_error() -> None:
    engine = FakeEngine()
    engine.fails_after = UnavailableError("The worker has died.")
    async with client(engine) as http:
        response = await http.post(GENERATIONS, json={"prompt": "a", "stream": True, "partial_images": 1})
    assert response.status_code == 200
    preview, error = events(response.text)
    assert preview["type"] == "image_generation.partial_image"
    assert error["error"]["message"] == "The worker has died."


async def test_a_stream_that_fails_before_it_begins_has_a_status() -> None:
    engine = FakeEngine()
    engine.fails_after = RowFailedError(Failed(RowId(1, 0), "input", "It is wrong."))
    async with client(engine) as http:
        response = await http.post(GENERATIONS, json={"prompt": "a", "stream": True})
    assert told(response, 400) == "It is wrong."


# Edits.


def transparent(box: tuple[int, int, int, int], side: int = 16, alpha: int = 0) -> Image.Image:
    image = Image.new("RGBA", (side, side), (9, 8, 7, 255))
    image.paste((9, 8, 7, alpha), box)
    return image


async def edited(engine: FakeEngine, **files: bytes) -> Any:
    async with client(engine) as http:
        sent_files = {name: ("../../x.png", content) for name, content in files.items()}
        return await http.post(EDITS, data={"prompt": "a dog", "seed": "3", "n": "2"}, files=sent_files)


async def test_an_edit_paints_the_mask_s_transparent_part() -> None:
    engine = FakeEngine()
    photo = Image.new("RGB", (16, 16), (1, 2, 3))
    response = await edited(engine, image=png(photo), mask=png(transparent((8, 0, 16, 16))))
    assert [each["seed"] for each in response.json()["data"]] == [3, 4]
    (job,) = engine.jobs
    assert isinstance(job, DrawJob) and job.given is not None
    assert job.given.picture == Picture(16, 16, photo.tobytes())
    assert job.given.mask.pixels == (bytes(8) + b"\xff" * 8) * 16
    assert job.settings.edited == job.given.digest


async def test_a_mask_without_transparency_is_painted_where_it_is_white() -> None:
    engine = FakeEngine()
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 4, 16))
    await edited(engine, image=png(Image.new("RGB", (16, 16))), mask=png(mask))
    assert engine.jobs[0].given.mask.pixels == (b"\xff" * 4 + bytes(12)) * 16  # type: ignore[union-attr]


async def test_without_a_mask_the_picture_s_own_transparency_counts() -> None:
    engine = FakeEngine()
    await edited(engine, image=png(transparent((0, 0, 16, 2))))
    assert engine.jobs[0].given.mask.pixels == b"\xff" * 32 + bytes(14 * 16)  # type: ignore[union-attr]


async def test_a_photo_is_turned_as_its_camera_says() -> None:
    engine = FakeEngine()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "JPEG", exif=exif)
    await edited(engine, image=buffer.getvalue(), mask=png(Image.new("L", (10, 20), 255)))
    assert (engine.jobs[0].given.picture.width, engine.jobs[0].given.picture.height) == (10, 20)  # type: ignore[union-attr]


async def test_equal_pictures_and_masks_may_be_drawn_together_and_others_not() -> None:
    engine = FakeEngine()
    photo, other = png(Image.new("RGB", (16, 16))), png(Image.new("RGB", (16, 16), "red"))
    mask = png(transparent((0, 0, 8, 8)))
    for image in (photo, photo, other):
        await edited(engine, image=image, mask=mask)
    assert engine.jobs[0].settings == engine.jobs[1].settings != engine.jobs[2].settings  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "Send one image, not 0."),
        ({"image": b"no picture"}, "image is not a whole picture in PNG, JPEG or WebP."),
        ({"image": png(Image.new("RGB", (9, 9)))[:-30]}, "image is not a whole picture"),
        ({"image": png(Image.new("RGB", (9, 9)), "TIFF")}, "image is not a whole picture"),
        ({"image": png(Image.new("RGB", (9, 9)))}, "There is no mask, and image has no transparent parts"),
        (
            {"image": png(Image.new("RGB", (9, 9))), "mask": png(Image.new("L", (9, 8)))},
            "mask has 9 x 8 pixels and image 9 x 9",
        ),
        ({"image": png(Image.new("L", (300, 300)))}, "image has 300 x 300 pixels; at most 65,536 are taken."),
    ],
)
async def test_pictures_that_cannot_be_edited(files: dict[str, bytes], message: str) -> None:
    async with client(max_pixels=256 * 256) as http:
        response = await http.post(EDITS, data={"prompt": "a"}, files=files or {"x": b""} if files else None)
    assert message in told(response, 400)


@pytest.mark.parametrize("exif", [b"MM\0*", b"Exif\0\0XXXXXXXXX"])
async def test_broken_exif_is_the_client_s_mistake(exif: bytes) -> None:
    buffer = io.BytesIO()
    transparent((0, 0, 8, 16)).save(buffer, "PNG", exif=exif)
    async with client() as http:
        for path, data in ((EDITS, {"prompt": "a"}), ("/v1/images/reconstructions", {})):
            response = await http.post(path, data=data, files={"image": buffer.getvalue()})
            assert told(response, 400) == "image is not a whole picture in PNG, JPEG or WebP."


async def test_two_pictures_are_too_many_and_the_client_s_list_of_one_is_fine() -> None:
    photo = png(transparent((0, 0, 8, 8)))
    async with client() as http:
        files = [("image[]", ("a.png", photo)), ("image[]", ("b.png", photo))]
        assert told(await http.post(EDITS, data={"prompt": "a"}, files=files), 400) == "Send one image, not 2."
        assert (await http.post(EDITS, data={"prompt": "a"}, files=files[:1])).status_code == 200


@pytest.mark.parametrize("name", ["image", "mask", "prompt"])
async def test_a_field_that_comes_twice_is_not_dropped(name: str) -> None:
    picture = png(transparent((0, 0, 8, 16)))
    files: list[tuple[str, Any]] = [("image", picture), ("mask", picture), ("prompt", (None, "a"))]
    twice = files + [each for each in files if each[0] == name]
    async with client() as http:
        assert (await http.post(EDITS, files=files)).status_code == 200
        assert told(await http.post(EDITS, files=twice), 400) == f"Send {name} once, not 2 times."
        reconstructed = await http.post("/v1/images/reconstructions", files=[("image", picture)] * 2)
        assert told(reconstructed, 400) == "Send image once, not 2 times."


async def test_a_model_that_does_not_edit_says_so() -> None:
    async with client(FakeEngine(edits=False)) as http:
        response = await http.post(EDITS, data={"prompt": "a"}, files={"image": png(transparent((0, 0, 1, 1)))})
    assert told(response, 400) == "stand-in does not edit pictures."


# Reconstructions.

RECONSTRUCTIONS = "/v1/images/reconstructions"


async def test_a_picture_is_reconstructed_in_every_mode() -> None:
    engine = FakeEngine()
    photo = Image.effect_noise((16, 16), 50).convert("RGB")
    async with client(engine) as http:
        response = await http.post(RECONSTRUCTIONS, files={"image": ("../x.png", png(photo))})
    answer = response.json()
    assert (response.status_code, answer["size"], answer["output_format"]) == (200, "16x16", "png")
    assert [each["mode"] for each in answer["data"]] == ["discrete", "hybrid"]
    assert [decoded(each).tobytes() for each in (answer["original"], answer["data"][0]["b64_json"])] == [photo.tobytes()] * 2
    assert engine.left and not engine.left[0].is_open


async def test_pictures_that_cannot_be_reconstructed() -> None:
    async with client() as http:
        assert "'image' is missing" in told(await http.post(RECONSTRUCTIONS, data={"model": "stand-in"}), 400)
        assert "not a whole picture" in told(await http.post(RECONSTRUCTIONS, files={"image": b"x"}), 400)
    engine = FakeEngine()
    engine.error = UnavailableError("The server is ending.")
    async with client(engine) as http:
        told(await http.post(RECONSTRUCTIONS, files={"image": png(Image.new("RGB", (9, 9)))}), 503)


# What is refused.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "The parameter 'prompt' is missing."),
        ({"prompt": ""}, "The parameter 'prompt' is wrong: it should have at least 1 character."),
        ({"prompt": " "}, "prompt is empty; describe the picture you want."),
        ({"prompt": "a" * 101}, "prompt has 101 characters; at most 100 are taken."),
        ({"prompt": "a", "negative_prompt": "a" * 101}, "negative_prompt has 101 characters"),
        ({"prompt": ["a"]}, "The parameter 'prompt' is wrong: it should be a valid string."),
        ({"prompt": "a", "n": 0}, "The parameter 'n' is wrong: it should be greater than or equal to 1."),
        ({"prompt": "a", "n": 5}, "n must be a whole number from 1 to 4, not 5."),
        ({"prompt": "a", "n": "2"}, "The parameter 'n' is wrong: it should be a valid integer."),
        ({"prompt": "a", "n": True}, "The parameter 'n' is wrong"),
        ({"prompt": "a", "size": "17x17"}, "stand-in draws 16x16 or 32x32, not 17x17."),
        ({"prompt": "a", "size": "16x32"}, "stand-in draws 16x16 or 32x32, not 16x32."),
        ({"prompt": "a", "size": "big"}, "The parameter 'size' is wrong"),
        ({"prompt": "a", "seed": -1}, "The parameter 'seed' is wrong"),
        ({"prompt": "a", "seed": 2**64 - 1, "n": 2}, "seed must be a whole number from 0 to"),
        ({"prompt": "a", "speed": "fast"}, "stand-in does not take speed; leave it out."),
        ({"prompt": "a", "colour": 1}, "There is no parameter 'colour' here; leave it out."),
        ({"prompt": "a", "partial_images": 2}, "partial_images goes with stream: true."),
        ({"prompt": "a", "partial_images": 33, "stream": True}, "The parameter 'partial_images' is wrong"),
        ({"prompt": "a", "response_format": "url"}, "This server keeps no pictures, so they have no url"),
        ({"prompt": "a", "response_format": "url", "stream": True}, "A stream sends pictures as b64_json"),
        ({"prompt": "a", "output_compression": 50}, "output_compression is for jpeg and webp"),
        ({"prompt": "a", "output_format": "gif"}, "The parameter 'output_format' is wrong"),
        ({"prompt": "a", "background": "transparent"}, "The parameter 'background' is wrong"),
        ({"prompt": "\ud800"}, "valid"),
    ],
)
async def test_bad_requests_are_told_in_a_sentence(body: dict[str, Any], message: str) -> None:
    engine = FakeEngine()
    async with client(engine, max_prompt=100, max_n=4) as http:
        response = await http.post(GENERATIONS, content=json.dumps(body), headers={"content-type": "application/json"})
    assert message in told(response, 400)
    assert engine.jobs == []


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1]", b"null", b'{"prompt": NaN}', b"[" * 100_000])
async def test_what_is_no_json_object(content: bytes) -> None:
    async with client() as http:
        told(await http.post(GENERATIONS, content=content, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("prompt", ["a\0b", "a 🐈‍⬛ cat", "قطة", "\u202eabc", "' OR 1=1; --", "{0}", "%s"])
async def test_prompts_of_all_kinds_reach_the_engine_as_they_are(prompt: str) -> None:
    engine = FakeEngine()
    async with client(engine) as http:
        assert (await http.post(GENERATIONS, json={"prompt": prompt})).status_code == 200
    assert engine.jobs[0].prompt == prompt  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_must_say_that_it_is_json(kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    async with client() as http:
        for path in (GENERATIONS, CHAT):
            response = await http.post(path, content=b'{"prompt": "a"}', headers=headers)
            assert told(response, 400).endswith("send Content-Type: application/json.")
        typed = {"Content-Type": "application/json; charset=utf-8"}
        assert (await http.post(GENERATIONS, content=b'{"prompt": "a"}', headers=typed)).status_code == 200


@pytest.mark.parametrize("page", [False, True])
async def test_the_api_s_paths_are_the_same_beside_the_page(page: bool) -> None:
    async with client(page=page) as http:
        for path in (GENERATIONS, CHAT):
            response = await http.get(path)
            assert told(response, 405) == f"GET is not a method of {path}."
            assert response.headers["allow"] == "POST"
        for method in ("GET", "POST"):
            told(await http.request(method, "/v1/nothing"), 404)
        told(await http.post("/v1/models"), 405)


async def test_unknown_models_and_paths_and_methods() -> None:
    async with client() as http:
        response = await http.post(GENERATIONS, json={"prompt": "a", "model": "gpt-image-2"})
        assert told(response, 404) == "There is no model 'gpt-image-2' here; there is stand-in."
        assert response.json()["error"]["code"] == "model_not_found"
        assert told(await http.get("/v2"), 404) == "There is nothing at /v2."
        assert told(await http.get(GENERATIONS), 405) == f"GET is not a method of {GENERATIONS}."


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (BusyError("It is full.", 17), 429, "17"),
        (UnavailableError("It ends."), 503, "2"),
        (DeadlineError("It was too slow."), 504, None),
        (RowFailedError(Failed(RowId(1, 0), "refused", "Not that.")), 400, None),
        (RowFailedError(Failed(RowId(1, 0), "memory", "It is too large.")), 503, "2"),
        (RowFailedError(Failed(RowId(1, 0), "failed", "It is broken.")), 500, None),
    ],
)
async def test_what_becomes_of_a_job_has_a_status(error: Any, status: int, retry_after: str | None) -> None:
    engine = FakeEngine()
    engine.error = error
    async with client(engine) as http:
        response = await http.post(GENERATIONS, json={"prompt": "a"})
    assert told(response, status) == str(error)
    assert response.headers.get("retry-after") == retry_after


async def test_a_mistake_of_ours_is_a_500_that_tells_nothing() -> None:
    engine = FakeEngine()
    engine.error = ZeroDivisionError("secret")  # type: ignore[assignment]
    async with client(engine) as http:
        assert "secret" not in told(await http.post(GENERATIONS, json={"prompt": "a"}), 500)


async def test_a_mistake_of_ours_is_logged_and_counted_as_one(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.error = ZeroDivisionError("secret")  # type: ignore[assignment]
    async with client(engine) as http:
        response = await http.post(GENERATIONS, json={"prompt": "a"}, headers={"X-Request-Id": "given-1"})
        page = (await http.get("/metrics")).text
    assert response.headers["x-request-id"] == "given-1"
    assert f'hart_infer_requests_total{{route="{GENERATIONS}",status="500"}} 1.0' in page
    assert 'status="499"' not in page
    (failed,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    line = json.loads(JsonFormatter().format(failed))
    assert (line["id"], line["reason"]) == ("given-1", "ZeroDivisionError")
    assert "submit" in line["traceback"]
    assert "secret" not in caplog.text + json.dumps(line)


def passed(inner: Any) -> tuple[list[Any], Service, Any]:
    """What a gate before an app sends, its service, and the call of it."""
    sent: list[Any] = []
    service = Service(make_settings(), {})

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    return sent, service, lambda: Gate(inner, service)(scope, receive, send)


async def test_a_mistake_in_an_answer_that_has_begun_breaks_it_off() -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    sent, service, call = passed(inner)
    with pytest.raises(ZeroDivisionError):
        await call()
    assert len(sent) == 1
    assert b'status="500"' in service.metrics.page()


@pytest.mark.parametrize("error", [ClientDisconnect(), asyncio.CancelledError(), SendTimeoutError()])
async def test_a_client_that_leaves_is_no_mistake(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        raise error

    _, service, call = passed(inner)
    with pytest.raises(type(error)):
        await call()
    assert b'status="499"' in service.metrics.page()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# Limits, keys, names.


async def test_bodies_are_limited_whether_they_say_their_length_or_not() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100_000

    async with client(max_body_mb=1) as http:
        assert "1,048,576 bytes" in told(await http.post(GENERATIONS, content=b"x" * 2_000_000), 413)
        assert "1,048,576 bytes" in told(await http.post(GENERATIONS, content=chunks()), 413)


async def test_a_prompt_of_ten_megabytes_is_refused_by_its_length() -> None:
    async with client() as http:
        response = await http.post(GENERATIONS, json={"prompt": "a" * 10_000_000})
    assert told(response, 400) == "prompt has 10,000,000 characters; at most 4,000 are taken."


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Keys, str, str]:
    """Of alice and bob."""
    path = tmp_path / "keys.txt"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    return Keys.read(path), alice, bob


async def test_keys(keys: tuple[Keys, str, str]) -> None:
    names, alice, _ = keys
    async with client(keys=names) as http:
        for path in ("/v1/models", "/metrics", "/v1/models/x", "/v1/nothing"):
            response = await http.get(path)
            assert "Send an API key" in told(response, 401)
        for wrong in ("Bearer wrong", f"Bearer {alice}x", f"Basic {alice}", "Bearer", alice, "Bearer \xe4"):
            told(await http.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")}), 401)
        assert (await http.get("/v1/models", headers={"Authorization": f"Bearer {alice}"})).status_code == 200
        for path in ("/healthz", "/readyz"):
            assert (await http.get(path)).status_code == 200


async def test_a_body_without_a_key_is_not_read(keys: tuple[Keys, str, str]) -> None:
    read: list[bytes] = []

    async def chunks() -> Any:
        for _ in range(20):
            read.append(b"x" * 100_000)
            yield read[-1]

    async with client(keys=keys[0]) as http:
        told(await http.post(GENERATIONS, content=chunks()), 401)
    assert len(read) <= 1


async def test_each_key_has_a_rate(keys: tuple[Keys, str, str]) -> None:
    names, alice, bob = keys
    async with client(keys=names, rate=5) as http:

        async def ask(key: str, count: int) -> httpx2.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return await http.post(GENERATIONS, json={"prompt": "a", "n": count}, headers=headers)

        assert (await ask(alice, 4)).status_code == 200
        response = await ask(alice, 4)
        assert "5 pictures a minute" in told(response, 429)
        assert 30 <= int(response.headers["retry-after"]) <= 37
        assert (await ask(alice, 1)).status_code == 200
        assert (await ask(bob, 5)).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "", "evil@localhost:1x", "10.0.0.1"]
)
async def test_a_local_server_is_not_used_under_a_foreign_name(host: str) -> None:
    async with client() as http:
        told(await http.get("/v1/models", headers={"Host": host}), 403)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1", "127.0.0.2:8000"])
async def test_a_local_server_s_own_names(host: str) -> None:
    async with client() as http:
        assert (await http.get("/v1/models", headers={"Host": host})).status_code == 200


async def test_a_local_server_is_not_used_by_pages_of_other_sites() -> None:
    async with client() as http:
        for site in ("cross-site", "same-site", "else"):
            told(await http.post(GENERATIONS, json={"prompt": "a"}, headers={"Sec-Fetch-Site": site}), 403)
        for site in ("same-origin", "none"):
            assert (await http.get("/v1/models", headers={"Sec-Fetch-Site": site})).status_code == 200
        told(await http.post(GENERATIONS, content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"}), 400)


async def test_other_servers_have_any_name_and_no_server_has_cors(keys: tuple[Keys, str, str]) -> None:
    async with client(keys=keys[0], host="0.0.0.0", insecure=True) as http:
        headers = {"Host": "pictures.example", "Origin": "https://pictures.example", "Authorization": f"Bearer {keys[1]}"}
        response = await http.get("/v1/models", headers=headers)
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("access-control")]
        preflight = await http.options(GENERATIONS, headers=headers | {"Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 405


# Kept pictures.


async def test_pictures_are_kept_when_asked_and_have_an_address(tmp_path: Path) -> None:
    async with client(keep=tmp_path) as http:
        body = {"prompt": "a", "seed": 1, "response_format": "url", "output_format": "webp"}
        url = (await http.post(GENERATIONS, json=body)).json()["data"][0]["url"]
        assert url.startswith("http://localhost/v1/pictures/")
        response = await http.get(url)
    assert response.headers["content-type"] == "image/webp"
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == response.content
    assert Image.open(io.BytesIO(response.content)).size == (32, 32)


async def test_nothing_is_kept_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with client() as http:
        assert (await http.post(GENERATIONS, json={"prompt": "a"})).status_code == 200
        told(await http.get(f"/v1/pictures/{'0' * 32}.png"), 404)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "..%2Fsecret.png",
        "%2e%2e/secret.png",
        "..%5csecret.png",
        "/etc/passwd",
        "%00.png",
        "secret.png",
        f"{'0' * 32}.png%00.txt",
        f"{'0' * 32}.png/../../secret.png",
    ],
)
async def test_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"private")
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "secret.png").write_bytes(b"private")
    async with client(keep=folder) as http:
        request = httpx2.Request("GET", "http://localhost/v1/pictures/x")
        request.url = request.url.copy_with(raw_path=f"/v1/pictures/{name}".encode())
        response = await http.send(request)
    assert response.status_code == 404
    assert b"private" not in response.content


async def test_a_folder_that_is_gone_costs_the_address_and_not_the_picture(tmp_path: Path) -> None:
    async with client(keep=tmp_path) as http:
        tmp_path.rmdir()
        tmp_path.write_text("a file where the folder was")
        response = await http.post(GENERATIONS, json={"prompt": "a", "response_format": "url"})
        assert told(response, 507) == "The picture could not be kept, so it has no address; ask for b64_json."
        assert (await http.post(GENERATIONS, json={"prompt": "a"})).status_code == 200
        streamed = await http.post(GENERATIONS, json={"prompt": "a", "stream": True})
        assert [each["type"] for each in events(streamed.text)] == ["image_generation.completed"]


# Answers.

CAT = "data:image/png;base64," + base64.b64encode(png(Image.new("RGB", (8, 4), "red"))).decode()


async def test_a_question_about_a_picture() -> None:
    engine = FakeEngine()
    messages = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": CAT}}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Are you sure?"},
    ]
    body = {"messages": messages, "temperature": 0, "max_tokens": 9, "seed": 2, "model": "stand-in"}
    async with client(engine) as http:
        answer = (await http.post(CHAT, json=body)).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "It is a cat.", "refusal": None}
    picture = Picture(8, 4, Image.new("RGB", (8, 4), "red").tobytes())
    options = (("do_sample", False), ("max_new_tokens", 9), ("seed", 2))
    assert engine.jobs == [AskJob(("Are you sure?",), (((picture, "What?"), "A cat."),), options)]


async def test_an_answer_as_a_stream() -> None:
    async with client() as http:
        response = await http.post(CHAT, json={"messages": [{"role": "user", "content": "?"}], "stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    deltas = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(each["delta"].get("content", "") for each in deltas) == "It is a cat."
    assert [each["finish_reason"] for each in deltas] == [None] * 4 + ["stop"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "The parameter 'messages' is wrong"),
        ([{"role": "system", "content": "Be brief."}], "messages[0]: the model has no system messages"),
        ([{"role": "assistant", "content": "Yes."}], "messages[0]: an assistant's message must follow a user's."),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "The last message must be a user's."),
        ([{"role": "user", "content": []}], "The last message must be a user's."),
        ([{"role": "user", "content": ""}], "messages[0] is empty"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "The parameter 'messages.0.content"),
    ]
    + [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}], message)
        for url, message in [
            ("https://example.com/cat.png", "nothing is fetched from elsewhere"),
            ("file:///etc/passwd", "nothing is fetched from elsewhere"),
            ("data:image/png;base64,****", "is not valid base64"),
            ("data:image/png;base64,AAAA", "is not a whole picture"),
        ]
    ],
)
async def test_conversations_that_cannot_be_had(messages: Any, message: str) -> None:
    async with client() as http:
        assert message in told(await http.post(CHAT, json={"messages": messages}), 400)


async def test_an_answer_may_be_sent_back_as_it_came() -> None:
    nulls = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    engine = FakeEngine()
    first, last = {"role": "user", "content": "What?"}, {"role": "user", "content": "Sure?"}
    async with client(engine) as http:
        message = (await http.post(CHAT, json={"messages": [first]})).json()["choices"][0]["message"]
        for turn in (message, message | nulls):
            assert (await http.post(CHAT, json={"messages": [first, turn, last]})).status_code == 200
        told(await http.post(CHAT, json={"messages": [first, message | {"refusal": "No."}, last]}), 400)
    assert engine.jobs[1] == engine.jobs[2] == AskJob(("Sure?",), ((("What?",), "It is a cat."),), ())


async def test_a_stream_has_its_usage_when_asked() -> None:
    body = {"messages": [{"role": "user", "content": "?"}], "stream_options": {"include_usage": True}}
    async with client() as http:
        assert "stream_options goes with stream: true." in told(await http.post(CHAT, json=body), 400)
        response = await http.post(CHAT, json=body | {"stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert (last["choices"], set(last["usage"].values())) == ([], {0})


async def test_the_pictures_of_a_conversation_have_so_many_pixels_together() -> None:
    part = {"type": "image_url", "image_url": {"url": CAT}}
    text = {"type": "text", "text": "What?"}
    engine = FakeEngine()
    async with client(engine, max_pixels=100) as http:
        for count, status in ((3, 200), (4, 413)):
            parts = [{"role": "user", "content": [part]}] * count + [{"role": "user", "content": [text]}]
            assert (await http.post(CHAT, json={"messages": parts})).status_code == status
    assert len(engine.jobs) == 1


async def test_pictures_are_decoded_only_within_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = Image.open

    def noted(*given: Any, **named: Any) -> Any:
        opened.append(given)
        return real(*given, **named)

    monkeypatch.setattr(Image, "open", noted)
    picture = png(transparent((0, 0, 8, 16)))
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": CAT}}]}]}
    async with client(rate=1) as http:
        assert (await http.post(CHAT, json=body)).status_code == 200
        seen = len(opened)
        told(await http.post(CHAT, json=body), 429)
        told(await http.post(EDITS, data={"prompt": "a"}, files={"image": picture}), 429)
        told(await http.post("/v1/images/reconstructions", files={"image": picture}), 429)
    assert len(opened) == seen


async def test_few_pictures_are_decoded_at_once() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def read() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    await asyncio.gather(*(in_turn(read) for _ in range(8)))
    assert most == READERS


async def test_a_model_that_only_draws_says_so() -> None:
    async with client(FakeEngine(answers=False)) as http:
        response = await http.post(CHAT, json={"messages": [{"role": "user", "content": "?"}]})
    assert told(response, 400) == "stand-in draws pictures and answers no questions."


# Models, health, metrics, the log.


async def test_models() -> None:
    first, second = FakeEngine("one/first"), FakeEngine("second", edits=False)
    second.facts = None
    async with client(first, second, max_n=4) as http:
        listed = (await http.get("/v1/models")).json()
        assert [(each["id"], each["family"], each["sizes"]) for each in listed["data"]] == [
            ("one/first", "HART", [16, 32]),
            ("second", None, None),
        ]
        assert (await http.get("/v1/models/one/first")).json() == listed["data"][0]
        assert listed["data"][0]["max_n"] == 4
        told(await http.get("/v1/models/third"), 404)
        await http.post(GENERATIONS, json={"prompt": "a", "model": "one/first"})
        await http.post(GENERATIONS, json={"prompt": "b"})
    assert [job.prompt for job in first.jobs] == ["a", "b"]  # type: ignore[union-attr]


async def test_ready_is_said_once_all_models_are() -> None:
    engine = FakeEngine()
    async with client(engine) as http:
        assert (await http.get("/readyz")).json() == {"stand-in": True}
        engine.is_ready = False
        response = await http.get("/readyz")
        assert (response.status_code, response.json()) == (503, {"stand-in": False})
        assert (await http.get("/healthz")).text == "ok\n"


async def test_requests_are_counted_by_route_and_status() -> None:
    async with client() as http:
        await http.post(GENERATIONS, json={"prompt": "a"})
        await http.post(GENERATIONS, json={})
        await http.get("/somewhere/else")
        page = (await http.get("/metrics")).text
    assert f'hart_infer_requests_total{{route="{GENERATIONS}",status="200"}} 1.0' in page
    assert f'hart_infer_requests_total{{route="{GENERATIONS}",status="400"}} 1.0' in page
    assert 'hart_infer_requests_total{route="other",status="404"} 1.0' in page


async def test_requests_are_logged_with_their_id_and_never_with_their_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bodies = ({"prompt": "unicorn"}, {"prompt": "unicorn", "n": "unicorn"}, {"unicorn": 1}, {"prompt": "unicorn" * 999})
    async with client() as http:
        for body in bodies:
            response = await http.post(f"{GENERATIONS}?unicorn", json=body, headers={"X-Request-Id": "given-1"})
            assert response.headers["x-request-id"] == "given-1"
        await http.get("/v1/models/unicorn")
        other = await http.get("/unicorn", headers={"X-Request-Id": "bad\tid"})
    assert other.headers["x-request-id"] not in ("", "bad\tid")
    ours = [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.name.startswith("hart_infer")]
    assert [(line["id"], line["status"]) for line in ours[:4]] == [("given-1", status) for status in (200, 400, 400, 400)]
    assert {"time", "level", "method", "route", "seconds", "caller"} <= set(ours[0])
    assert "unicorn" not in json.dumps(ours)


def test_exceptions_are_logged_without_what_they_say() -> None:
    try:
        try:
            raise ValueError("unicorn")
        except ValueError as error:
            raise RuntimeError("unicorn again") from error
    except RuntimeError as error:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "it failed", (), (type(error), error, None))
    line = json.loads(JsonFormatter().format(record))
    assert "RuntimeError" in line["traceback"] and "ValueError" in line["traceback"]
    assert "test_exceptions_are_logged" in line["traceback"]
    assert "unicorn" not in line["traceback"].replace('"unicorn"', "").replace('"unicorn again"', "")  # but for the source


async def test_the_page_is_served_beside_the_api_and_runs_nothing_else() -> None:
    async with client(page=True) as http:
        index = await http.get("/")
        assert index.headers["content-type"].startswith("text/html")
        policy = index.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert (await http.get("/v1/models")).status_code == 200
        for path in re.findall(r'(?:src|href)="([^"#]+)"', index.text):
            file = await http.get(f"/{path}")
            assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff"
        told(await http.get("/../keys.txt"), 404)
        told(await http.get("/%2e%2e/page.py"), 404)
    async with client() as http:
        told(await http.get("/"), 404)


def test_the_page_has_no_inline_code_and_nothing_from_elsewhere() -> None:
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text)
        if path.suffix == ".js":
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
