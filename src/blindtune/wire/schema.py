"""The messages of the API, version 1. The JSON part of each body; tensors ride beside it.

| route | request | response |
|---|---|---|
| `GET /v1/models` | | `ModelList` (JSON) |
| `GET /v1/models/{m}` | | `ModelInfo` (JSON) |
| `GET /v1/models/{m}/tokenizer` | | `TokenizerFile` (JSON) |
| `PUT /v1/adapters/{sha256}` | `AdapterUpload` + `weights [P]` | `AdapterReceipt` (JSON) |
| `POST /v1/models/{m}/forward` | `ForwardRequest` + tokens | `ForwardResponse` + `hidden` |
| `POST /v1/models/{m}/backward` | `BackwardRequest` + tokens (+ `cotangents`) | `BackwardResponse` + `gradients` |
| `GET /v1/models/{m}/parts/{part}` | | `PartFile` + the weights of a part |
| `POST /v1/models/{m}/trunk/forward` | `TrunkRequest` + `hidden` | `TrunkResponse` + `hidden` |
| `POST /v1/models/{m}/trunk/backward` | `TrunkRequest` + `cotangents` (+ `hidden`) | `TrunkResponse` + `gradients` |
| `PUT /v1/plugins/{sha256}` | `PluginUpload` + tuned weights by name | `PluginReceipt` (JSON) |
| `POST /v1/models/{m}/score` | `ScoreRequest` + tokens, `starts [B]` | `ScoreResponse` + `log_likelihoods`, `greedy` |
| `POST /v1/models/{m}/generate` | `GenerateRequest` + tokens of one text | `GenerateResponse` + `generated [T]` |

Tokens are `input_ids [B, L]` int32, `lengths [B]` int32 (right padding) and, for models that use them,
`token_type_ids [B, L]` uint8.

Hidden states of the trunk's routes are packed, `[N, d]` with N the sum of `lengths [B]` int32: no padding travels. Each
of them is several tensors, in the codec that the message names (`blindtune.wire.quantize`).
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints

from blindtune.wire.limits import Limits

API_VERSION = 1
MEDIA_TYPE = "application/vnd.blindtune.v1+safetensors"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Pooling = Literal["cls", "mean", "last", "first", "none"]
"""How `[B, L, d]` becomes what the head reads: the first token (cls), the mean over tokens, the last
token, the decoder's first position (first), or every position (none)."""
Codec = Literal["fp32", "fp16", "int8", "int4"]
"""How many bits hidden states and their gradients have on the wire, see `blindtune.wire.quantize`."""
CODECS: tuple[Codec, ...] = get_args(Codec)
Architecture = Literal["encoder", "decoder", "encoder-decoder"]


class Message(BaseModel):
    """Base of all messages: unknown fields are refused, so that a typo can't be ignored silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSpec(Message):
    """Which linear layers an adapter changes, and how. Weights travel apart, as one vector `[P]`.

    The vector holds, for each module in the order given, A `(rank, in)` and then B `(out, rank)`, row by row; with
    `a_seed` B alone.
    """

    kind: Literal["lora"] = "lora"
    modules: Annotated[list[Name], Field(min_length=1, max_length=4096)]
    rank: PositiveInt
    scaling: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The factor before B A x: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input; only in requests that carry a seed."""
    a_seed: Sha256 | None = None
    """The A matrices are fixed, and both sides expand them from this public seed (`blindtune.models.lora`)."""


class AdapterUpload(Message):
    model: Name
    spec: LoraSpec


class AdapterReceipt(Message):
    sha256: Sha256
    parameters: PositiveInt


class ForwardRequest(Message):
    """h(x, θ_i) for n adapters at once. No adapters means the frozen model, n = 1."""

    adapters: Annotated[list[Sha256], Field(max_length=4096)] = []
    pooling: Pooling
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Dropout is on only if the client gives its seed, so that a repeated call gives the same answer."""
    retain: bool = False
    """True: keep the autograd graph for a backward call that follows."""
    return_hidden: bool = True
    """False: compute and retain the graph for a backward call that follows, but send nothing back."""


class ForwardResponse(Message):
    """With `hidden`: `[n, B, d]`, or `[n, B, L, d]` for pooling `none`; float32."""

    fingerprint: Sha256


class NoiseShare(Message):
    """A cotangent of pure noise, as the seed that the server expands (`blindtune.lattice`).

    The noise is a discrete Gaussian with a standard deviation of `steps` steps of 2^exponent.
    """

    version: Literal[2] = 2
    seed: Sha256
    """32 bytes in hexadecimal."""
    exponent: Annotated[int, Field(ge=-100, le=60)]
    steps: Annotated[int, Field(ge=1, le=3 * 2**19)]


class BackwardRequest(Message):
    """The forward request once more, plus `cotangents [m, n, B, d]` float32 or, in their place, one share of noise."""

    adapters: Annotated[list[Sha256], Field(min_length=1, max_length=4096)]
    pooling: Pooling
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    noise: NoiseShare | None = None


class BackwardResponse(Message):
    """With `gradients`: `[m, n, P]`, float32 (float64 from servers in it), laid out as adapters' weight vectors."""

    fingerprint: Sha256
    retained: bool
    """Whether the forward pass was still in memory."""


class TrunkRequest(Message):
    """The middle of a split model on packed hidden states; see `blindtune.models.split`."""

    up: Codec
    """How `hidden` (and `cotangents`) travel."""
    down: Codec
    """How the answer shall travel."""
    retain: bool = False
    """True: keep the autograd graph for a backward call that follows."""
    forward: Sha256 | None = None
    """Backward: SHA-256 of the body of the forward call. With it `hidden` may be left out as long as the server has the
    graph; if it hasn't, it answers `graph-lost`."""


class TrunkResponse(Message):
    """With `hidden` or `gradients`, packed as in the request, in the codec that it asked for.

    Gradients are rounded at random, from a stream that follows from the request: equal requests, equal answers.
    """

    fingerprint: Sha256
    retained: bool = False
    """Backward: whether the forward pass was still in memory."""


class PartFile(Message):
    """A part of a split model for the client to hold, with its weights under the whole model's names."""

    part: str
    config: str
    """The model's configuration in transformers, as JSON."""
    bottom: PositiveInt
    top: PositiveInt
    fingerprint: Sha256
    manifest: str | None = None
    """Of an emulator: JSON, signed (`blindtune.models.emulator`)."""


class PluginUpload(Message):
    """Tuned ends of a split model, to be put around its real trunk; tensors as a checkpoint holds them."""

    model: Name
    fingerprint: Sha256
    """Of the model that they were tuned for."""
    scaling: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """LoRA's alpha / rank, and the tensors are its matrices under PEFT's names. None: the tensors are whole weights."""


class PluginReceipt(Message):
    sha256: Sha256
    parameters: PositiveInt


class ScoreRequest(Message):
    """How likely the tokens from `starts [B]` int32 on are, with plugged-in ends, or (None) for the model as it is."""

    plugin: Sha256 | None = None


class ScoreResponse(Message):
    """With `log_likelihoods [B]` float32, the sum of log p over each text's tokens from its start on, in nats; and
    `greedy [B]` uint8, 1 if the likeliest token at each of those places is the text's own."""

    fingerprint: Sha256


class GenerateRequest(Message):
    """Goes on with one text."""

    plugin: Sha256 | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0: always the likeliest token."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class GenerateResponse(Message):
    """With `generated [T]` int32, without the prompt; the end-of-text token ends it and isn't part of it."""

    fingerprint: Sha256


class SplitInfo(Message):
    """How a hosted decoder is cut: blocks of the bottom and of the top, which clients may have."""

    bottom: PositiveInt
    top: PositiveInt
    parts: list[str]
    """What `parts/` offers: bottom, top, and emulator if there is one."""
    codecs: list[Codec] = list(CODECS)
    weights_shared: Annotated[float, Field(ge=0, le=1)]
    """Part of the model's weights that is in bottom and top."""


class ModelInfo(Message):
    """What is hosted, as far as a client may know it: shapes and names, never weights."""

    name: Name
    architecture: Architecture
    model_type: str
    """The family's name in transformers, e.g. `bert`: PEFT's default target modules depend on it."""
    hidden_size: PositiveInt
    layers: PositiveInt
    dtype: str
    modules: dict[str, tuple[PositiveInt, PositiveInt]]
    """Linear layers that take adapters: name -> (out_features, in_features)."""
    peft_kinds: list[Literal["lora"]] = ["lora"]
    pooling: Pooling
    """The default pooling."""
    poolings: list[Pooling]
    token_type_ids: bool
    pad_token_id: int
    fingerprint: Sha256
    """SHA-256 over names, dtypes and values of all weights."""
    base_model_name: str
    """What PEFT writes into `base_model_name_or_path`."""
    limits: Limits
    split: SplitInfo | None = None
    """How the model is cut, if clients may hold its ends."""


class ModelList(Message):
    api_version: int = API_VERSION
    operator_id: str
    """Random at every start of a server; equal ids mean one server behind two addresses."""
    models: list[str]


class TokenizerFile(Message):
    """The model's tokenizer as the JSON of the `tokenizers` library."""

    tokenizer: str
    sha256: Sha256
