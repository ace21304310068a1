"""The messages of the API, version 1: the JSON part of each body. Tensors follow it in the same body.

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
| `PUT /v1/plugins/{sha256}` | `TunedPartsUpload` + tuned weights by name | `TunedPartsReceipt` (JSON) |
| `POST /v1/models/{m}/score` | `ScoreRequest` + tokens, `starts [B]` | `ScoreResponse` + `log_likelihoods`, `greedy` |
| `POST /v1/models/{m}/generate` | `GenerateRequest` + tokens of one text | `GenerateResponse` + `generated [T]` |

Tokens are `input_ids [B, L]` int32, `lengths [B]` int32 (right padding) and, for models that use them,
`token_type_ids [B, L]` uint8.

Hidden states on the trunk's routes are packed, without padding: `[N, d]`, where N is the sum of `lengths [B]` int32.
Each is sent as several tensors, in the codec that the message names (`blindtune.wire.quantize`).

The wire format keeps two older words: `split` for the cut of a model, `plugin` for tuned parts.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    model_validator,
)

from blindtune.wire.limits import Limits

API_VERSION = 1
MEDIA_TYPE = "application/vnd.blindtune.v1+safetensors"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Pooling = Literal["cls", "mean", "max", "last", "first", "none"]
"""Reduction of hidden states `[B, L, d]` to one vector for each text: the first token (cls), the mean or the largest
values over tokens (mean, max), the last token, the decoder's first position (first), or no reduction (none)."""
Codec = Literal["fp32", "fp16", "int8", "int4"]
"""Number format of hidden states and their gradients on the wire (`blindtune.wire.quantize`)."""
CODECS: tuple[Codec, ...] = get_args(Codec)
Architecture = Literal["encoder", "decoder", "encoder-decoder"]


class Message(BaseModel):
    """Base class of all messages. It rejects unknown fields, so that a typo isn't ignored silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSpec(Message):
    """The linear layers that a LoRA adapter changes, and its hyperparameters. Weights are sent as one vector `[P]`.

    The vector holds for each module, in the order of `modules`, A `(rank, in)` and then B `(out, rank)`, row by row.
    With `a_seed` it holds B alone.
    """

    kind: Literal["lora"] = "lora"
    modules: Annotated[list[Name], Field(min_length=1, max_length=4096)]
    rank: PositiveInt
    scaling: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """The factor on B A x: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate on the adapter's input. It applies only to requests that have a seed."""
    a_seed: Sha256 | None = None
    """If set, the A matrices are fixed, and both sides expand them from this public seed (`blindtune.models.lora`)."""


class AdapterUpload(Message):
    """Uploads an adapter's weights `[P]`, which later requests name by their SHA-256."""

    model: Name
    spec: LoraSpec


class AdapterReceipt(Message):
    """Confirms an uploaded adapter: its SHA-256 and its number of weights."""

    sha256: Sha256
    parameters: PositiveInt


class Projection(Message):
    """A public random projection of each hidden state, from d to `size` values: R^T h, R `[d, size]`.

    Both sides expand R from the seed (`blindtune.models.readout.projection_matrix`).
    """

    seed: Sha256
    size: Annotated[int, Field(ge=1, le=65_536)]


class Readout(Message):
    """Determines which hidden states a pass returns for each text: which layers', how pooled, and how projected.

    A model with N layers of blocks has N + 1 states: state 0 is the input of the first block, state i the output of
    block i − 1. The last state is the model's output, after its final normalisation if it has one.
    """

    pooling: Pooling
    layers: Annotated[tuple[NonNegativeInt, ...], Field(max_length=4096)] = ()
    """Indices of states, in rising order; none means the last state alone."""
    projection: Projection | None = None

    @property
    def width(self) -> int:
        """k, the number of states."""
        return max(1, len(self.layers))

    def size(self, hidden_size: int) -> int:
        """Returns the number of values for each text (or token), k · d, or k times the size of the projection."""
        return self.width * (hidden_size if self.projection is None else self.projection.size)


class Directions(Message):
    """Public directions v_first, …, along which a forward request asks for tangents J(x) v in place of hidden states.

    They are directions of the B matrices of LoRA adapters on `modules` at B = 0. Both sides expand the adapters' fixed
    A, and v_i from its index i, from the seed (`blindtune.models.tangents`).
    """

    modules: Annotated[list[Name], Field(min_length=1, max_length=4096)]
    rank: PositiveInt
    seed: Sha256
    first: Annotated[int, Field(ge=0, lt=2**31)] = 0
    count: Annotated[int, Field(ge=1, lt=2**31)]


class Pass(Readout):
    """The part that requests for forward and backward passes have in common: a readout and n adapters."""

    adapters: Annotated[list[Sha256], Field(max_length=4096)] = []
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of dropout, which is off without one. So a repeated request always gives the same response."""

    @property
    def readout(self) -> Readout:
        """The readout alone."""
        return Readout(pooling=self.pooling, layers=self.layers, projection=self.projection)


class ForwardRequest(Pass):
    """Requests the hidden states h(x, θ_i) for n adapters at once. No adapters means the frozen model, n = 1."""

    codec: Codec = "fp32"
    """Codec of the response's `hidden`."""
    retain: bool = False
    """Whether the server keeps the autograd graph for a following backward request."""
    return_hidden: bool = True
    """False: the server computes the forward pass, and keeps the graph if `retain` is set, but sends no tensor."""
    directions: Directions | None = None
    """If set, the response holds J(x) v for each direction in place of h(x, θ_i), so n is their number. Such a request
    names no adapters, no seed, and retains nothing."""

    @model_validator(mode="after")
    def _only_directions(self) -> ForwardRequest:
        if self.directions is not None and (self.adapters or self.seed is not None or self.retain):
            raise ValueError("a request for tangents along directions has no adapters and no seed, and retains nothing")
        return self


class ForwardResponse(Message):
    """Returns the tensor `hidden`, float32: `[n, B, d]`, or `[n, B, L, d]` for pooling `none`.

    If the request names directions, these are tangents J(x) v, and n is the number of directions.

    If the request names k layers, there is an axis of k before the last. In another codec than fp32, several tensors
    represent it as `[n · B · k, d]` (`blindtune.wire.quantize`). For pooling `none` they hold the n · Σ lengths · k
    states of real tokens alone, without padding.
    """

    fingerprint: Sha256


class NoiseShare(Message):
    """A cotangent of pure noise, sent as a seed that the server expands (`blindtune.lattice`).

    The noise is a discrete Gaussian with a standard deviation of `steps` steps of 2^exponent.
    """

    version: Literal[2] = 2
    seed: Sha256
    """32 bytes in hexadecimal."""
    exponent: Annotated[int, Field(ge=-100, le=60)]
    steps: Annotated[int, Field(ge=1, le=3 * 2**19)]


class BackwardRequest(Pass):
    """Repeats the forward request, with `cotangents [m, n, B, d]` float32 or, in their place, one share of noise.

    If the request names k layers, there is an axis of k before the last.
    """

    adapters: Annotated[list[Sha256], Field(min_length=1, max_length=4096)]  # pyright: ignore[reportGeneralTypeIssues]
    noise: NoiseShare | None = None


class BackwardResponse(Message):
    """Returns the tensor `gradients`: `[m, n, P]`, in the order of the adapters' weight vectors.

    They are float32, or float64 from servers that compute in float64.
    """

    fingerprint: Sha256
    retained: bool
    """Whether the server still had the forward pass in its cache."""


class TrunkRequest(Message):
    """Requests a pass of a cut model's trunk over packed hidden states (`blindtune.models.cut.parts`)."""

    up: Codec
    """Codec of the request's `hidden` and `cotangents`."""
    down: Codec
    """Codec of the response's tensors."""
    retain: bool = False
    """Whether the server keeps the autograd graph for a following backward request."""
    forward: Sha256 | None = None
    """Backward: SHA-256 of the forward request's body. With it, `hidden` may be left out as long as the server has the
    graph; if the server hasn't, it answers with the problem `graph-lost`."""


class TrunkResponse(Message):
    """Returns `hidden` or `gradients`, packed as in the request, in the codec `down` of the request.

    Gradients are rounded stochastically with random numbers derived from the request, so that equal requests give
    equal responses.
    """

    fingerprint: Sha256
    retained: bool = False
    """Backward: whether the server still had the forward pass in its cache."""


class PartFile(Message):
    """A part of a cut model that the client holds, with its weights under the whole model's names."""

    part: str
    config: str
    """The model's configuration in transformers, as JSON."""
    bottom: PositiveInt
    """Number of blocks in the bottom."""
    top: PositiveInt
    """Number of blocks in the top."""
    fingerprint: Sha256
    manifest: str | None = None
    """An emulator's signed manifest, as JSON (`blindtune.models.cut.emulator`)."""


class TunedPartsUpload(Message):
    """Uploads tuned parts of a cut model, to be used with its real trunk. Tensors have the names of a checkpoint's."""

    model: Name
    fingerprint: Sha256
    """Fingerprint of the model that the parts were tuned for."""
    scaling: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """LoRA's alpha / rank, if the tensors are LoRA matrices under PEFT's names. None if they are whole weights."""


class TunedPartsReceipt(Message):
    """Confirms uploaded tuned parts: their SHA-256 and their number of weights."""

    sha256: Sha256
    parameters: PositiveInt


class ScoreRequest(Message):
    """Requests the likelihood of each text's tokens from index `starts [B]` int32 on.

    The model uses the tuned parts, or its own weights if `tuned_parts` is None.
    """

    tuned_parts: Sha256 | None = Field(
        default=None, validation_alias=AliasChoices("tuned_parts", "plugin"), serialization_alias="plugin"
    )


class ScoreResponse(Message):
    """Returns `log_likelihoods [B]` float32, the sum of log p over each text's tokens from its start on, in nats; and
    `greedy [B]` uint8, 1 if the likeliest token at each of those positions is the text's own."""

    fingerprint: Sha256


class GenerateRequest(Message):
    """Requests a continuation of one text."""

    tuned_parts: Sha256 | None = Field(
        default=None, validation_alias=AliasChoices("tuned_parts", "plugin"), serialization_alias="plugin"
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=1024)] = 64
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Sampling temperature; 0 always picks the likeliest token."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class GenerateResponse(Message):
    """Returns `generated [T]` int32, without the prompt and without the end-of-text token that ends it."""

    fingerprint: Sha256


class CutInfo(Message):
    """Describes how a hosted decoder is cut. Clients may download its bottom and its top."""

    bottom: PositiveInt
    """Number of blocks in the bottom."""
    top: PositiveInt
    """Number of blocks in the top."""
    parts: list[str]
    """The parts that the route `parts/` offers: bottom, top, and emulator if there is one."""
    codecs: list[Codec] = list(CODECS)
    weights_shared: Annotated[float, Field(ge=0, le=1)]
    """Fraction of the model's weights that is in the bottom and the top."""


class ModelInfo(Message):
    """Describes a hosted model to clients: names and shapes of its layers, without weights."""

    name: Name
    architecture: Architecture
    model_type: str
    """The model family's name in transformers, e.g. `bert`. PEFT's default target modules depend on it."""
    hidden_size: PositiveInt
    layers: PositiveInt
    """Number of blocks."""
    states: PositiveInt = 1
    """Number of states that a readout can choose from: one more than there are blocks (of the decoder). Servers of
    earlier versions offer the last alone."""
    dtype: str
    modules: dict[str, tuple[PositiveInt, PositiveInt]]
    """Linear layers that adapters can target: name -> (out_features, in_features)."""
    peft_kinds: list[Literal["lora"]] = ["lora"]
    pooling: Pooling
    """The default pooling."""
    poolings: list[Pooling]
    token_type_ids: bool
    pad_token_id: int
    fingerprint: Sha256
    """SHA-256 over the names, dtypes, shapes and values of all weights."""
    base_model_name: str
    """Value of `base_model_name_or_path` in PEFT's configuration."""
    limits: Limits
    cut: CutInfo | None = Field(
        default=None, validation_alias=AliasChoices("cut", "split"), serialization_alias="split"
    )
    """How the model is cut, if clients may download its bottom and top; otherwise None."""


class ModelList(Message):
    """Lists the names of the models that a server hosts."""

    api_version: int = API_VERSION
    operator_id: str
    """Random id that a server draws when it starts. If two addresses have equal ids, they lead to one server."""
    models: list[str]


class TokenizerFile(Message):
    """The model's tokenizer, as JSON of the `tokenizers` library."""

    tokenizer: str
    sha256: Sha256
