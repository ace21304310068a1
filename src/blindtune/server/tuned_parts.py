"""Scores and generates texts with a hosted model and the tuned parts that clients have deployed.

The provider sees the texts in these requests. The tuned parts depend on the data that they were tuned on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blindtune.errors import BodyTooLarge, UnknownPart, UnknownTunedParts
from blindtune.models import FrozenBackbone, Tokens
from blindtune.models.cut.merge import with_tuned_parts
from blindtune.models.cut.parts import answer_scores, padding_mask
from blindtune.server.cache import ByteLRU
from blindtune.wire import GenerateRequest, TunedPartsReceipt, TunedPartsUpload


class TunedPartsStore:
    """Stores the tuned parts of all tenants, up to `capacity` bytes. Safe to use from several threads."""

    def __init__(self, capacity: int) -> None:
        self._kept = ByteLRU[tuple[str, str, str], nn.Module](capacity)

    def put(
        self, tenant: str, sha256: str, backbone: FrozenBackbone, upload: TunedPartsUpload, tensors: dict[str, Tensor]
    ) -> TunedPartsReceipt:
        """Checks tuned parts, merges them into the weights of their blocks, and stores the result.

        Args:
            sha256: SHA-256 of the upload, under which `causal` finds the tuned parts.
            tensors: the tensors of a checkpoint, by name.
        Raises:
            UnknownPart: the model isn't cut, or the parts were tuned for other weights.
            InvalidTensor: the tensors don't fit the model.
            BodyTooLarge: the merged blocks have more than `capacity` bytes.
        """
        cut_model = backbone.require_cut()
        if upload.fingerprint != backbone.fingerprint:
            raise UnknownPart(
                f"These ends were tuned for other weights (fingerprint {upload.fingerprint[:12]}…) than are hosted "
                f"here ({backbone.fingerprint[:12]}…).",
                remedy="Tune the parts again, for this model.",
            )
        causal = with_tuned_parts(cut_model, tensors, upload.scaling)
        shared = {id(parameter) for parameter in cut_model.causal.parameters()}
        nbytes = sum(p.nbytes for p in causal.parameters() if id(p) not in shared)
        if not self._kept.put((tenant, upload.model, sha256), causal, nbytes):
            raise BodyTooLarge(f"Tuned ends of {nbytes} bytes are larger than the cache.", remedy="Tune with LoRA.")
        return TunedPartsReceipt(sha256=sha256, parameters=sum(tensor.numel() for tensor in tensors.values()))

    def causal(self, tenant: str, model: str, backbone: FrozenBackbone, name: str | None) -> Any:
        """Returns the whole causal model with a tenant's tuned parts, or the pretrained one if `name` is None.

        Args:
            name: SHA-256 of the upload.
        Raises:
            UnknownPart: the model isn't cut.
            UnknownTunedParts: the tenant hasn't uploaded these parts, or the store has dropped them for others.
        """
        if name is None:
            return backbone.require_cut().causal
        kept = self._kept.get((tenant, model, name))
        if kept is None:
            raise UnknownTunedParts(f"No tuned ends {name[:12]}… for {model!r} are here.", remedy="Upload them again.")
        return kept


def score_texts(causal: Any, backbone: FrozenBackbone, tokens: Tokens, starts: Tensor) -> dict[str, Tensor]:
    """Computes the likelihood of each text's tokens from its start on.

    Args:
        causal: the whole causal model, on the backbone's device.
        tokens: B texts.
        starts: index of the first scored token of each text, `(B,)` int32; at least 1 and below the text's length.
    Returns:
        On the CPU: `log_likelihoods (B,)` float32, the sum of log p of the scored tokens in nats, and `greedy (B,)`
        uint8, 1 if greedy decoding would generate all of them.
    """
    ids, lengths = (t.to(backbone.device, torch.long) for t in (tokens.input_ids, tokens.lengths))
    mask = padding_mask(lengths, ids.shape[1])
    place = torch.arange(ids.shape[1], device=ids.device)
    scored = (place >= starts.to(ids.device).unsqueeze(1)) & mask.bool()
    with torch.no_grad():
        hidden = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits = causal.lm_head(hidden[:, :-1][scored[:, 1:]])  # for the scored tokens only, as a vocabulary is large
        likelihoods, greedy = answer_scores(logits, ids[scored], scored.sum(1))
    return {"log_likelihoods": likelihoods.cpu(), "greedy": greedy.to(torch.uint8).cpu()}


def generate_tokens(causal: Any, backbone: FrozenBackbone, input_ids: Tensor, request: GenerateRequest) -> Tensor:
    """Generates a continuation of one text, `input_ids (1, L)`.

    Returns:
        The new tokens `(T,)` int32 on the CPU, up to but without the end-of-text token.
    """
    ids = input_ids.to(backbone.device, torch.long)
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
    return _before_end(written[0, ids.shape[1] :].tolist(), backbone.config.eos_token_id)


def _before_end(tokens: list[int], end: int | list[int] | None) -> Tensor:
    ends = end if isinstance(end, list) else [end]
    kept = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return torch.tensor(tokens[:kept], dtype=torch.int32)
