"""OpenAI's own clients, as shipped, against a served hart-mini: pictures, streams, edits, errors."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hart_infer import HartPipeline
from hart_infer.server.drawing import preview_steps
from tests.server.conftest import stand_in

openai = pytest.importorskip("openai")
NODE = """
import OpenAI, {{ toFile }} from "openai";
import {{ readFileSync }} from "node:fs";
const client = new OpenAI({{ baseURL: "{address}", apiKey: "unused" }});
const out = {{ events: [] }};
const made = await client.images.generate({{ model: "hart-mini", prompt: "a cat", seed: 7 }});
out.image = made.data[0].b64_json;
const stream = await client.images.generate(
  {{ model: "hart-mini", prompt: "a cat", seed: 7, stream: true, partial_images: 2 }});
for await (const event of stream) {{
  out.events.push([event.type, event.partial_image_index ?? null]);
  out.last = event.b64_json;
}}
const image = await toFile(readFileSync("photo.png"), "photo.png", {{ type: "image/png" }});
const mask = await toFile(readFileSync("mask.png"), "mask.png", {{ type: "image/png" }});
const edited = await client.images.edit({{ model: "hart-mini", prompt: "a dog", image, mask, seed: 3 }});
out.edited = edited.data[0].b64_json;
out.models = (await client.models.list()).data.map((model) => model.id);
try {{ await client.images.generate({{ prompt: "a cat", size: "5x5" }}); }} catch (error) {{ out.error = error.message; }}
console.log(JSON.stringify(out));
"""


@pytest.fixture(scope="module")
def client(mini_address: str) -> Any:
    return openai.OpenAI(base_url=mini_address, api_key="unused", timeout=120)


@pytest.fixture(scope="module")
def pipe() -> HartPipeline:
    made = HartPipeline.from_pretrained("hart-mini", device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def photo(pipe: HartPipeline) -> Image.Image:
    return pipe("a pizza", seed=1).images[0]


@pytest.fixture(scope="module")
def mask(photo: Image.Image) -> Image.Image:
    """Its right half is transparent: to be painted anew."""
    made = Image.new("RGBA", photo.size, "black")
    made.paste((0, 0, 0, 0), (photo.width // 2, 0, *photo.size))
    return made


def size_of(pipe: HartPipeline) -> str:
    side = max(pipe.sizes)
    return f"{side}x{side}"


def pixels(data: str | None) -> bytes:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").tobytes()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def expected_edit(pipe: HartPipeline, photo: Image.Image, mask: Image.Image) -> bytes:
    white = mask.getchannel("A").point(lambda alpha: 255 - alpha)
    return pipe.inpaint(photo, white, "a dog", seed=3).images[0].tobytes()


def test_pictures_are_the_pipeline_s_to_the_byte(client: Any, pipe: HartPipeline) -> None:
    answer = client.images.generate(model="hart-mini", prompt="a cat", n=2, size=size_of(pipe), extra_body={"seed": 7})
    assert [each.seed for each in answer.data] == [7, 8]
    assert [pixels(each.b64_json) for each in answer.data] == [pipe("a cat", seed=seed).images[0].tobytes() for seed in (7, 8)]


def test_settings_change_the_picture_as_they_do_in_python(client: Any, pipe: HartPipeline) -> None:
    extra = {"seed": 7, "guidance_scale": 2.5, "negative_prompt": "noto style", "speed": "draft"}
    answer = client.images.generate(model="hart-mini", prompt="a cat", extra_body=extra)
    drawn = pipe("a cat", seed=7, guidance_scale=2.5, negative_prompt="noto style", speed="draft").images[0]
    assert pixels(answer.data[0].b64_json) == drawn.tobytes()


def test_a_stream_has_the_scales_previews(client: Any, pipe: HartPipeline) -> None:
    previews: list[bytes] = []

    def keep(step: Any) -> None:
        if step.index in preview_steps(3, step.num_scales):
            previews.append(step.preview()[0].tobytes())

    last = pipe("a cat", seed=7, callback_on_step_end=keep).images[0].tobytes()
    with client.images.generate(
        model="hart-mini", prompt="a cat", stream=True, partial_images=3, extra_body={"seed": 7}
    ) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    assert [pixels(event.b64_json) for event in events] == [*previews, last]
    assert events[-1].usage.total_tokens == 0
    assert (events[-1].size, events[-1].output_format) == (size_of(pipe), "png")


def test_edits_and_their_streams(client: Any, pipe: HartPipeline, photo: Image.Image, mask: Image.Image) -> None:
    given = {"image": ("photo.png", png(photo)), "mask": ("mask.png", png(mask)), "extra_body": {"seed": 3}}
    answer = client.images.edit(model="hart-mini", prompt="a dog", **given)
    assert pixels(answer.data[0].b64_json) == expected_edit(pipe, photo, mask)
    with client.images.edit(model="hart-mini", prompt="a dog", stream=True, partial_images=1, **given) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert events[1].b64_json == answer.data[0].b64_json
    own = photo.convert("RGBA")
    own.putalpha(mask.getchannel("A"))
    listed = client.images.edit(model="hart-mini", prompt="a dog", image=[("photo.png", png(own))], extra_body={"seed": 3})
    assert len(listed.data) == 1


def test_models_and_errors(client: Any, pipe: HartPipeline) -> None:
    assert [model.id for model in client.models.list()] == ["hart-mini"]
    assert client.models.retrieve("hart-mini").owned_by == "hart-infer"
    with pytest.raises(openai.BadRequestError, match=f"hart-mini draws {size_of(pipe)}, not 5x5") as raised:
        client.images.generate(prompt="a cat", size="5x5")
    assert raised.value.code == "invalid_value"
    assert raised.value.request_id
    with pytest.raises(openai.NotFoundError, match="There is no model 'dall-e-3' here"):
        client.images.generate(prompt="a cat", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="answers no questions"):
        client.chat.completions.create(model="hart-mini", messages=[{"role": "user", "content": "Hello"}])


@pytest.mark.slow
def test_the_node_client(mini_address: str, pipe: HartPipeline, photo: Image.Image, mask: Image.Image, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    (tmp_path / "package.json").write_text('{"private": true, "type": "module"}')
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | {"npm_config_cache": str(tmp_path)}}
    installed: Any = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "openai"], timeout=300, **options)
    if installed.returncode != 0:
        pytest.skip("npm can't install openai here")
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    (tmp_path / "run.mjs").write_text(NODE.format(address=mini_address))
    ran: Any = subprocess.run(["node", "run.mjs"], timeout=300, **options)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    cat = pipe("a cat", seed=7).images[0].tobytes()
    assert pixels(found["image"]) == pixels(found["last"]) == cat
    partial = "image_generation.partial_image"
    assert found["events"] == [[partial, 0], [partial, 1], ["image_generation.completed", None]]
    assert pixels(found["edited"]) == expected_edit(pipe, photo, mask)
    assert found["models"] == ["hart-mini"]
    assert f"hart-mini draws {size_of(pipe)}, not 5x5" in found["error"]


def test_answers_and_their_streams() -> None:
    with stand_in() as (address, _), openai.OpenAI(base_url=f"{address}/v1", api_key="unused") as made:
        picture = "data:image/png;base64," + base64.b64encode(png(Image.new("RGB", (8, 4)))).decode()
        parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
        asked: Any = {"model": "stand-in", "messages": [{"role": "user", "content": parts}], "temperature": 0}
        answer = made.chat.completions.create(**asked)
        told = answer.choices[0].message.content
        assert told is not None and told.startswith("0 turns before, now [8x4]What is it?")
        assert answer.usage is not None and answer.usage.total_tokens == 0
        chunks = list(made.chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == told
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_second_turn_and_the_usage_of_a_stream() -> None:
    with stand_in() as (address, _), openai.OpenAI(base_url=f"{address}/v1", api_key="unused") as made:
        messages: list[Any] = [{"role": "user", "content": "What is it?"}]
        first = made.chat.completions.create(model="stand-in", messages=messages, temperature=0)
        messages += [first.choices[0].message, {"role": "user", "content": "Are you sure?"}]
        asked: Any = {"model": "stand-in", "messages": messages, "temperature": 0}
        told = made.chat.completions.create(**asked).choices[0].message.content
        assert told is not None and told.startswith("1 turns before, now Are you sure?")
        *chunks, last = made.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == told
        assert all(chunk.usage is None for chunk in chunks)
        assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 0
