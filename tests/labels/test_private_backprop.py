"""Private backpropagation through two real operators."""

import json
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import combinations

import pytest
import torch

from blindtune.client import Backbone, Timeout
from blindtune.errors import BudgetSpent, ConfigError, SingleOperator
from blindtune.labels import (
    P3EFT,
    PSLF,
    DistanceCorrelation,
    LinearHead,
    LoRA,
    PrivateBackprop,
    PrivateBackpropOptions,
    PrivateModel,
    RandomizedResponse,
    make_method,
)
from blindtune.lattice import Lattice, expand_noise
from blindtune.privacy.journal import JOURNAL, read_lines
from blindtune.privacy.randomness import SecureGenerator
from blindtune.wire import AdapterUpload, NoiseShare, Transcript, decode
from tests.tiny import HIDDEN

KEY = bytes(range(32))


def channel(adapters=1, **options):
    chosen = PrivateBackpropOptions(**{"m": 2, "clip_norm": 1.0, "noise_ratio": 1000.0, **options})
    return PrivateBackprop(chosen, SecureGenerator(KEY), adapters=adapters)


def gradients(backbone, texts, scale=1.0):
    """Adapter gradients for a fixed cotangent whose examples have norm `scale` once multiplied by B."""
    hidden = backbone.all_adapters(texts)
    cotangent = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    cotangent *= scale / len(texts) / cotangent.permute(1, 0, 2).flatten(1).norm(dim=1).view(1, -1, 1)
    for parameter in backbone.parameters():
        parameter.grad = None
    hidden.backward(cotangent)
    return torch.cat([p.grad.flatten() for p in backbone.parameters()])


def share_in(call):
    """The share `(n, B, d)` that one call of `Operator.backward` gives to its server, expanded if it is a seed."""
    tokens, uploads, *_, share = call
    if isinstance(share, NoiseShare):
        shape = (len(uploads), len(tokens), HIDDEN)
        return expand_noise(bytes.fromhex(share.seed), shape, Lattice(share.exponent, share.steps))
    return share[0].clone()


def perturb(backbone):
    with torch.no_grad():
        for adapter in backbone.lora_adapters():
            for _, b in adapter.named_matrices().values():
                b.normal_(std=0.05, generator=torch.Generator().manual_seed(1))


def lattice_costs(shared):
    """Relative error that rounding to the lattice makes in a parameter gradient: at most, for examples of norm C."""
    return 3 * (2 * HIDDEN / 6) ** 0.5 * shared.lattice.step / shared.options.clip_norm


def test_shares_at_two_operators_give_the_true_gradient(connect, film_sentences):
    backbone = connect(num_adapters=2)
    perturb(backbone)
    expected = gradients(backbone, film_sentences[:8])
    for noise_ratio, float32_costs in ((10.0, 1e-4), (100.0, 1e-3), (1000.0, 1e-2)):
        backbone.channel = channel(noise_ratio=noise_ratio)
        found = gradients(backbone, film_sentences[:8])
        tolerance = float32_costs + lattice_costs(backbone.channel)
        assert (found - expected).norm() / expected.norm() < tolerance, noise_ratio


def test_servers_in_double_precision_keep_gradients_as_exact_as_the_lattice(start_server, tiny_models, film_sentences):
    with (
        start_server(tiny_models["bert"], dtype="float64") as a,
        start_server(tiny_models["bert"], dtype="float64") as b,
    ):
        backbone = Backbone([a.url, b.url], max_length=32, num_adapters=2)
        perturb(backbone)
        expected = gradients(backbone, film_sentences[:8])
        backbone.channel = channel(noise_ratio=1000.0)
        found = gradients(backbone, film_sentences[:8])
        backbone.close()
    assert (found - expected).norm() / expected.norm() < 1e-4 + lattice_costs(backbone.channel)


def test_gradients_above_the_clipping_norm_are_scaled_down_to_it(connect, film_sentences):
    backbone = connect(num_adapters=2)
    perturb(backbone)
    expected = gradients(backbone, film_sentences[:8], scale=1.0)
    backbone.channel = channel(noise_ratio=10.0)
    found = gradients(backbone, film_sentences[:8], scale=50.0)
    assert (found - expected).norm() / expected.norm() < 1e-3


def test_each_operator_gets_one_share_and_sees_noise(
    connect, operators, film_sentences, start_server, tiny_models, tmp_path
):
    folders = [tmp_path / name for name in "ab"]
    with (
        start_server(tiny_models["bert"], record=folders[0]) as a,
        start_server(tiny_models["bert"], record=folders[1]) as b,
    ):
        backbone = Backbone([a.url, b.url], max_length=32, num_adapters=2, channel=channel())
        gradients(backbone, film_sentences[:64])
        backbone.close()
    seen = []
    for folder in folders:
        transcript = Transcript(folder)
        events = [event for event in transcript.events if event.kind == "backward"]
        assert len(events) == 1
        seen.append(transcript.tensors(events[0])["cotangents"])
    for share in seen:
        assert share.shape[:3] == (1, 2, 64)
        assert 950 < float(share.std()) < 1050  # of so many values ± 11
    assert (seen[1] + seen[0]).norm() < 0.01 * seen[1].norm()  # together they would reveal the gradient


def test_four_operators_see_one_of_two_adapters_each(connect, start_server, tiny_models, film_sentences, tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    with ExitStack() as stack:
        servers = [stack.enter_context(start_server(tiny_models["bert"], record=folder)) for folder in folders]
        urls = [server.url for server in servers]
        backbone = Backbone(urls, max_length=32, num_adapters=2, channel=channel(noise_ratio=10.0, adapters=2))
        perturb(backbone)
        found, hidden = gradients(backbone, film_sentences[:8]), backbone.infer(film_sentences[:8])
        backbone.close()
    seen = []
    for folder in folders:
        transcript = Transcript(folder)
        events = [event for event in transcript.events if event.kind in ("forward", "backward")]
        assert [event.kind for event in events].count("backward") == 1
        seen.append({name for event in events for name in event.adapters})
    assert [len(names) for names in seen] == [1, 1, 1, 1]
    assert seen[0] == seen[2] != seen[1] == seen[3]
    plain = connect(count=1, num_adapters=2)
    perturb(plain)
    for mine, others in zip(plain.parameters(), backbone.parameters(), strict=True):
        mine.data.copy_(others)
    expected, expected_hidden = gradients(plain, film_sentences[:8]), plain.infer(film_sentences[:8])
    assert (hidden - expected_hidden).norm() / expected_hidden.norm() < 1e-5
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_noise_on_adapters_is_new_for_new_weights_and_the_same_for_the_same(connect, film_sentences):
    backbone = connect(num_adapters=1, channel=channel(adapter_noise=0.01))
    sent, operator = [], backbone.pool.operators[0]
    original = operator.forward
    operator.forward = lambda tokens, uploads, *a, **k: sent.append(uploads[0]) or original(tokens, uploads, *a, **k)
    own = backbone.lora_adapters()[0].vector().detach().clone()
    with torch.no_grad():
        for _ in range(2):
            backbone.all_adapters(film_sentences[:2])
            backbone.steps = 0
        next(backbone.parameters()).data[0, 0] += 1e-4
        backbone.all_adapters(film_sentences[:2])
    weights = [decode(upload.body, AdapterUpload)[1]["weights"] for upload in sent]
    assert torch.equal(weights[0], weights[1])
    assert 0.009 < float((weights[0] - own).std()) < 0.011
    assert 0.013 < float((weights[2] - weights[0]).std()) < 0.016


@pytest.mark.parametrize("kind", [LoRA, DistanceCorrelation, PSLF, RandomizedResponse, P3EFT])
def test_every_method_with_shares_can_send_adapters_under_noise(connect, kind):
    backbone = connect(num_adapters=0)
    method = make_method(kind.name, {"m": 2, "adapter_noise": 0.01})
    PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    assert backbone.channel.options.adapter_noise == 0.01


def test_noise_on_adapters_needs_gradients_in_shares():
    with pytest.raises(ConfigError, match=r"adapter_noise = 0.01 hides nothing: gradients travel in the clear.*m=2"):
        LoRA(PrivateBackpropOptions(adapter_noise=0.01))
    with pytest.raises(ConfigError, match="adapter_noise = -1"):
        LoRA(PrivateBackpropOptions(m=2, adapter_noise=-1))


@pytest.mark.parametrize("name", ["padded-lora", "features"])
def test_methods_that_send_no_adapter_in_the_clear_offer_no_noise_on_it(name):
    """Pads hide all of an adapter by a known amount, at no cost to the model; noise would add nothing to that."""
    with pytest.raises(ConfigError, match="has no option"):
        make_method(name, {"adapter_noise": 0.01})


def test_one_operator_is_refused_for_two_shares(connect, film_sentences):
    backbone = connect(count=1)
    with pytest.raises(SingleOperator, match=r"2 shares .* need 2 operators.*allow_single_operator=True"):
        PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), P3EFT())


def test_one_operator_works_if_the_caller_gives_up_gradient_privacy(connect, film_sentences):
    backbone = connect(count=1)
    method = P3EFT(PrivateBackpropOptions(m=2, allow_single_operator=True))
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), method)
    output = model(film_sentences[:4], [0, 1, 0, 1])
    output.loss.backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert method.report() == {}  # no μ is claimed


def test_operators_in_low_precision_are_refused(start_server, tiny_models):
    with (
        start_server(tiny_models["bert"], dtype="bfloat16") as a,
        start_server(tiny_models["bert"], dtype="bfloat16") as b,
    ):
        backbone = Backbone([a.url, b.url], timeout=Timeout(total=5))
        with pytest.raises(ConfigError, match=r"bfloat16, which destroys gradients.*float32"):
            PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), P3EFT())
        backbone.close()


def test_the_same_gradient_gets_fresh_noise_each_time_and_counts(connect, film_sentences):
    """Equal shares would tell that the gradient is the same, which depends on labels."""
    sent, shared = [], channel()
    backbone = connect(num_adapters=2, channel=shared)
    operator = backbone.pool.operators[0]
    original = operator.backward
    operator.backward = lambda *args: sent.append(share_in(args)) or original(*args)
    for _ in range(2):
        gradients(backbone, film_sentences[:4])
    assert float((sent[0] - sent[1]).std()) > 1300  # two independent noises
    assert shared.ledger.messages("share") == 2


def test_the_ledger_counts_the_share_that_depends_on_the_gradient(connect, film_sentences):
    """What an example brings is public, and the same at both operators; what it costs, at the carrier's alone."""
    shared = channel()
    backbone = connect(num_adapters=2, channel=shared)
    for _ in range(20):
        perturb_more(backbone)
        gradients(backbone, film_sentences[:4])
    assert shared.ledger.messages("share") == 20
    assert shared.ledger.guarantee().mu == pytest.approx(2 * (20 * 4) ** 0.5 / 1000)
    assert 0.45 < shared.ledger.used() < 0.95  # rows of norm C, whose carrier is now at one operator, now at the other


def test_two_of_three_operators_see_no_more_together_than_the_budget_allows(
    start_server, tiny_models, film_sentences, tmp_path
):
    """They may pool their shares. What a gradient costs counts at each of them, whoever got the carrier."""
    shared = channel(m=3, noise_ratio=30.0, max_mu=2.0)
    shared.ledger.attach(tmp_path)
    with ExitStack() as stack:
        urls = [stack.enter_context(start_server(tiny_models["bert"])).url for _ in range(3)]
        backbone = Backbone(urls, max_length=32, num_adapters=2, channel=shared)
        with suppress(BudgetSpent):
            for step in range(1000):
                gradients(backbone, film_sentences[:64], scale=0.01 if step < 6 else 50.0)  # room is saved first
        backbone.close()
    assert step < 100
    messages = [line for line in read_lines(tmp_path / JOURNAL) if "kind" in line]
    for pair in combinations(backbone.pool.names, 2):
        seen = sum(max(line["costs"][name] for name in pair) for line in messages)
        assert 0.5 < seen / shared.ledger.limit <= 1.0 + 1e-9


def test_costs_belong_to_the_server_that_had_them_in_whichever_order_servers_come(operators, film_sentences, tmp_path):
    """A run that is resumed with --server in another order."""
    first, true = channel(), dict.fromkeys(operators.urls, 0)
    again = channel()
    first.ledger.attach(tmp_path)
    for shared, urls in ((first, operators.urls), (again, operators.urls[::-1])):
        if shared is again:
            again.ledger.resume(tmp_path)
        backbone = Backbone(urls, max_length=32, num_adapters=2, channel=shared)
        for operator in backbone.pool.operators:
            original, url = operator.backward, operator.transport.url

            def counted(*args, f=original, u=url):
                true[u] += not isinstance(args[-1], NoiseShare)  # the share with the gradient in it
                return f(*args)

            operator.backward = counted
        for _ in range(6):
            perturb_more(backbone)
            gradients(backbone, film_sentences[:1])
        backbone.close()
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    counts = Counter(name.split()[0] for line in lines for name, cost in line.get("costs", {}).items() if cost)
    assert counts == {u: n for u, n in true.items() if n}
    assert again.ledger.messages("share") == 12


def perturb_more(backbone):
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 1e-3


def test_a_gradient_that_is_not_finite_is_never_sent(connect, film_sentences):
    from blindtune.errors import NonFiniteTensor

    backbone = connect(num_adapters=2, channel=channel())
    hidden = backbone.all_adapters(film_sentences[:4])
    before = backbone.traffic.requests
    with pytest.raises(NonFiniteTensor, match="nothing was sent"):
        (hidden * float("inf")).sum().backward()
    assert backbone.traffic.requests == before


def residual_leak(first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor) -> float:
    """|cosine| of the best guess of an operator that got both tensors for one gradient: its quietest combination."""
    shares = torch.stack([first.flatten(), second.flatten()]).double()
    _, vectors = torch.linalg.eigh(shares @ shares.T)
    guess = vectors[:, 0] @ shares
    return abs(float(torch.nn.functional.cosine_similarity(guess, gradient.flatten().double(), dim=0)))


def test_operators_in_another_order_never_collect_two_shares_of_one_split(connect, operators, film_sentences):
    """A run that is resumed with --server in another order, or a step that is repeated over other operators."""
    received = {url: [] for url in operators.urls}
    sent = {}
    for urls in (operators.urls, operators.urls[::-1]):
        backbone = Backbone(urls, max_length=32, num_adapters=2, channel=channel())
        for operator in backbone.pool.operators:
            original, url = operator.backward, operator.transport.url
            operator.backward = lambda *args, f=original, u=url: received[u].append(share_in(args)) or f(*args)
        torch.manual_seed(0)
        perturb(backbone)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.copy_(torch.full_like(parameter, 0.01))
        gradients(backbone, film_sentences[:64])  # of so many values chance hits a direction to .016
        backbone.close()
    hidden_shape = received[operators.urls[0]][0].shape
    sent = torch.randn(hidden_shape, generator=torch.Generator().manual_seed(0))
    sent /= sent.permute(1, 0, 2).flatten(1).norm(dim=1).view(1, -1, 1)
    for shares in received.values():
        assert len(shares) == 2
        assert residual_leak(*shares, sent) < 0.2
    (one, other), (third, fourth) = received.values()
    assert residual_leak(one, third, sent) > 0.95  # what colluding operators would have
    assert residual_leak(other, fourth, sent) > 0.95


def test_a_channel_with_too_few_operators_refuses_by_itself(connect, film_sentences):
    """Also where nobody called check_operators: predict_only models, channels of one's own."""
    backbone = connect(count=1, channel=channel())
    with pytest.raises(SingleOperator):
        gradients(backbone, film_sentences[:2])


def test_shares_that_met_leave_no_guarantee(connect, film_sentences):
    shared = channel(allow_single_operator=True)
    backbone = connect(count=1, channel=shared)
    gradients(backbone, film_sentences[:2])
    assert shared.ledger.guarantee().mu == float("inf")


def test_a_share_counts_even_if_the_other_operator_fails(connect, film_sentences):
    shared = channel()
    backbone = connect(num_adapters=2, channel=shared)
    for operator in backbone.pool.operators:
        operator.backward = _pulled
    with pytest.raises(ConnectionError):
        gradients(backbone, film_sentences[:2])
    assert shared.ledger.messages("share") == 1


def _pulled(*_):
    raise ConnectionError("the cable was pulled")


@pytest.mark.parametrize("kind", [LoRA, DistanceCorrelation, PSLF])
def test_every_method_can_send_gradients_in_shares(connect, film_examples, kind):
    texts, labels = film_examples.texts[:16], film_examples.labels[:16]
    found = {}
    for m in (1, 2):
        backbone = connect(num_adapters=0)
        method = kind(PrivateBackpropOptions(m=m, clip_norm=1.0, noise_ratio=20.0))
        head = LinearHead(backbone.hidden_size, 2)
        model = PrivateModel(backbone, head, method, generator=SecureGenerator(KEY))
        model.prepare(texts, labels)
        model(texts, labels).loss.backward()
        found[m] = torch.cat([p.grad.flatten() for p in backbone.parameters()])
        assert ("gradient_channel_mu" in method.report()) == (m == 2)
        assert (method.ledger is not None) == (m == 2)
    assert isinstance(backbone.channel, PrivateBackprop)
    assert (found[2] - found[1]).norm() / found[1].norm() < 1e-2


def test_a_budget_needs_shares():
    with pytest.raises(ConfigError, match=r"gradients travel in the clear.*m=2"):
        LoRA(PrivateBackpropOptions(max_mu=0.1))


def test_shares_at_one_operator_are_refused_under_every_method(connect):
    backbone = connect(count=1, num_adapters=0)
    with pytest.raises(SingleOperator):
        PrivateModel(backbone, LinearHead(backbone.hidden_size, 2), DistanceCorrelation(PrivateBackpropOptions(m=2)))
