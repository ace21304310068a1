"""What crosses the network, and nothing else: messages, their bytes, their limits, and recordings of them."""

from blindtune.wire.codec import check_finite, check_tensor, decode, encode
from blindtune.wire.limits import Limits
from blindtune.wire.schema import (
    API_VERSION,
    MEDIA_TYPE,
    AdapterReceipt,
    AdapterUpload,
    Architecture,
    BackwardRequest,
    BackwardResponse,
    ForwardRequest,
    ForwardResponse,
    LoraSpec,
    ModelInfo,
    ModelList,
    NoiseShare,
    Pooling,
    TokenizerFile,
)
from blindtune.wire.transcript import Event, RecordedModel, Recording, Transcript, TranscriptWriter

__all__ = [
    "API_VERSION",
    "MEDIA_TYPE",
    "AdapterReceipt",
    "AdapterUpload",
    "Architecture",
    "BackwardRequest",
    "BackwardResponse",
    "Event",
    "ForwardRequest",
    "ForwardResponse",
    "Limits",
    "LoraSpec",
    "ModelInfo",
    "ModelList",
    "NoiseShare",
    "Pooling",
    "RecordedModel",
    "Recording",
    "TokenizerFile",
    "Transcript",
    "TranscriptWriter",
    "check_finite",
    "check_tensor",
    "decode",
    "encode",
]
