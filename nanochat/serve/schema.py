"""What OpenAI's clients send. Fields that are not listed are ignored, wrong values are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from nanochat.inference.sampling import Sampling

LARGEST = 2**31 - 1


def _real(value: Any) -> Any:
    # pydantic would take "1" and true for numbers
    if isinstance(value, bool | str):
        raise ValueError("must be a number")
    return value


def _integral(value: Any) -> Any:
    # 3.0 is an integer in JSON Schema
    return int(value) if isinstance(value, float) and value.is_integer() else _real(value)


_Number = Annotated[float, BeforeValidator(_real)]
_Whole = Annotated[int, BeforeValidator(_integral)]
_TokenId = Annotated[_Whole, Field(ge=0, le=LARGEST)]
_Tokens = Annotated[list[_TokenId], Field(min_length=1, max_length=1_000_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Share = Annotated[_Number, Field(ge=0, le=1, allow_inf_nan=False)]
_Penalty = Annotated[_Number, Field(ge=-2, le=2, allow_inf_nan=False)]
_Bias = Annotated[_Number, Field(ge=-100, le=100, allow_inf_nan=False)]
_Count = Annotated[_Whole, Field(ge=0, le=LARGEST)]
_Top = Annotated[_Whole, Field(ge=0, le=20)]
_Name = Annotated[str, Field(max_length=256)]
_TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_Texts = Annotated[list[str], Field(min_length=1, max_length=256)]
_TokenLists = Annotated[list[_Tokens], Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    include_usage: StrictBool | None = None


class SamplingFields(BaseModel):
    """How tokens are drawn, in OpenAI's words, with those of vLLM and llama.cpp for what OpenAI lacks."""

    model_config = ConfigDict(extra="ignore")

    temperature: Annotated[_Number, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: _Share | None = None
    top_k: _Count | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[_Number, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[_TokenName, _Bias], Field(max_length=1024)] | None = None
    seed: _Whole | None = None

    def sampling(self) -> Sampling:
        """The sampler's settings, OpenAI's defaults where nothing was given."""
        bias = tuple((int(token), float(value)) for token, value in (self.logit_bias or {}).items())
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            # 0 keeps the most likely token alone
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-9),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
        )


class AnswerFields(SamplingFields):
    """What both kinds of completion share."""

    model: _Name | None = None
    max_tokens: _Count | None = None
    n: Annotated[_Whole, Field(ge=1, le=64)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    truncate: Literal["left"] | None = None
    """drop the beginning of a prompt that is longer than the context, instead of refusing it"""

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(AnswerFields):
    prompt: str | _Tokens | _Texts | _TokenLists
    echo: StrictBool | None = None
    logprobs: _Top | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, each text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None

    def plain(self) -> dict[str, str]:
        """For the template."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(AnswerFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: _Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: _Top | None = None


class EmbeddingRequest(BaseModel):
    model: _Name | None = None
    input: str | _Tokens | _Texts | _TokenLists
    encoding_format: Literal["float", "base64"] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """One or several texts."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]


class TokenizeRequest(BaseModel):
    model: _Name | None = None
    content: str
    add_special: StrictBool = False


class DetokenizeRequest(BaseModel):
    model: _Name | None = None
    tokens: Annotated[list[_TokenId], Field(max_length=1_000_000)]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorBody
