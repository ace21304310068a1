"""The audit's only input: exactly what the client sent, no more and no less."""

from __future__ import annotations

import torch
from torch import Tensor

from blindtune.models import FrozenBackbone, Tokens
from blindtune.wire import Event
from tests.server.conftest import Ended


class TestRecord:
    def of_kind(self, ended: Ended, kind: str) -> list[tuple[Event, dict[str, Tensor]]]:
        transcript = ended.transcript
        return [(event, transcript.tensors(event)) for event in transcript.events if event.kind == kind]

    def assert_tokens(self, tensors: dict[str, Tensor], tokens: Tokens) -> None:
        assert all(torch.equal(tensors.pop(name), tensor) for name, tensor in tokens.tensors().items())

    def test_names_the_model_so_that_it_can_be_found_and_checked(self, ended: Ended, minilm: FrozenBackbone):
        recorded = ended.transcript.recording.models["minilm"]
        assert (recorded.source, recorded.dtype) == ("minilm", "float32")
        assert recorded.fingerprint == ended.info.fingerprint == minilm.fingerprint

    def test_has_the_events_in_the_order_in_which_they_came(self, ended: Ended):
        kinds = [event.kind for event in ended.transcript.events]
        assert kinds == ["adapter", "adapter", "forward", "forward", "backward", "forward", "forward"]
        assert [event.event for event in ended.transcript.events] == list(range(7))
        times = [event.time for event in ended.transcript.events]
        assert times == sorted(times)
        assert {event.tenant for event in ended.transcript.events} == {"anonymous"}

    def test_holds_the_adapters_weights(self, ended: Ended):
        for (event, tensors), adapter, upload in zip(
            self.of_kind(ended, "adapter"), ended.adapters, ended.uploads, strict=True
        ):
            assert (event.adapters, event.spec) == ([upload.sha256], adapter.layout.spec)
            assert tensors.keys() == {"weights"}
            assert torch.equal(tensors["weights"], adapter.vector().detach())

    def test_holds_tokens_and_the_hidden_states_that_were_sent_back(self, ended: Ended):
        (trained, tensors), (plain, plain_tensors), (silent, silent_tensors), (_, last) = self.of_kind(ended, "forward")
        assert trained.adapters == [upload.sha256 for upload in ended.uploads]
        assert (trained.pooling, trained.seed) == ("mean", 9)
        self.assert_tokens(tensors, ended.tokens)
        assert torch.equal(tensors.pop("hidden"), ended.hidden)
        assert tensors == {}
        assert (plain.adapters, plain.pooling, plain.seed) == ([], "cls", None)
        assert torch.equal(plain_tensors["hidden"], ended.frozen)
        assert "hidden" not in silent_tensors, "nothing was sent back"
        assert silent.adapters == trained.adapters
        self.assert_tokens(last, ended.last_tokens)
        assert len(last["hidden"][0]) == len(ended.last_tokens.lengths), "the request that was under way belongs to it"

    def test_holds_the_cotangents(self, ended: Ended):
        ((event, tensors),) = self.of_kind(ended, "backward")
        self.assert_tokens(tensors, ended.tokens)
        assert torch.equal(tensors.pop("cotangents"), ended.cotangents)
        assert tensors == {}
        assert event.adapters == [upload.sha256 for upload in ended.uploads]
        assert (event.pooling, event.seed) == ("mean", 9)
