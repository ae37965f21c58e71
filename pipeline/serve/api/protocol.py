"""The requests and answers of OpenAI's API as this server takes and gives them.

Types are strict: a number that is written as text is none. A field that is not declared is refused (`parse`), and so is
one that OpenAI knows and this server does not honour (`refused` of each request), with the reason. What is declared and
changes nothing here (`user`, `metadata`) says so. Null is as good as leaving a field out.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.serve.api import mistakes

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_INPUTS = 256
"""Most texts of one request that embeds, ranks or completes."""

_LARGEST = 1 << 63
_TOKENS = 1 << 31

_ONE_ANSWER = "one choice of one model is what this server makes"


class Part(BaseModel):
    """Whatever is given: strict, frozen, and without fields that nobody reads."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Given(Part):
    """A request; ``refused`` has fields that OpenAI knows, and why they are not honoured here."""

    refused: ClassVar[dict[str, str]] = {}


class Answer(BaseModel):
    """Whatever is answered."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


def _omitted(value: Any) -> bool:
    return value is None


Text = Annotated[str, Field(max_length=16 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=_TOKENS)]
Tokens = Annotated[list[Token], Field(min_length=1)]


# Messages


class TextPart(Part):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImageAddress(Part):
    """A picture that is sent along."""

    url: Text = Field(description="`data:image/png;base64,...` or the same of jpeg. Addresses are not fetched.")
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="`low` is refused: the package itself says how far its pictures are scaled down."
    )


class ImagePart(Part):
    """A picture, for packages of models that see."""

    type: Literal["image_url"]
    image_url: ImageAddress


class RefusalPart(Part):
    """What a model of OpenAI's once refused with."""

    type: Literal["refusal"]
    refusal: Text


UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
UserContent = Text | Annotated[list[UserPart], Field(min_length=1)]
TextContent = Text | Annotated[list[TextPart], Field(min_length=1)]
AssistantContent = Text | list[AssistantPart]


class SystemMessage(Part):
    """What an application tells the model to be."""

    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = Field(None, description="Who speaks; changes nothing.")


class UserMessage(Part):
    """What a user says and shows."""

    role: Literal["user"]
    content: UserContent
    name: str | None = Field(None, description="Who speaks; changes nothing.")


class CalledFunction(Part):
    """The function that was called, and its arguments as the JSON text of an object."""

    name: Annotated[str, Field(min_length=1)]
    arguments: Text


class CalledTool(Part):
    """A call of a tool in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="As chunks of a stream have it; changes nothing.")


class AssistantMessage(Part):
    """An earlier answer, as it was given."""

    role: Literal["assistant"]
    content: AssistantContent | None = None
    reasoning_content: Text | None = Field(None, description="Its thoughts, for templates that read them.")
    tool_calls: list[CalledTool] | None = None
    refusal: Text | None = None
    name: str | None = Field(None, description="Who speaks; changes nothing.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Part):
    """What a tool answered."""

    role: Literal["tool"]
    content: TextContent
    tool_call_id: str
    name: str | None = Field(None, description="Of the tool.")


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# Tools and forms of answers


class Function(Part):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; without it there are no arguments.")
    strict: bool | None = Field(None, description="Whether arguments follow the schema to the letter.")


class Tool(Part):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Part):
    """The name of a function."""

    name: str


class NamedTool(Part):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class PlainText(Part):
    """An answer of any form."""

    type: Literal["text"]


class JsonObject(Part):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class SchemaOf(Part):
    """A JSON schema with a name."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchema(Part):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: SchemaOf


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class StreamOptions(Part):
    """What a stream has besides pieces of the answer."""

    include_usage: bool | None = Field(None, description="A last chunk without choices that counts tokens.")
    include_obfuscation: Literal[False] | None = None


# Requests


class Sampled(Given):
    """What chat and plain completions have in common."""

    model: str = Field(description="A name of `GET /v1/models`; `<model>:<adapter>` answers with a LoRA adapter.")
    max_tokens: Annotated[int, Field(ge=1, lt=_TOKENS)] | None = Field(
        None, description="Most tokens of the answer, thoughts included."
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the most likely token. Left out: what the package's `search` says, else 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Left out: as the package's `search`.")
    top_k: Annotated[int, Field(ge=0, lt=_TOKENS)] | None = Field(
        None, description="0 draws from all tokens. Left out: as the package's `search`. Not of OpenAI."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Not of OpenAI.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Left out: as the package's `search`. Not of OpenAI."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024, description="Token ids, as text, and what is added to their logits."
    )
    seed: Annotated[int, Field(ge=-_LARGEST, lt=_LARGEST)] | None = Field(
        None, description="The same seed gives the same answer again; choice i has the seed + i."
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Who asks; changes nothing.")
    cache_prompt: bool | None = Field(
        None, description="False reads the whole prompt again, whatever is known of it. Not of OpenAI."
    )


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    refused: ClassVar[dict[str, str]] = {
        "functions": "it gave way to `tools`",
        "function_call": "it gave way to `tool_choice`",
        "audio": "no package speaks",
        "prediction": "the runtime takes no predicted answer; what a prompt repeats is found without it",
        "web_search_options": "this server reaches no network",
        "moderation": "this server moderates nothing",
        "prompt_cache_options": "the cache of prompts keeps what was used last, and is told by `cache_prompt` alone",
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_TOKENS)] | None = Field(
        None, description="What `max_tokens` is called now; one of both."
    )
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = Field(None, description="Left out: `auto` with tools, else `none`.")
    parallel_tool_calls: bool | None = Field(None, description="False allows one call an answer.")
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None,
        description="`none` is `enable_thinking: false`, any other true. Models are not trained for degrees, but "
        "`minimal`, `low` and `medium` end the thoughts after 256, 1024 and 8192 tokens (or half of the answer's room, "
        "if that is less), unless there is a `thinking_budget`; `high` and `xhigh` do not end them.",
    )
    enable_thinking: bool | None = Field(None, description="For models that can think or not. Not of OpenAI.")
    thinking_budget: Annotated[int, Field(ge=1, lt=_TOKENS)] | None = Field(
        None, description="Most tokens of thoughts, which are ended then. Not of OpenAI."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables that the package's chat template reads, such as `enable_thinking`. Not of OpenAI."
    )
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Changes nothing.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one.")
    verbosity: Literal["medium"] | None = Field(None, description="Models here are not told how much to say.")
    safety_identifier: str | None = Field(None, description="Changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Changes nothing: prompts that begin alike are found.")
    prompt_cache_retention: Literal["in_memory"] | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="Text or token ids, or a list of either. Control tokens in text are ordinary characters.")
    suffix: Text | None = Field(None, description="What follows the answer, for models of code that fill a gap.")
    echo: bool | None = Field(None, description="Begin the answer with its prompt.")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Make so many answers, and give the n that are most likely by token."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class EmbeddingRequest(Given):
    """`POST /v1/embeddings`."""

    model: str
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_INPUTS)]
    ) = Field(description="Text or token ids, or a list of either. Ids are taken with what the model expects around.")
    dimensions: Annotated[int, Field(ge=1, lt=_TOKENS)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    input_type: Literal["document", "query"] | None = Field(
        None, description="A query gets the instruction in front; left out: document. Not of OpenAI."
    )
    instruction: Text | None = Field(None, description="Of queries; left out: the model's own. Not of OpenAI.")
    truncate: bool | None = Field(None, description="Cut what does not fit, instead of refusing it. Not of OpenAI.")
    user: str | None = Field(None, description="Who asks; changes nothing.")


class DocumentText(Part):
    """A document to rank."""

    text: Text


class RerankRequest(Given):
    """`POST /v1/rerank`, as Cohere, Jina and vLLM have it."""

    model: str
    query: Text
    documents: Annotated[list[Text | DocumentText], Field(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Field(ge=1, lt=_TOKENS)] | None = Field(None, description="Left out: all.")
    return_documents: bool | None = Field(None, description="Left out: true.")
    instruction: Text | None = Field(None, description="Left out: the model's own.")
    truncate: bool | None = Field(None, description="Cut what does not fit, instead of refusing it.")
    user: str | None = Field(None, description="Who asks; changes nothing.")


class TokenizeRequest(Given):
    """`POST /tokenize`: a text, or messages as chat completions take them."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    content: Text | None = Field(None, description="The text, as llama-server calls it.")
    prompt: Text | None = Field(None, description="The text, as vLLM calls it.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special: Literal[False] | None = Field(None, description="No Qwen puts tokens around a text.")
    parse_special: bool | None = Field(None, description="Control tokens in the text count as such; left out: false.")
    with_pieces: bool | None = Field(None, description="Tell the text of each token as well.")


class DetokenizeRequest(Given):
    """`POST /detokenize`."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    tokens: list[Token]


# Answers


class PromptDetails(Answer):
    """Of the prompt's tokens: how many were known from an earlier request."""

    cached_tokens: int = 0


class CompletionDetails(Answer):
    """Of the answer's tokens: how many were thoughts."""

    reasoning_tokens: int = 0


class Usage(Answer):
    """Counts of tokens; of several choices the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()
    completion_tokens_details: CompletionDetails = CompletionDetails()


class LikelyToken(Answer):
    """A token, its log-probability and its bytes, for a character may need several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken):
    """A token of an answer, and the most likely ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    """Log-probabilities of all tokens of a choice or chunk, those of thoughts and tool calls included."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(Answer):
    """A function to call, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(Answer):
    """What the model answered."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = Field(None, exclude_if=_omitted)
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=_omitted)


class ChatChoice(Answer):
    """One of the answers that were asked for."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Answer):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class FunctionDelta(Answer):
    """More of a function call: its name at first, then pieces of its arguments."""

    name: str | None = Field(None, exclude_if=_omitted)
    arguments: str | None = Field(None, exclude_if=_omitted)


class ToolCallDelta(Answer):
    """More of the tool call with this index."""

    index: int
    id: str | None = Field(None, exclude_if=_omitted)
    type: Literal["function"] | None = Field(None, exclude_if=_omitted)
    function: FunctionDelta


class Delta(Answer):
    """What was added to a message."""

    role: Literal["assistant"] | None = Field(None, exclude_if=_omitted)
    content: str | None = Field(None, exclude_if=_omitted)
    reasoning_content: str | None = Field(None, exclude_if=_omitted)
    tool_calls: list[ToolCallDelta] | None = Field(None, exclude_if=_omitted)


class ChunkChoice(Answer):
    """What was added to one of the answers."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(Answer):
    """One event of a stream of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = Field(None, exclude_if=_omitted)


class CompletionLogprobs(Answer):
    """Lists as long as there are tokens; the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One of the answers, or in a stream what was added to it."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(Answer):
    """The answer of `POST /v1/completions`, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None = None
    usage: Usage | None = Field(None, exclude_if=_omitted)


class InputUsage(Answer):
    """Counts of tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Answer):
    """A vector of length 1; as base64 its numbers are float32, the least byte first."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    """The answer of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: InputUsage


class Document(Answer):
    """A document that was ranked."""

    text: str


class Ranked(Answer):
    """A document by its place in the request, and how relevant it is, in [0, 1]."""

    index: int
    relevance_score: float
    document: Document | None = Field(None, exclude_if=_omitted)


class Ranking(Answer):
    """The answer of `POST /v1/rerank`: the most relevant document first."""

    id: str
    model: str
    results: list[Ranked]
    usage: InputUsage


class Tokenized(Answer):
    """The answer of `POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int
    pieces: list[str] | None = Field(None, exclude_if=_omitted)


class Detokenized(Answer):
    """The answer of `POST /detokenize`, under the names of llama-server and vLLM."""

    content: str
    prompt: str


Capability = Literal["chat", "completion", "thinking", "tools", "vision", "embeddings", "rerank"]


class ModelCard(Answer):
    """A model that is served; of an adapter ``parent`` is the model it belongs to.

    ``context_length`` and vLLM's ``max_model_len`` are one number: tokens of a prompt and its answer.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen-onnx"
    root: str
    parent: str | None = None
    context_length: int
    max_model_len: int
    capabilities: list[Capability]
    task: Literal["generate", "embed", "rerank"]
    sees: bool
    state: str


class ModelList(Answer):
    """The answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetails(Answer):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(Answer):
    """The answer to a request that is not honoured."""

    error: ErrorDetails


Kind = TypeVar("Kind", bound=Given)


def parse(kind: type[Kind], data: Any) -> Kind:
    """The request that ``data`` (as JSON gives it) is.

    Raises:
        Refused: a field is unknown, has another type or value than it may, or is missing; ``parameter`` names it.
        Unsupported: a field is one of OpenAI's that this server does not honour.
    """
    mistakes.check_fields(data, kind.refused)
    try:
        return kind.model_validate({name: value for name, value in data.items() if name not in kind.refused})
    except ValidationError as error:
        raise mistakes.refusal(kind, error, data) from None
