"""Tuned ends that clients hand over, around the real trunk: scoring and generation with the whole model.

Whoever asks here shows the provider texts, and the uploaded ends depend on what they were tuned on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blindtune.errors import (
    BodyTooLarge,
    InvalidTensor,
    SequenceTooLong,
    UnknownPart,
    UnknownPlugin,
)
from blindtune.models import FrozenBackbone, Tokens
from blindtune.models.plugged import plug_in
from blindtune.models.split import SplitModel, answer_scores, padding_mask
from blindtune.server.cache import ByteLRU
from blindtune.wire import (
    GenerateRequest,
    GenerateResponse,
    Limits,
    PluginReceipt,
    PluginUpload,
    ScoreResponse,
    check_tensor,
    decode,
    encode,
)

MAX_TENSORS = 4096


class Plugins:
    """Tuned ends of all tenants, up to a number of bytes. Scoring and generation run on the model's thread."""

    def __init__(self, capacity: int, limits: Limits) -> None:
        self._limits = limits
        self._kept = ByteLRU[tuple[str, str, str], nn.Module](capacity)

    def decode(self, body: bytes) -> tuple[PluginUpload, dict[str, Tensor]]:
        """Tuned ends as they come: a tensor or two for each layer, so more of them than other messages have."""
        return decode(body, PluginUpload, self._limits.model_copy(update={"max_tensors": MAX_TENSORS}))

    def put(
        self, tenant: str, sha256: str, backbone: FrozenBackbone, upload: PluginUpload, tensors: dict[str, Tensor]
    ) -> PluginReceipt:
        """Checks tuned ends and keeps them, merged into the weights of their blocks.

        Raises:
            UnknownPart: they were tuned for another model.
            InvalidTensor: they don't fit its ends.
            BodyTooLarge: more bytes than all plug-ins may have.
        """
        split = _split(backbone)
        if upload.fingerprint != backbone.fingerprint:
            raise UnknownPart(
                f"These ends were tuned for other weights (fingerprint {upload.fingerprint[:12]}…) than are hosted "
                f"here ({backbone.fingerprint[:12]}…).",
                remedy="Tune them again, for this model.",
            )
        causal = plug_in(split, tensors, upload.scaling)
        shared = {id(parameter) for parameter in split.causal.parameters()}
        nbytes = sum(p.nbytes for p in causal.parameters() if id(p) not in shared)
        if not self._kept.put((tenant, upload.model, sha256), causal, nbytes):
            raise BodyTooLarge(f"Tuned ends of {nbytes} bytes are larger than the cache.", remedy="Tune with LoRA.")
        return PluginReceipt(sha256=sha256, parameters=sum(tensor.numel() for tensor in tensors.values()))

    def causal(self, tenant: str, model: str, backbone: FrozenBackbone, plugin: str | None) -> Any:
        """The whole model, with a tenant's ends or (without a name) as it is. Raises `UnknownPlugin`."""
        if plugin is None:
            return _split(backbone).causal
        kept = self._kept.get((tenant, model, plugin))
        if kept is None:
            raise UnknownPlugin(f"No tuned ends {plugin[:12]}… for {model!r} are here.", remedy="Upload them again.")
        return kept

    def score(self, causal: Any, backbone: FrozenBackbone, tokens: Tokens, starts: Tensor) -> bytes:
        """log p of each text's tokens from its start on."""
        check_tensor({"starts": starts}, "starts", (len(tokens),), torch.int32)
        if bool((starts < 1).any()) or bool((starts >= tokens.lengths).any()):
            raise InvalidTensor("A start outside its text, or at its first token.", remedy="Send 1 ≤ start < length.")
        ids, lengths = (t.to(backbone.device, torch.long) for t in (tokens.input_ids, tokens.lengths))
        mask = padding_mask(lengths, ids.shape[1])
        place = torch.arange(ids.shape[1], device=ids.device)
        learned = (place >= starts.to(ids.device).unsqueeze(1)) & mask.bool()  # of the tokens themselves
        with torch.no_grad():
            hidden = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = causal.lm_head(hidden[:, :-1][learned[:, 1:]])  # of learned tokens alone: V is large
            likelihoods, greedy = answer_scores(logits, ids[learned], learned.sum(1))
        sent = {"log_likelihoods": likelihoods.cpu(), "greedy": greedy.to(torch.uint8).cpu()}
        return encode(ScoreResponse(fingerprint=backbone.fingerprint), sent)

    def generate(self, causal: Any, backbone: FrozenBackbone, tokens: Tokens, request: GenerateRequest) -> bytes:
        """Goes on with one text."""
        if len(tokens) != 1:
            raise InvalidTensor(f"{len(tokens)} texts to go on with.", remedy="Send one at a time.")
        room = min(self._limits.max_length, backbone.max_length)
        if tokens.input_ids.shape[1] + request.max_new_tokens > room:
            raise SequenceTooLong(
                f"{tokens.input_ids.shape[1]} tokens and {request.max_new_tokens} new ones; the limit is {room}.",
                remedy="Ask for fewer, or shorten the text.",
            )
        ids = tokens.input_ids.to(backbone.device, torch.long)
        sampled = request.temperature > 0
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(request.seed)
            written: Tensor = causal.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_new_tokens,
                pad_token_id=backbone.pad_token_id,
                do_sample=sampled,
                **({"temperature": request.temperature} if sampled else {}),
            )
        new = written[0, ids.shape[1] :].tolist()
        end = backbone.config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        kept = next((i for i, token in enumerate(new) if token in ends), len(new))
        generated = torch.tensor(new[:kept], dtype=torch.int32)
        return encode(GenerateResponse(fingerprint=backbone.fingerprint), {"generated": generated})


def _split(backbone: FrozenBackbone) -> SplitModel:
    assert backbone.split is not None  # noqa: S101 - `Host.split_backbone` has checked
    return backbone.split
