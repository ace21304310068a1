"""A hosted model as a torch module: the user's loop is unchanged, and so are the numbers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from blindtune.client import Backbone, OperatorPool, PlainChannel, RemoteBatch
from blindtune.errors import ConfigError, EmptyBatch, InvalidTensor, SequenceTooLong, UnknownReadout
from blindtune.models import find_source
from tests.client.faults import faulty_proxy
from tests.conftest import Server
from tests.models.test_lora import error
from tests.tiny import HIDDEN

Connect = Callable[..., Backbone]
LAYERS = ["query", "key", "value", "dense"]


def awake(backbone: Backbone, count: int = 1) -> Backbone:
    """Adapters as in the middle of training: B is away from zero."""
    generator = torch.Generator().manual_seed(0)
    backbone.set_adapters(count, generator=generator)
    with torch.no_grad():
        for adapter in backbone.lora_adapters():
            for _, b in adapter.named_matrices().values():
                b.normal_(std=0.02, generator=generator)
    return backbone


class Local(nn.Module):
    """Stock PEFT in this process, from the checkpoint that our adapter writes."""

    def __init__(self, backbone: Backbone, index: int, folder: Path, source: str) -> None:
        super().__init__()
        self.remote, self.adapter = [backbone], backbone.lora_adapters()[index]  # a list hides it from torch
        self.adapter.save_pretrained(folder)
        self.peft = PeftModel.from_pretrained(AutoModel.from_pretrained(source), str(folder), is_trainable=True).eval()

    def forward(self, texts: list[Any]) -> Tensor:
        (remote,) = self.remote
        tokens = remote.tokenizer.pad(remote.rows(texts))
        mask = (torch.arange(tokens.input_ids.shape[1]) < tokens.lengths[:, None]).long()
        arguments = {"input_ids": tokens.input_ids.long(), "attention_mask": mask}
        if tokens.token_type_ids is not None:
            arguments["token_type_ids"] = tokens.token_type_ids.long()
        hidden = self.peft(**arguments).last_hidden_state
        if remote.pooling == "cls":
            return hidden[:, 0]
        return hidden if remote.pooling == "none" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def pairs(self, what: Callable[[Tensor], Tensor | None] = lambda p: p.grad) -> tuple[Tensor, Tensor]:
        """(ours, PEFT's), all parameters of the adapter as one vector."""
        named = dict(self.peft.named_parameters())
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for name, matrices in self.adapter.named_matrices().items():
            for part, matrix in zip(("lora_A", "lora_B"), matrices, strict=True):
                for found, store in (
                    (what(matrix), ours),
                    (what(named[f"base_model.model.{name}.{part}.default.weight"]), theirs),
                ):
                    assert found is not None
                    store.append(found.detach().flatten())
        return torch.cat(ours), torch.cat(theirs)

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.peft.parameters() if parameter.requires_grad]


class TestRemoteEqualsLocal:
    """Over two real servers, on real text."""

    @pytest.mark.parametrize("count", [1, 3])
    def test_hidden_states_and_gradients(
        self, count: int, two_servers: list[Server], connect: Connect, film_sentences: list[str], tmp_path: Path
    ):
        backbone = connect(two_servers, adapter=LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS), max_length=48)
        awake(backbone, count)
        local = [Local(backbone, i, tmp_path / str(i), find_source("minilm").location) for i in range(count)]
        for step in range(2):  # one at each operator
            texts = film_sentences[8 * step : 8 * step + 8]
            hidden = backbone.all_adapters(texts)
            cotangent = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(step))
            backbone.zero_grad()
            hidden.backward(cotangent)
            for i, model in enumerate(local):
                expected = model(texts)
                model.peft.zero_grad()
                expected.backward(cotangent[i])
                assert error(hidden[i], expected) <= 1e-5
                assert error(*model.pairs()) <= 1e-5

    def test_pairs_of_texts_too(
        self, two_servers: list[Server], connect: Connect, film_sentences: list[str], tmp_path: Path
    ):
        backbone = awake(connect(two_servers, max_length=48))
        local = Local(backbone, 0, tmp_path, find_source("minilm").location)
        pairs = list(zip(film_sentences[:5], film_sentences[5:10], strict=True))
        assert error(backbone(pairs), local(pairs)) <= 1e-5
        swapped = [(b, a) for a, b in pairs]
        assert error(backbone(swapped), local(pairs)) > 1e-2

    def test_the_checkpoint_gives_stock_peft_the_same_hidden_states(
        self, two_servers: list[Server], connect: Connect, film_examples: Any, tmp_path: Path
    ):
        """After real training steps, loaded with PEFT alone."""
        backbone = connect(two_servers, adapter=LoraConfig(r=4, target_modules=["query", "value"]), max_length=32)
        head = nn.Linear(backbone.hidden_size, 2)
        optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=5e-3)
        texts, labels = film_examples.texts[:16], torch.tensor(film_examples.labels[:16])
        before = backbone.infer(texts)[0]
        for _ in range(3):
            F.cross_entropy(head(backbone(texts)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = backbone.infer(texts)[0]
        assert error(after, before) > 1e-3
        local = Local(backbone, 0, tmp_path, find_source("minilm").location)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert error(after, local(texts)) <= 1e-5


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01)


def lbfgs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3, history_size=4)


class TestAnyLoop:
    """The same plain loop over the hosted model and over stock PEFT ends with the same weights."""

    @pytest.mark.parametrize("make", [adam, sgd, lbfgs])
    def test_any_optimizer_head_and_loss(
        self, make: Callable[..., torch.optim.Optimizer], tiny_server: Server, connect: Connect, film_examples: Any,
        tiny_models: dict[str, Path], tmp_path: Path,
    ):  # fmt: skip
        config = LoraConfig(r=4, target_modules=["query", "dense"])
        backbone = awake(connect(tiny_server, model="bert", adapter=config, max_length=16))
        local = Local(backbone, 0, tmp_path, str(tiny_models["bert"]))
        start = local.pairs(lambda p: p)[0].clone()

        def train(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
            torch.manual_seed(0)
            head = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 8), nn.GELU(), nn.Linear(8, 1))
            optimizer = make([*parameters, *head.parameters()])
            losses: list[float] = []
            for step in range(4):
                rows = slice(8 * step, 8 * step + 8)
                target = torch.tensor(film_examples.labels[rows]).float()

                def closure(rows: slice = rows, target: Tensor = target) -> Tensor:
                    optimizer.zero_grad()
                    loss = F.binary_cross_entropy_with_logits(head(model(film_examples.texts[rows])).squeeze(1), target)
                    loss.backward()
                    return loss

                losses.append(optimizer.step(closure).item())
            return losses

        remote_losses = train(backbone, list(backbone.parameters()))
        local_losses = train(local, local.trainable())
        ours, theirs = local.pairs(lambda p: p)
        assert remote_losses == pytest.approx(local_losses, rel=1e-4)
        assert error(ours - start, theirs - start) <= 1e-3
        assert float((ours - start).norm()) > 0

    def test_a_loss_on_every_token(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str], tiny_models: dict[str, Path],
        tmp_path: Path,
    ):  # fmt: skip
        backbone = awake(connect(tiny_server, model="bert", pooling="none", max_length=16))
        local = Local(backbone, 0, tmp_path, str(tiny_models["bert"]))
        texts = film_sentences[:3]
        for model in (backbone, local):
            model(texts)[:, :5].square().mean().backward()
        assert backbone(texts).ndim == 3
        assert error(*local.pairs()) <= 1e-5

    def test_a_second_backward_pass_through_one_forward_pass(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = awake(connect(tiny_server, model="bert", max_length=16))
        hidden = backbone(film_sentences[:3])
        first = torch.autograd.grad(hidden.sum(), list(backbone.parameters()), retain_graph=True)
        second = torch.autograd.grad(hidden.sum(), list(backbone.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_two_batches_at_once(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        """Gradients of a sum are the sum of gradients, whichever order the graphs are asked for in."""
        backbone = awake(connect(tiny_server, model="bert", max_length=16))
        parameters = list(backbone.parameters())
        halves = [film_sentences[:3], film_sentences[3:6]]
        alone = [torch.autograd.grad(backbone(texts).square().sum(), parameters) for texts in halves]
        together = torch.autograd.grad(sum(backbone(texts).square().sum() for texts in halves), parameters)
        for a, b, both in zip(*alone, together, strict=True):
            assert torch.allclose(a + b, both, atol=1e-4)

    def test_parameters_that_need_no_gradient_get_none(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = awake(connect(tiny_server, model="bert", max_length=16))
        backbone(film_sentences[:3]).sum().backward()
        expected = [p.grad for p in backbone.parameters()]
        backbone.zero_grad()
        frozen = {id(a) for a, _ in backbone.lora_adapters()[0].named_matrices().values()}
        for parameter in backbone.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
        backbone(film_sentences[:3]).sum().backward()
        for parameter, gradient in zip(backbone.parameters(), expected, strict=True):
            if id(parameter) in frozen:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None
                assert gradient is not None
                assert torch.equal(parameter.grad, gradient)

    def test_without_gradient_nothing_is_kept_and_no_step_is_counted(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = awake(connect(tiny_server, model="bert", max_length=16))
        with torch.no_grad():
            hidden = backbone(film_sentences[:3])
        assert (hidden.requires_grad, backbone.steps) == (False, 0)
        assert torch.equal(backbone(film_sentences[:3]).detach(), hidden)
        assert backbone.steps == 1

    def test_dropout_comes_with_a_seed_and_only_with_it(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        config = LoraConfig(r=4, lora_dropout=0.4)
        backbone = awake(connect(tiny_server, model="bert", adapter=config, max_length=16))

        def outcome(seed: int | None) -> list[Tensor]:
            hidden = backbone(film_sentences[:3], seed=seed)
            return [hidden.detach(), *torch.autograd.grad(hidden.sum(), list(backbone.parameters()))]

        plain, seeded = outcome(None), outcome(7)
        assert all(torch.equal(a, b) for a, b in zip(outcome(None), plain, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(outcome(7), seeded, strict=True))
        assert not torch.equal(seeded[0], plain[0])
        assert not torch.equal(outcome(8)[0], seeded[0])


class Everyone(PlainChannel):
    """The true gradient to all operators at once; the mean of their answers."""

    def choose(self, operators: int, step: int) -> tuple[int, ...]:
        return tuple(range(operators))

    def gradients(self, cotangent: Tensor, batch: RemoteBatch, pool: OperatorPool) -> Tensor:
        calls = [lambda i=i: batch.backward(pool, i, cotangent.unsqueeze(0))[0] for i in batch.operators]
        return torch.stack(pool.parallel(calls)).mean(0)


class TestWhatIsSent:
    def test_adapters_go_once_in_each_step_to_each_operator(
        self, two_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(two_servers, num_adapters=2, channel=Everyone(), max_length=32)
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01)
        before = [server.answered() for server in two_servers]
        for step in range(3):
            backbone(film_sentences[4 * step : 4 * step + 4]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for server, earlier in zip(two_servers, before, strict=True):
            grown = server.answered() - earlier
            assert (grown["{sha256}"], grown["forward"], grown["backward"]) == (6, 3, 3)

    def test_hidden_states_come_from_one_operator_and_backward_finds_the_graph_at_each(
        self, two_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(two_servers, channel=Everyone(), max_length=32)
        before = [server.metrics() for server in two_servers]
        hidden = backbone(film_sentences[:16])
        hidden.sum().backward()
        sent = []
        for server, earlier in zip(two_servers, before, strict=True):
            after = server.metrics()
            name = 'blindtune_sent_bytes_total{route="/v1/models/{model}/forward"}'
            sent.append(after[name] - earlier.get(name, 0))
            kept = 'blindtune_graphs_total{result="retained"}'
            assert after[kept] - earlier.get(kept, 0) == 1
        raw = hidden.numel() * 4
        assert raw <= sent[0] < 1.05 * raw
        assert sent[1] < 1000

    def test_over_a_fixed_a_only_b_travels_and_nothing_else_is_different(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        """Against the same A sent along."""
        config = LoraConfig(r=4, target_modules=LAYERS)
        short, whole = (connect(tiny_server, model="bert", adapter=config, max_length=16) for _ in range(2))
        awake(whole, 2)
        short.set_adapters(2, a_seed="5a" * 32)
        with torch.no_grad():
            for ours, theirs in zip(short.lora_adapters(), whole.lora_adapters(), strict=True):
                for name, (a, b) in ours.named_matrices().items():
                    b.copy_(theirs.named_matrices()[name][1])
                    theirs.named_matrices()[name][0].copy_(a)
        sizes: list[int] = []
        hidden: list[Tensor] = []
        for backbone in (short, whole):
            before = backbone.traffic
            hidden.append(backbone(film_sentences[:4]))
            hidden[-1].square().sum().backward()
            sizes.append(backbone.traffic.sent + backbone.traffic.received - before.sent - before.received)
            assert torch.equal(backbone.infer(film_sentences[:4]), hidden[-1].detach())
        assert torch.equal(*hidden)
        saved = sum(a.numel() for adapter in short.lora_adapters() for a, _ in adapter.named_matrices().values())
        assert sizes[1] - sizes[0] == pytest.approx(2 * 4 * saved, rel=0.01)  # neither A nor its gradient
        for ours, theirs in zip(short.lora_adapters(), whole.lora_adapters(), strict=True):
            for name, (a, b) in ours.named_matrices().items():
                assert a.grad is None
                assert b.grad is not None
                assert torch.equal(b.grad, theirs.named_matrices()[name][1].grad)
        short.set_adapters(0, a_seed="5a" * 32)
        assert torch.equal(short(film_sentences[:4]), short.frozen(film_sentences[:4]))

    def test_plain_gradients_alternate_between_operators(
        self, two_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(two_servers, max_length=32)
        for step in range(4):
            before = [server.answered()["backward"] for server in two_servers]
            backbone(film_sentences[:2]).sum().backward()
            after = [server.answered()["backward"] for server in two_servers]
            assert [b - a for a, b in zip(before, after, strict=True)] == [step % 2 == 0, step % 2 == 1]

    def test_traffic_counts_every_message_once(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        with faulty_proxy(tiny_server.port) as proxy:
            backbone = connect(proxy.url, model="bert", max_length=16)
            backbone(film_sentences[:4]).sum().backward()
            backbone.close()
        sent, received = (sum(map(len, messages)) for messages in (proxy.requests, proxy.answers))
        traffic = backbone.traffic
        assert (traffic.sent, traffic.received, traffic.requests) == (sent, received, len(proxy.requests))

    def test_texts_never_leave_as_text(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        text = max(film_sentences[:50], key=len)
        with faulty_proxy(tiny_server.port) as proxy:
            backbone = connect(proxy.url, model="bert", max_length=32)
            backbone([text]).sum().backward()
            backbone.close()
        words = [word.encode() for word in text.split() if len(word) > 6]
        assert words
        assert not any(word in request for word in words for request in proxy.requests)


class TestInference:
    def test_many_texts_of_all_lengths_come_back_in_their_order(
        self, two_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        backbone = awake(connect(two_servers, max_length=64), 2)
        texts = film_sentences[:90]
        told: list[int] = []
        backbone.on_infer = told.append
        before = [server.answered()["forward"] for server in two_servers]
        hidden = backbone.infer(texts)
        after = [server.answered()["forward"] for server in two_servers]
        assert hidden.shape == (2, 90, 384)
        assert all(b > a for a, b in zip(before, after, strict=True)), "both operators worked"
        assert sum(told) == 90
        assert len(told) == sum(after) - sum(before)
        assert not hidden.requires_grad
        with torch.no_grad():
            for i in (0, 17, 89):
                assert error(hidden[:, i], backbone.all_adapters([texts[i]])[:, 0]) <= 1e-5

    def test_frozen_asks_for_each_text_once(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        backbone = awake(connect(tiny_server, model="bert", max_length=16))
        told: list[int] = []
        backbone.on_infer = told.append
        texts = film_sentences[:6]
        first = backbone.frozen([*texts, *texts])
        assert sum(told) == 6, "a text that occurs twice is sent once"
        assert torch.equal(first[:6], first[6:])
        requests = backbone.traffic.requests
        assert torch.equal(backbone.frozen(texts[::-1]), first[:6].flip(0))
        assert backbone.traffic.requests == requests
        backbone.frozen([*texts, film_sentences[7]])
        assert sum(told) == 7
        assert backbone.frozen([]).shape == (0, HIDDEN)

    def test_frozen_is_the_model_without_adapters(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = awake(connect(tiny_server, model="bert", max_length=16))
        frozen = backbone.frozen(film_sentences[:6])
        assert error(frozen, backbone(film_sentences[:6])) > 1e-4
        backbone.set_adapters(0)
        assert list(backbone.parameters()) == []
        assert torch.equal(backbone(film_sentences[:6]), frozen)
        assert torch.equal(backbone.infer(film_sentences[:6])[0], frozen)

    def test_frozen_vectors_do_not_change_when_the_caller_changes_them(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(tiny_server, model="bert", max_length=16)
        first = backbone.frozen(film_sentences[:2])
        kept = first.clone()
        first.zero_()
        assert torch.equal(backbone.frozen(film_sentences[:2]), kept)

    @pytest.mark.parametrize("adapters", [0, 2])
    def test_every_position_of_texts_of_all_lengths(
        self, adapters: int, tiny_server: Server, connect: Connect, film_sentences: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        """Positions behind a text's end are zero."""
        monkeypatch.setattr("blindtune.client.backbone.INFERENCE_TOKENS", 40)
        backbone = awake(connect(tiny_server, model="bert", pooling="none", max_length=60), adapters)
        texts = film_sentences[:12]
        lengths = [len(row) for row in backbone.rows(texts)]
        assert len(set(lengths)) > 3
        hidden = backbone.infer(texts)
        assert hidden.shape == (max(1, adapters), 12, max(lengths), HIDDEN)
        with torch.no_grad():
            for i, length in enumerate(lengths):
                alone = backbone.all_adapters([texts[i]])
                assert error(hidden[:, i, :length], alone[:, 0]) <= 1e-5
                assert torch.count_nonzero(hidden[:, i, length:]) == 0
        frozen = backbone.frozen(texts)
        assert frozen.shape == (12, max(lengths), HIDDEN)
        assert backbone.frozen(texts[:1]).shape == (1, lengths[0], HIDDEN)


class Pairs(PlainChannel):
    """Both operators of a pair answer; their mean counts."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def teams(self, operators: int) -> list[tuple[int, ...]]:
        return [(first, first + 1) for first in range(0, operators - 1, 2)]

    def hidden(self, batch: RemoteBatch, pool: OperatorPool, *, retain: bool) -> Tensor:
        self.asked.append(batch.operators)
        answers = pool.parallel([lambda i=i: batch.forward(pool, i, retain=retain) for i in batch.operators])
        assert all(answer is not None for answer in answers)
        return torch.stack(answers).mean(0)  # type: ignore[arg-type]


class TestTeams:
    """Operators that answer one request together, over four of them."""

    @pytest.mark.timeout(120)
    def test_inference_uses_all_teams_at_the_same_time(
        self, four_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        channel = Pairs()
        backbone = awake(connect(four_servers, max_length=32, channel=channel), 2)
        before = [server.answered()["forward"] for server in four_servers]
        hidden = backbone.infer(film_sentences[:60])
        grown = [server.answered()["forward"] - b for server, b in zip(four_servers, before, strict=True)]
        assert set(channel.asked) == {(0, 1), (2, 3)}
        assert grown == [channel.asked.count(team) for team in ((0, 1), (0, 1), (2, 3), (2, 3))]
        plain = connect(four_servers, max_length=32)
        plain.adapters = backbone.adapters
        assert error(hidden, plain.infer(film_sentences[:60])) <= 1e-5

    @pytest.mark.timeout(120, method="thread")
    def test_of_many_threads_never_wait_for_each_other(
        self, four_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        """As in a web service: more callers than the pool has threads, each with calls inside calls."""
        backbone = awake(connect(four_servers, max_length=32, channel=Pairs()))
        expected = backbone.infer(film_sentences[:8])
        with ThreadPoolExecutor(12) as callers:
            answers = list(callers.map(lambda _: backbone.infer(film_sentences[:8]), range(24)))
        assert all(error(answer, expected) <= 1e-5 for answer in answers)

    @pytest.mark.timeout(120)
    def test_one_pass_without_gradient_goes_to_one_team_and_the_next_step_to_the_next(
        self, four_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        channel = Pairs()
        backbone = awake(connect(four_servers, max_length=32, channel=channel))
        for _ in range(3):
            with torch.no_grad():
                backbone(film_sentences[:2])
            backbone(film_sentences[:2])
        assert channel.asked == [(0, 1), (0,), (2, 3), (1,), (0, 1), (2,)]

    def test_frozen_features_and_plain_inference_use_each_operator_by_itself(
        self, four_servers: list[Server], connect: Connect, film_sentences: list[str]
    ):
        for channel in (Pairs(), PlainChannel()):
            backbone = awake(connect(four_servers, max_length=32, channel=channel))
            before = [server.answered()["forward"] for server in four_servers]
            if isinstance(channel, Pairs):
                backbone.frozen(film_sentences[:40])
            else:
                assert channel.teams(4) == [(0,), (1,), (2,), (3,)]
                backbone.infer(film_sentences[:40])
            after = [server.answered()["forward"] for server in four_servers]
            assert all(b > a for a, b in zip(before, after, strict=True))


class TestOptions:
    def test_the_model_describes_itself(self, two_servers: list[Server], connect: Connect):
        backbone = connect(two_servers)
        assert (backbone.hidden_size, backbone.pooling, backbone.max_length) == (384, "mean", 128)
        assert backbone.num_adapters == 1
        names = set(backbone.lora_adapters()[0].named_matrices())
        assert {name.rsplit(".", 1)[-1] for name in names} == {"query", "value"}, "PEFT's defaults for BERT"

    def test_several_adapters_make_one_more_axis(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(tiny_server, model="bert", num_adapters=3, max_length=16)
        assert backbone(film_sentences[:4]).shape == (3, 4, HIDDEN)
        vectors = [adapter.vector() for adapter in backbone.lora_adapters()]
        assert not torch.equal(vectors[0], vectors[1])

    def test_token_rows_pass_through(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        backbone = connect(tiny_server, model="bert", max_length=16)
        rows = backbone.rows(film_sentences[:4])
        assert backbone.rows(rows) == rows
        assert torch.equal(backbone(rows), backbone(film_sentences[:4]))

    def test_a_token_for_each_server_or_one_for_all(self, two_servers: list[Server], connect: Connect):
        with pytest.raises(ConfigError, match="3 tokens for 2 servers"):
            connect(two_servers, token=["a", "b", "c"])
        for given, expected in ((["a", "b"], ["Bearer a", "Bearer b"]), ("a", ["Bearer a", "Bearer a"])):
            operators = connect(two_servers, token=given).pool.operators
            assert [o.transport._http.headers["authorization"] for o in operators] == expected

    def test_a_pooling_that_is_not_offered_is_refused_by_name(self, tiny_server: Server, connect: Connect):
        with pytest.raises(UnknownReadout, match="'last'") as caught:
            connect(tiny_server, model="bert", pooling="last")
        assert "cls, mean, max, none" in caught.value.remedy

    @pytest.mark.parametrize("max_length", [0, -1, 65])
    def test_a_length_that_the_model_does_not_take_is_refused(
        self, max_length: int, tiny_server: Server, connect: Connect
    ):
        with pytest.raises(SequenceTooLong, match=rf"max_length is {max_length}.*1 to 64"):
            connect(tiny_server, model="bert", max_length=max_length)

    def test_texts_are_cut_at_max_length(self, tiny_server: Server, connect: Connect, film_sentences: list[str]):
        backbone = connect(tiny_server, model="bert", max_length=7)
        assert max(len(row) for row in backbone.rows(film_sentences[:20])) == 7

    def test_no_texts_are_refused(self, tiny_server: Server, connect: Connect):
        backbone = connect(tiny_server, model="bert")
        with pytest.raises(EmptyBatch):
            backbone([])
        with pytest.raises(EmptyBatch):
            backbone.infer([])

    def test_one_text_in_place_of_a_list_is_refused(self, tiny_server: Server, connect: Connect):
        """It would be taken for a batch of letters."""
        with pytest.raises(ConfigError, match="list"):
            connect(tiny_server, model="bert")("a fine film")  # type: ignore[arg-type]

    def test_adapters_in_another_precision_are_refused(
        self, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(tiny_server, model="bert", max_length=16).half()
        with pytest.raises(InvalidTensor, match=r"'weights' has dtype torch\.float16") as caught:
            backbone(film_sentences[:2])
        assert "float32" in caught.value.remedy

    @pytest.mark.parametrize("name", ["roberta", "deberta", "deberta-conv", "t5", "llama", "opt"])
    def test_every_architecture_trains(
        self, name: str, tiny_server: Server, connect: Connect, film_sentences: list[str]
    ):
        backbone = connect(tiny_server, model=name, num_adapters=2, max_length=16)
        optimizer = torch.optim.Adam(backbone.parameters(), lr=0.02)
        torch.manual_seed(0)
        target = torch.randn(4, backbone.hidden_size)
        losses: list[float] = []
        for _ in range(4):
            loss = (backbone(film_sentences[:4]) - target).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
