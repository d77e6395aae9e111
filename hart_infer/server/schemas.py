"""Requests and answers of OpenAI's API, and what this server has beside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

from ..pipelines.checks import MAX_GUIDANCE, MAX_SEED, MAX_STEPS
from .pictures import Encoding, Format

MAX_PREVIEWS = 32  # OpenAI's API has 3
SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
MAX_N = 1000
Nothing = Annotated[list[str], Field(max_length=0)] | None
Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]


class PictureRequest(BaseModel):
    """What a request for pictures may say, drawn or edited. Those from `user` on are accepted and change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    size: Annotated[str, Field(pattern=SIZE)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PREVIEWS)] | None = None
    background: Literal["auto", "opaque"] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)] | None = None
    negative_prompt: str | None = None
    num_inference_steps: Annotated[int, Field(ge=0, le=MAX_STEPS)] | None = None
    residual_temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    speed: str | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    quality: Quality | None = None

    @property
    def encoding(self) -> Encoding:
        """How to send the pictures."""
        quality = 100 if self.output_compression is None else self.output_compression
        return Encoding(self.output_format or "png", quality)


class GenerationRequest(PictureRequest):
    """POST /v1/images/generations."""

    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["low", "auto"] | None = None


class EditRequest(PictureRequest):
    """POST /v1/images/edits, a form: values are texts."""

    model_config = ConfigDict(strict=False)

    image: UploadFile | None = None
    image_list: Annotated[list[UploadFile], Field(alias="image[]")] = []
    mask: UploadFile | None = None


class ReconstructionRequest(BaseModel):
    """POST /v1/images/reconstructions, a form."""

    model_config = ConfigDict(extra="forbid")

    image: UploadFile
    model: str | None = None
    output_format: Format | None = None


class TokenDetails(BaseModel):
    """Of `Usage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Tokens are not counted here: all zero."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()


class ImageData(BaseModel):
    """One picture, and the seed that draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesAnswer(BaseModel):
    """Finished pictures."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    usage: Usage = Usage()


class ReconstructedData(BaseModel):
    """What a mode makes of a picture."""

    mode: str
    b64_json: str


class ReconstructionAnswer(BaseModel):
    """The picture as the model sees it, and what each of its modes makes of it."""

    created: int
    original: str
    data: list[ReconstructedData]
    output_format: Format
    size: str


class ImageEvent(BaseModel):
    """What a stream of pictures sends; `index` tells the pictures of a request apart."""

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Format
    index: int
    seed: int
    partial_image_index: int | None = None
    usage: Usage | None = None


class ModelInfo(BaseModel):
    """A model, with what it can do; the last ones are None until it is loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["hart-infer"] = "hart-infer"
    family: str | None = None
    sizes: list[int] | None = None
    options: list[str] | None = None  # fields of a request that it takes
    edits: bool | None = None
    answers: bool | None = None
    modes: list[str] | None = None  # in which it reconstructs a picture
    speeds: list[str] | None = None
    guidance_scale: float | None = None  # the default
    num_scales: int | None = None  # a stream has up to one preview less
    max_n: int | None = None  # pictures of a request at most


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ImageUrl(BaseModel):
    """A picture in a data: URL."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(BaseModel):
    """A text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """A picture."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """A turn of a conversation. Those from `refusal` on are what OpenAI's clients send back of an answer; they hold nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart | ImagePart]
    name: str | None = None
    refusal: None = None
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None


class StreamOptions(BaseModel):
    """What a stream has beside the answer; `include_obfuscation` changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    n: Literal[1] | None = None
    user: str | None = None
    safety_identifier: str | None = None


# FastAPI's description of an answer that may be a stream of events; `data` is JSON.
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
                    "required": ["data"],
                }
            }
        }
    }
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's description of answers that are errors."""
    from .problems import ErrorAnswer

    return {status: {"model": ErrorAnswer} for status in statuses}
