"""The requests, answers and events of OpenAI's Responses API as this server takes and gives them.

Nothing is kept between requests: a conversation is sent whole each time, with the items that were answered among its
items. What asks for something to be stored, for tools that OpenAI runs, or for files is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.serve.api.protocol import (
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    Answer,
    Given,
    JsonObject,
    Part,
    PlainText,
    Stop,
    Text,
    TokenLogprob,
)
from pipeline.serve.refusals import Unsupported

_TOKENS = 1 << 31
_LARGEST = 1 << 63
_NOWHERE = "the server keeps no responses: each request has the whole conversation"
_SCHEMA_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"

Status = Literal["in_progress", "completed", "incomplete"]

# What the API knows of tools, items and parts of them, and why it is not taken here.
_TOOLS = "it runs on OpenAI's servers, and this one runs no tools; a tool of type function is called by the client"
_PARTS = {
    "input_file": "files are not read; their text can be sent as text",
    "input_audio": "sounds are not taken in conversations",
    "input_video": "videos are not taken",
}
_MESSAGE, _CALL, _OUTPUT, _REASONING = "message", "function_call", "function_call_output", "reasoning"
_ITEMS = (_MESSAGE, _CALL, _OUTPUT, _REASONING)
_REFERENCE = "item_reference"


# Items of the input


class InputText(Part):
    """A piece of text."""

    type: Literal["input_text"]
    text: Text
    prompt_cache_breakpoint: None = None


class InputImage(Part):
    """A picture, for packages of models that see."""

    type: Literal["input_image"]
    image_url: Text = Field(description="`data:image/png;base64,...` or the same of jpeg. Addresses are not fetched.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="`low` is refused, as in chat completions.")
    file_id: None = None
    prompt_cache_breakpoint: None = None


class GivenText(Part):
    """A piece of an earlier answer."""

    type: Literal["output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = Field(None, description="As they were answered; changes nothing.")


class GivenRefusal(Part):
    """What a model of OpenAI's once refused with."""

    type: Literal["refusal"]
    refusal: Text


UserPart = Annotated[InputText | InputImage, Field(discriminator="type")]
AssistantPart = Annotated[GivenText | GivenRefusal | InputText, Field(discriminator="type")]


class Item(Part):
    """What all items may have, and what changes nothing here."""

    id: str | None = Field(None, description="As it was answered; changes nothing.")
    status: Status | None = Field(None, description="As it was answered; changes nothing.")


class SystemItem(Item):
    """What an application tells the model to be."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer"]
    content: Text | Annotated[list[InputText], Field(min_length=1)]


class UserItem(Item):
    """What a user says and shows."""

    type: Literal["message"] = "message"
    role: Literal["user"]
    content: Text | Annotated[list[UserPart], Field(min_length=1)]


class AssistantItem(Item):
    """An earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: Text | list[AssistantPart]
    phase: Literal["commentary", "final_answer"] | None = Field(None, description="Changes nothing.")


class CallItem(Item):
    """A function that was called in an earlier answer; its arguments are the JSON text of an object."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: Text
    caller: None = None
    namespace: None = None


class OutputItem(Item):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Text | Annotated[list[InputText], Field(min_length=1)]
    name: str | None = Field(None, description="Of the function.")
    caller: None = None
    namespace: None = None


class ThoughtPart(Part):
    """A piece of thoughts."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Item):
    """Thoughts of an earlier answer, for templates that read them."""

    type: Literal["reasoning"]
    content: list[ThoughtPart] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="Thoughts are given whole here, in `content`; there are no summaries."
    )
    encrypted_content: None = Field(None, description="Nothing here is encrypted, or can be decrypted.")


MessageItem = Annotated[SystemItem | UserItem | AssistantItem, Field(discriminator="role")]
InputItem = Annotated[MessageItem | CallItem | OutputItem | ReasoningItem, Field(discriminator="type")]


# Tools and forms of answers


class FunctionTool(Part):
    """A function that the model may call and the client runs."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=_SCHEMA_NAME)]
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; without it there are no arguments.")
    strict: bool | None = Field(None, description="Whether arguments follow the schema to the letter. Left out: false.")
    output_schema: None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class FunctionChoice(Part):
    """The one function that is to be called."""

    type: Literal["function"]
    name: str


class AllowedTools(Part):
    """Some of the tools: the model is told of no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=128)]


ToolChoice = Literal["none", "auto", "required"] | Annotated[FunctionChoice | AllowedTools, Field(discriminator="type")]


class JsonSchema(Part):
    """An answer that follows a JSON schema."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=_SCHEMA_NAME)]
    schema_: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class TextOptions(Part):
    """The form of the answer."""

    format: Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = Field(None, description="Models here are not told how much to say.")


class Reasoning(Part):
    """Whether a model that can think does, and for how long."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="As `reasoning_effort` of chat completions."
    )
    summary: Literal["auto"] | None = Field(
        None, description="The best there is, which is none: thoughts are given whole, and nothing here sums them up."
    )
    generate_summary: Literal["auto"] | None = Field(None, description="What `summary` was called.")
    context: Literal["auto"] | None = Field(None, description="The template knows which thoughts a model goes by.")
    mode: Literal["standard"] | None = Field(None, description="There is one.")


class StreamOptions(Part):
    """What a stream has besides pieces of the answer: nothing, for nobody listens to the lengths of pieces here."""

    include_obfuscation: Literal[False] | None = None


def _told_by_fields(schema: dict[str, Any]) -> None:
    """Items are told apart by type, and messages by role; OpenAPI has no words for one inside the other."""
    for form in schema["properties"]["input"]["anyOf"]:
        form.get("items", {}).pop("discriminator", None)


class ResponseRequest(Given):
    """`POST /v1/responses`."""

    model_config = ConfigDict(json_schema_extra=_told_by_fields)

    refused: ClassVar[dict[str, str]] = {
        "previous_response_id": _NOWHERE,
        "conversation": _NOWHERE,
        "prompt": "the server keeps no prompts",
        "background_options": "the server keeps no responses that could be fetched later",
        "context_management": "the server cuts and sums up no conversation; send the items that are to be read",
        "moderation": "this server moderates nothing",
        "access_programs": "they are OpenAI's",
        "image": "how far pictures are scaled down is fixed in the package",
        "prompt_cache_options": "the cache of prompts keeps what was used last, and is told by `cache_prompt` alone",
    }

    model: str = Field(description="A name of `GET /v1/models`; `<model>:<adapter>` answers with a LoRA adapter.")
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=4096)] = Field(
        description="What the user says, or all items of the conversation so far."
    )
    instructions: Text | None = Field(None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1, lt=_TOKENS)] | None = Field(
        None, description="Most tokens of the answer, thoughts included."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the most likely token. Left out: what the package's `search` says, else 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Left out: as the package's `search`.")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Needs `message.output_text.logprobs` in `include`."
    )
    include: list[Literal["message.output_text.logprobs"]] | None = Field(
        None, description="Log-probabilities of the answer's tokens are all that can be included."
    )
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = Field(None, description="Left out: `auto`.")
    parallel_tool_calls: bool | None = Field(None, description="False allows one call an answer.")
    max_tool_calls: int | None = Field(None, description="Of tools that the server runs, which are none.")
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = Field(
        None, description="Nothing is stored; left out it is false here, and the answer says so."
    )
    background: Literal[False] | None = Field(None, description="A response is answered while its client waits.")
    truncation: Literal["disabled"] | None = Field(None, description="What does not fit the context is refused.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one.")
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Comes back as it was given.")
    user: str | None = Field(None, description="Who asks; changes nothing.")
    safety_identifier: str | None = Field(None, description="Changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Changes nothing: prompts that begin alike are found.")
    prompt_cache_retention: Literal["in_memory"] | None = None
    # Not of OpenAI; as chat completions take them here.
    top_k: Annotated[int, Field(ge=0, lt=_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-_LARGEST, lt=_LARGEST)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=1, lt=_TOKENS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_prompt: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Refuse what the API knows and this server has not, and say of items without a type that they are messages."""
        if not isinstance(data, Mapping):
            return data
        _check_stored(data)
        _check_tools(data.get("tools"), "tools")
        choice = data.get("tool_choice")
        if isinstance(choice, Mapping) and choice.get("type") not in ("function", "allowed_tools"):
            _check_tools([choice], "tool_choice")
        items = data.get("input")
        return {**data, "input": _items(items)} if isinstance(items, list) else dict(data)


def _check_stored(data: Mapping[str, Any]) -> None:
    if data.get("store") is True:
        raise Unsupported("`store` is not honoured", why=_NOWHERE, fix="leave it out", parameter="store")
    if data.get("background") is True:
        why = "the server keeps no responses that could be fetched later"
        raise Unsupported("`background` is not honoured", why=why, fix="use `stream`", parameter="background")
    if data.get("truncation") == "auto":
        why = "the server drops no items of a conversation by itself"
        raise Unsupported("`truncation: auto` is not honoured", why=why, fix="send fewer items", parameter="truncation")
    included = data.get("include")
    for name in included if isinstance(included, list) else ():
        if name != "message.output_text.logprobs" and isinstance(name, str):
            encrypted = "reasoning." in name
            raise Unsupported(
                f"`{name[:80]}` cannot be included",
                why="thoughts are given as they are, in `content` of reasoning items" if encrypted else "there is none",
                fix="leave it out",
                parameter="include",
            )


def _check_tools(tools: Any, where: str) -> None:
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if isinstance(kind, str) and kind != "function":
            raise Unsupported(
                f"a tool `{kind[:80]}` cannot be used",
                why="its input is no JSON, which is all that calls are made of here" if kind == "custom" else _TOOLS,
                fix="give tools of type function",
                parameter=where if where == "tool_choice" else f"{where}[{index}].type",
            )


def _items(items: list[Any]) -> list[Any]:
    found = []
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            found.append(item)
            continue
        typed = {"type": _MESSAGE, **item} if "role" in item else dict(item)
        _check_item(typed, f"input[{index}]")
        found.append(typed)
    return found


def _check_item(item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type")
    if isinstance(kind, str) and kind not in _ITEMS:
        raise Unsupported(
            f"an item `{kind[:80]}` cannot be taken",
            why=_NOWHERE if kind == _REFERENCE else "it is of a tool that this server has not",
            fix=f"send items of type {', '.join(_ITEMS)}",
            parameter=f"{where}.type",
        )
    if kind == _REASONING and item.get("encrypted_content") is not None and not item.get("content"):
        why = "nobody but their author can read encrypted thoughts"
        raise Unsupported("the item's thoughts are encrypted", why=why, fix="leave it out", parameter=where)
    if kind == _REASONING and item.get("summary") and not item.get("content"):
        why = "a summary is not what the model thought"
        raise Unsupported("the item has no thoughts", why=why, fix="leave it out", parameter=where)
    for field in ("content", "output"):
        for index, part in enumerate(item[field] if isinstance(item.get(field), list) else ()):
            place = f"{where}.{field}[{index}]"
            if not isinstance(part, Mapping):
                continue
            if reason := _PARTS.get(str(part.get("type"))):
                raise Unsupported(f"a part `{part['type']}` cannot be taken", why=reason, parameter=f"{place}.type")
            if part.get("file_id") is not None:
                raise Unsupported(
                    "`file_id` is not honoured",
                    why="the server keeps no files",
                    fix="send the picture along: `image_url` with data:image/png;base64,...",
                    parameter=f"{place}.file_id",
                )
            if field == "output" and part.get("type") == "input_image":
                why = "models here read text of tools"
                raise Unsupported("a tool cannot answer with pictures", why=why, parameter=f"{place}.type")


# Answers


def _omitted(value: Any) -> bool:
    return value is None


class OutputText(Answer):
    """The text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[TokenLogprob] = Field(default_factory=list)


class Thoughts(Answer):
    """The text of thoughts."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class Message(Answer):
    """What the model says."""

    id: str
    type: Literal["message"] = "message"
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(Answer):
    """A function that the model calls. The client runs it, and sends a `function_call_output` of the same `call_id`."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Status
    call_id: str
    name: str
    arguments: str


class Thinking(Answer):
    """What the model thought; there is no summary of it."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Status
    summary: list[Any] = Field(default_factory=list)
    content: list[Thoughts]


OutputItemOf = Message | FunctionCall | Thinking


class InputDetails(Answer):
    """Of the input's tokens: how many were known from an earlier request. Nothing is written to a cache that lasts."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(Answer):
    """Of the output's tokens: how many were thoughts."""

    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why a response ended early: its limit or the context ended it."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(Answer):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str
    type: str | None = None
    param: str | None = None


class Response(Answer):
    """The answer of `POST /v1/responses`; what was asked comes back with what it meant."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItemOf] = Field(default_factory=list)
    usage: ResponseUsage | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    parallel_tool_calls: bool
    previous_response_id: None = None
    background: Literal[False] = False
    store: Literal[False] = False
    reasoning: dict[str, Any] | None = None
    service_tier: Literal["default"] = "default"
    temperature: float
    top_p: float
    top_logprobs: int = 0
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    truncation: Literal["disabled"] = "disabled"
    user: str | None = Field(None, exclude_if=_omitted)
    safety_identifier: str | None = Field(None, exclude_if=_omitted)
    prompt_cache_key: str | None = Field(None, exclude_if=_omitted)

    @property
    def output_text(self) -> str:
        """The text of all its messages."""
        messages = [item for item in self.output if isinstance(item, Message)]
        return "".join(part.text for message in messages for part in message.content)


# Events of a stream


class Event(Answer):
    """What all events have; numbers go up by one from zero."""

    type: str
    sequence_number: int


class ResponseEvent(Event):
    """`response.created`, `.in_progress`, and at the end `.completed`, `.incomplete` or `.failed`."""

    response: Response


class ItemEvent(Event):
    """`response.output_item.added` and `.done`."""

    output_index: int
    item: OutputItemOf


class PartEvent(Event):
    """`response.content_part.added` and `.done`."""

    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | Thoughts


class PieceEvent(Event):
    """`response.output_text.delta`, `response.reasoning_text.delta` and `response.function_call_arguments.delta`."""

    item_id: str
    output_index: int
    content_index: int | None = Field(None, exclude_if=_omitted)
    delta: str
    logprobs: list[TokenLogprob] | None = Field(None, exclude_if=_omitted)


class WholeEvent(Event):
    """`response.output_text.done`, `response.reasoning_text.done` and `response.function_call_arguments.done`."""

    item_id: str
    output_index: int
    content_index: int | None = Field(None, exclude_if=_omitted)
    text: str | None = Field(None, exclude_if=_omitted)
    name: str | None = Field(None, exclude_if=_omitted)
    arguments: str | None = Field(None, exclude_if=_omitted)
    logprobs: list[TokenLogprob] | None = Field(None, exclude_if=_omitted)
