"""Attacks on texts: on a transcript that a real server of a cut model recorded, and on parts in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from blindtune.audit.texts import (
    ATTACKS,
    Attacker,
    Budget,
    Exchange,
    GroundTruth,
    Observed,
    Reconstruction,
    TrueCall,
    attack_texts,
    headline,
    link_repeats,
    read_exchanges,
)
from blindtune.audit.texts.reader import Reader
from blindtune.client import Operator, RemoteTrunk, Transport, fetch_part
from blindtune.errors import ConfigError, TranscriptError
from blindtune.models import Cut, CutModel, Tokenizer, load_backbone
from blindtune.models.cut.parts import pack, padding_mask, tie, unpack
from blindtune.wire import Transcript
from tests.tiny_causal import save_tiny_causal

Rows = list[list[int]]
BATCH, STEPS, LENGTH = 8, 9, 16
BUDGET = Budget(public_rows=300, deep_rows=100, epochs=6, negatives=300, eia_steps=40, solver_steps=25, lamp_rounds=2)
QUICK = replace(BUDGET, public_rows=200, epochs=2, eia_steps=20)
ON_S_A = ["nearest token", "nearest, left to right", "SIP", "EIA", "BiSR(f)"]


@dataclass(frozen=True)
class Recorded:
    """A run of training that somebody recorded, and what its client wrote down."""

    exchanges: list[Exchange]
    ground_truth: GroundTruth
    ground_truth_file: Path
    transcript: Transcript
    attacker: Callable[..., Attacker]
    received: list[Tensor]
    """s_B as the client got it."""


@dataclass(frozen=True)
class Texts:
    model: CutModel
    victim: Rows
    public: Rows
    dim: int


def save(family: str, folder: Path, sentences: list[str], seed: int = 0) -> Path:
    """A tiny model whose blocks add as little to embeddings as those of pretrained ones do."""
    save_tiny_causal(family, folder, sentences, seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
                parameter *= 0.3
    model.save_pretrained(folder)
    return folder


def load(folder: Path, sentences: list[str]) -> Texts:
    backbone = load_backbone(str(folder), cut=Cut(2, 2))
    tokenizer = Tokenizer(backbone.tokenizer, pad_token_id=backbone.pad_token_id, with_types=False)
    rows = [list(row.ids) for row in tokenizer.rows(sentences, max_length=LENGTH)]
    return Texts(backbone.require_cut(), rows[:100], rows[100:600], int(backbone.config.hidden_size))


def padded(rows: Rows) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    return unpack(torch.tensor([token for row in rows for token in row]), lengths), lengths


def language_loss(logits: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    targets = ids.masked_fill(padding_mask(lengths, ids.shape[1]) == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


@pytest.fixture(scope="module")
def llama(tmp_path_factory, film_sentences) -> tuple[Path, Texts]:
    folder = save("llama", tmp_path_factory.mktemp("inputs") / "llama", film_sentences[:600])
    return folder, load(folder, film_sentences[:600])


@pytest.fixture(scope="module")
def recorded(start_server, llama, tmp_path_factory) -> Recorded:
    """Undefended training of bottom and top, one evaluation in between; int8 up and down."""
    folder, texts = llama
    record = tmp_path_factory.mktemp("record") / "seen"
    ground_truth_file, received = record.parent / "ground-truth.jsonl", []
    with start_server(folder, cut=2, record=record) as server, ground_truth_file.open("w") as file:
        transport = Transport(server.url)
        operator = Operator(transport, None)
        bottom, top, trunk = fetch_part(operator, "bottom"), fetch_part(operator, "top"), RemoteTrunk(operator)
        tie(bottom, top)
        trained = [p for part in (bottom, top) for name, p in part.named_parameters() if ".layers." in name]
        optimizer = torch.optim.Adam([p.requires_grad_() for p in trained], lr=1e-3)
        for step in range(STEPS):
            rows = texts.victim[step * BATCH : (step + 1) * BATCH]
            ids, lengths = padded(rows)
            evaluated = step == 4
            with torch.set_grad_enabled(not evaluated):
                trunk_output = trunk(bottom(ids, lengths), lengths)
                loss = language_loss(top.logits(top(trunk_output, lengths)), ids, lengths)
            received.append(pack(trunk_output.detach(), lengths))
            line = {"forward": trunk.last_forward, "ids": rows, "part": "validation" if evaluated else "train"}
            file.write(json.dumps(line) + "\n")
            if not evaluated:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        transport.close()
    transcript = Transcript(record)
    (name,) = transcript.recording.models
    exchanges = read_exchanges(transcript, name, dim=texts.dim)

    def attacker(**options) -> Attacker:
        return Attacker(texts.model, texts.public, **{"budget": BUDGET, **options})

    return Recorded(exchanges, GroundTruth.read(ground_truth_file), ground_truth_file, transcript, attacker, received)


@pytest.fixture(scope="module")
def results(recorded) -> dict[tuple[str, str], Reconstruction]:
    found = attack_texts(recorded.exchanges, recorded.ground_truth, recorded.attacker(), sequences=16)
    return {(result.stage, result.attack): result for result in found}


def test_the_transcript_gives_what_the_client_sent_and_got(recorded):
    assert len(recorded.exchanges) == STEPS
    assert [exchange.step for exchange in recorded.exchanges] == sorted(e.step for e in recorded.exchanges)
    for index, (exchange, received) in enumerate(zip(recorded.exchanges, recorded.received, strict=True)):
        observed = exchange.read()
        assert torch.equal(observed.s_b, received)
        assert observed.s_a.shape == observed.s_b.shape == (int(observed.lengths.sum()), 32)
        assert (observed.g_b is None) == (observed.g_a is None) == (index == 4)  # nothing is learned in evaluation


def test_every_attack_runs_at_every_stage(results):
    assert {attack for _, attack in results} == set(ATTACKS)
    assert {stage for stage, _ in results} == {"start", "middle", "end"}
    assert all(result.sequences == 16 for result in results.values())


def test_undefended_training_is_read(results):
    best = headline(list(results.values()))
    assert best.accuracy >= 0.8
    for stage in ("start", "middle", "end"):
        floor = max(r.accuracy for (s, _), r in results.items() if s == stage and r.floor)
        assert results[stage, "BiSR"].accuracy >= 0.8
        assert results[stage, "nearest, left to right"].accuracy >= 0.8
        assert floor < 0.4
        for name in [*ON_S_A, "BiSR(b)", "TAG", "LAMP"]:
            assert results[stage, name].accuracy > floor + 0.2, (stage, name)


def test_gradients_tell_the_labels_that_hidden_states_alone_do_not(results):
    """A random model predicts nothing, so all that TAG reads of the text, it reads from g_B."""
    assert results["start", "direct forward"].accuracy < 0.3
    assert results["start", "TAG"].accuracy > 0.6


def test_metrics_agree_on_what_is_read(results):
    best = results["start", "BiSR"].metrics
    assert all(best[name].mean > 0.7 for name in best)
    assert best["accuracy"].low <= best["accuracy"].mean <= best["accuracy"].high


def noisy(recorded: Recorded, perturb: Callable[[Tensor], Tensor], model: CutModel) -> list[Exchange]:
    """The same calls, as if the client had perturbed s_A; without gradients."""

    def read(exchange: Exchange) -> Observed:
        plain = exchange.read()
        s_a = perturb(plain.s_a)
        with torch.no_grad():
            s_b = pack(model.parts["trunk"](unpack(s_a, plain.lengths), plain.lengths), plain.lengths)
        return Observed(plain.lengths, s_a, s_b)

    torch.manual_seed(1)
    observed = [(exchange, read(exchange)) for exchange in recorded.exchanges]
    return [replace(exchange, read=lambda kept=kept: kept) for exchange, kept in observed]


def test_large_noise_leaves_nothing_to_read_even_for_who_knows_of_it(recorded, llama):
    def perturb(hidden: Tensor) -> Tensor:
        return hidden + 100 * hidden.std() * torch.randn(hidden.shape)

    exchanges = noisy(recorded, perturb, llama[1].model)
    for attacker in (recorded.attacker(budget=QUICK), recorded.attacker(budget=QUICK, simulate=perturb)):
        found = attack_texts(exchanges, recorded.ground_truth, attacker, sequences=24)
        floor = max(result.accuracy for result in found if result.floor)
        assert headline(found).accuracy < floor + 0.1
        assert "TAG" not in {result.attack for result in found}  # there were no gradients


def test_little_noise_is_seen_through_by_who_knows_of_it(recorded, llama):
    """The same attack and code as above, so that its failure there says something."""

    def perturb(hidden: Tensor) -> Tensor:
        return hidden + 0.1 * hidden.std() * torch.randn(hidden.shape)

    exchanges = noisy(recorded, perturb, llama[1].model)
    attacker = recorded.attacker(budget=QUICK, simulate=perturb)
    found = attack_texts(exchanges, recorded.ground_truth, attacker, ON_S_A, sequences=16)
    assert headline(found).accuracy > 0.7


def test_noise_that_is_drawn_again_for_a_text_is_averaged_by_who_links_messages(recorded, llama):
    """Sixteen copies: each hides much, all together little. Other texts aren't mixed in."""
    size = float(recorded.exchanges[0].read().s_a.std())

    def perturb(hidden: Tensor) -> Tensor:
        return hidden + size * torch.randn(hidden.shape)

    torch.manual_seed(2)
    copies = []
    for _ in range(16):
        for exchange in recorded.exchanges[:2]:
            plain = exchange.read()
            kept = replace(plain, s_a=perturb(plain.s_a), g_b=None, g_a=None)
            copies.append(replace(exchange, read=lambda kept=kept: kept))
    linked = link_repeats(copies, size)
    assert linked.copies == 16
    averaged, plain = linked.exchanges[0].read().s_a, recorded.exchanges[0].read().s_a
    assert float((averaged - plain).std()) == pytest.approx(size / 4, rel=0.1)
    once = recorded.attacker(budget=QUICK, simulate=perturb)
    together = recorded.attacker(budget=QUICK, simulate=lambda h: h + size / 4 * torch.randn(h.shape))
    names = ["nearest token", "nearest, left to right"]
    single = headline(attack_texts(copies[:2], recorded.ground_truth, once, names, sequences=16)).accuracy
    many = headline(attack_texts(linked.exchanges[:2], recorded.ground_truth, together, names, sequences=16)).accuracy
    assert single < 0.6 < 0.9 < many


def test_an_attacker_that_has_the_clients_bottom_reads_what_a_static_one_cannot(
    recorded, llama, tmp_path, film_sentences
):
    model = llama[1].model
    other = load(save("llama", tmp_path / "other", film_sentences[:600], seed=1), film_sentences[:600])
    theirs = other.model.parts["bottom"]
    theirs.causal.model.embed_tokens = model.parts["bottom"].causal.model.embed_tokens  # embeddings stay as they were

    def read(exchange: Exchange) -> Observed:
        plain = exchange.read()
        ids, lengths = padded(recorded.ground_truth.of(exchange).ids)
        with torch.no_grad():
            return replace(plain, s_a=pack(theirs(ids, lengths), lengths), g_b=None, g_a=None)

    exchanges = [replace(exchange, read=lambda e=exchange: read(e)) for exchange in recorded.exchanges[:2]]
    accuracies = [
        headline(attack_texts(exchanges, recorded.ground_truth, attacker, ON_S_A, sequences=16)).accuracy
        for attacker in (recorded.attacker(budget=QUICK), recorded.attacker(budget=QUICK, bottom=theirs))
    ]
    assert accuracies[1] > 0.9
    assert accuracies[0] < accuracies[1] - 0.3


@pytest.mark.parametrize("family", ["opt", "qwen2"])
def test_other_families_are_read_as_well(family, tmp_path, film_sentences):
    texts = load(save(family, tmp_path / family, film_sentences[:600]), film_sentences[:600])
    parts, rows = texts.model.parts, texts.victim[:12]
    ids, lengths = padded(rows)
    with torch.no_grad():
        s_a = pack(parts["bottom"](ids, lengths), lengths)
        s_b = pack(parts["trunk"](unpack(s_a, lengths), lengths), lengths)
    leaf = s_b.clone().requires_grad_()
    loss = language_loss(parts["top"].logits(parts["top"](unpack(leaf, lengths), lengths)), ids, lengths)
    (g_b,) = torch.autograd.grad(loss, leaf)
    observed = Observed(lengths, s_a, s_b, g_b, g_b)
    exchange, ground_truth = (
        Exchange(0, "a" * 64, lambda: observed),
        GroundTruth([TrueCall(forward="a" * 64, ids=rows)]),
    )
    names = ["nearest, left to right", "EIA", "TAG", "BiSR(f)", "BiSR"]
    found = attack_texts([exchange], ground_truth, Attacker(texts.model, texts.public, budget=BUDGET), names)
    accuracies = {result.attack: result.accuracy for result in found}
    assert {result.stage for result in found} == {"start"}  # one call is no training
    assert accuracies["nearest, left to right"] > 0.9
    assert accuracies["BiSR"] > 0.9
    assert min(accuracies.values()) > 0.5, accuracies

    reader = Reader(parts["bottom"].causal)  # token by token is all at once
    for place in range(3):
        with torch.no_grad():
            imagined = reader.imagine(ids[:, place : place + 2])
            state = reader.read(ids[:, place])
        whole = unpack(s_a, lengths)[:, place]
        assert torch.allclose(state, whole, atol=1e-5)
        assert torch.allclose(imagined[:, 0], whole, atol=1e-5)


def test_an_attack_is_given_only_what_it_says_it_observes(recorded):
    observed = recorded.exchanges[0].read()
    assert observed.only(("s_A",)).s_b.shape[1] == 0
    assert observed.only(("s_A", "s_B")).g_b is None
    assert observed.only(()).s_a.shape == (int(observed.lengths.sum()), 0)
    blind = replace(
        observed, s_b=torch.full_like(observed.s_b, torch.nan), g_b=torch.full_like(observed.s_b, torch.nan)
    )
    attacker = recorded.attacker(budget=QUICK)
    for name in ON_S_A:
        assert torch.equal(ATTACKS[name].run(blind, attacker), ATTACKS[name].run(observed, attacker)), name


def test_equal_seeds_give_equal_guesses_whatever_else_is_drawn(recorded):
    observed = recorded.exchanges[0].read().first(4)
    attack = ATTACKS["SIP"]
    first = attack.run(observed, recorded.attacker(budget=replace(BUDGET, epochs=1)))
    torch.rand(3)
    before = torch.random.get_rng_state()
    again = attack.run(replace(observed), recorded.attacker(budget=replace(BUDGET, epochs=1)))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, attack.run(observed, recorded.attacker(budget=replace(BUDGET, epochs=1), seed=5)))


def test_evaluation_is_attacked_only_if_asked_for(recorded):
    found = attack_texts(
        recorded.exchanges, recorded.ground_truth, recorded.attacker(), ["TAG", "nearest token"], part="validation"
    )
    assert [(result.stage, result.attack, result.sequences) for result in found] == [("start", "nearest token", 8)]
    with pytest.raises(TranscriptError, match="None of 9 forward calls is of the part 'test'"):
        attack_texts(recorded.exchanges, recorded.ground_truth, recorded.attacker(), part="test")


def test_words_are_scored_where_texts_can_be_decoded(recorded, llama):
    """Two tokens of one word: a token that is wrong makes a word wrong."""

    def decode(ids) -> str:
        return "".join(f"{a}-{b} " for a, b in zip(ids[::2], ids[1::2], strict=False))

    found = attack_texts(
        recorded.exchanges, recorded.ground_truth, recorded.attacker(), ["unigram guess"], decode=decode
    )
    assert found[0].metrics["rouge1"].mean < found[0].metrics["set_f1"].mean
    assert found[0].accuracy > 0


def lines(recorded: Recorded) -> list[dict]:
    return [json.loads(line) for line in recorded.ground_truth_file.read_text().splitlines()]


def test_a_ground_truth_that_does_not_fit_is_refused(recorded, tmp_path):
    def attacked(calls: list[dict]) -> None:
        ground_truth = GroundTruth([TrueCall.model_validate(call) for call in calls])
        attack_texts(recorded.exchanges, ground_truth, recorded.attacker(), ["unigram guess"])

    with pytest.raises(TranscriptError, match=r"The truth \(8 calls\) lacks the forward call .* of event"):
        attacked(lines(recorded)[1:])
    calls = lines(recorded)
    calls[0]["ids"][0].append(7)
    with pytest.raises(TranscriptError, match="The truth says that event 0 had texts of"):
        attacked(calls)
    with pytest.raises(TranscriptError, match=r"There is no file .*nowhere"):
        GroundTruth.read(tmp_path / "nowhere")
    (tmp_path / "ground-truth").write_text('{"forward": "ab", "ids": [[1]]}\n{"forward": "ab", "ids": "no"}\n')
    with pytest.raises(TranscriptError, match=r"Line 2 of .* isn't a call's truth"):
        GroundTruth.read(tmp_path / "ground-truth")


def test_a_transcript_without_trunk_calls_of_the_model_is_refused(recorded):
    with pytest.raises(TranscriptError, match=r"no call of the trunk of 'other'. Trunks were called of: llama"):
        read_exchanges(recorded.transcript, "other", dim=32)


def test_an_attacker_needs_public_text(recorded, llama):
    with pytest.raises(ConfigError, match="no public text"):
        attack_texts(recorded.exchanges, recorded.ground_truth, Attacker(llama[1].model, [[1], []]), ["SIP"])


def test_an_attack_that_does_not_exist_is_refused(recorded):
    with pytest.raises(ConfigError, match=r"no attack 'guess'\. Use some of: direct forward"):
        attack_texts(recorded.exchanges, recorded.ground_truth, recorded.attacker(), ["guess"])
