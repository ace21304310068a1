"""A cut model over a real server: the same numbers as in one process, no padding, no text, and clear refusals."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import httpx2
import pytest
import torch
from torch import Tensor

from blindtune.client import Operator, RemoteTrunk, Transport, fetch_part
from blindtune.errors import (
    CodecMismatch,
    ConfigError,
    EmptyBatch,
    InvalidTensor,
    NonFiniteTensor,
    RequestError,
    SequenceTooLong,
    UnknownPart,
)
from blindtune.models import Cut, CutModel, Part, load_backbone
from blindtune.models.cut.parts import pack, padding_mask, tie, unpack
from blindtune.wire import Codec, Transcript, TrunkRequest, decode, dequantize, encode, quantize
from blindtune.wire.schema import TrunkResponse
from tests.conftest import CutServer, Server, StartServer

LENGTHS = torch.tensor([9, 4, 1])
IDS = torch.randint(4, 400, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def operator(cut_server: CutServer) -> Generator[Operator]:
    transport = Transport(cut_server.url)
    yield Operator(transport, None)
    transport.close()


@pytest.fixture(scope="module")
def whole(cut_server: CutServer) -> CutModel:
    return load_backbone(str(cut_server.model), cut=Cut(2, 2)).require_cut()


def ends(operator: Operator) -> tuple[Part, Part]:
    bottom, top = fetch_part(operator, "bottom"), fetch_part(operator, "top")
    tie(bottom, top)
    return bottom, top


def test_logits_are_those_of_the_whole_model(operator: Operator, whole: CutModel) -> None:
    bottom, top = ends(operator)
    trunk = RemoteTrunk(operator, up="fp32", down="fp32")
    with torch.no_grad():
        logits = top.logits(top(trunk(bottom(IDS, LENGTHS), LENGTHS), LENGTHS))
        reference = whole.causal(input_ids=IDS, attention_mask=padding_mask(LENGTHS, 9)).logits  # pyright: ignore
    assert torch.equal(pack(logits, LENGTHS), pack(reference, LENGTHS))


def gradient(top: Part, trunk: object, smashed: Tensor) -> Tensor:
    leaf = smashed.detach().clone().requires_grad_()
    pack(top.logits(top(trunk(leaf, LENGTHS), LENGTHS)), LENGTHS).pow(2).sum().backward()  # pyright: ignore
    assert leaf.grad is not None
    return pack(leaf.grad, LENGTHS)


@pytest.mark.parametrize(("codec", "error"), [("fp32", 0.0), ("fp16", 2e-3), ("int8", 0.05), ("int4", 0.3)])
def test_gradients_come_back_through_the_network(
    operator: Operator, whole: CutModel, codec: Codec, error: float
) -> None:
    bottom, top = ends(operator)
    smashed = bottom(IDS, LENGTHS)
    ours = gradient(top, RemoteTrunk(operator, up=codec, down=codec), smashed)
    reference = gradient(whole.parts["top"], whole.parts["trunk"], smashed)
    assert float((ours - reference).norm() / reference.norm()) <= error


def test_four_bits_of_each_value_travel(operator: Operator, whole: CutModel) -> None:
    """Both ways: what comes is the trunk of rounded hidden states, rounded."""

    def rounded(packed: Tensor) -> Tensor:
        return dequantize("hidden", quantize("hidden", packed, "int4"), "int4", 32)

    bottom, _ = ends(operator)
    trunk = RemoteTrunk(operator, up="int4", down="int4")
    with torch.no_grad():
        smashed = bottom(IDS, LENGTHS)
        found = trunk(smashed, LENGTHS)
        exact = whole.parts["trunk"](unpack(rounded(pack(smashed, LENGTHS)), LENGTHS), LENGTHS)
    assert torch.equal(pack(found, LENGTHS), rounded(pack(exact, LENGTHS)))


def test_a_cut_is_described_under_the_name_that_it_has_on_the_wire(operator: Operator) -> None:
    described = httpx2.get(f"{operator.transport.url}{operator.path}").json()
    assert (described["split"]["bottom"], described["split"]["top"]) == (2, 2)
    assert "cut" not in described


def test_no_padding_and_no_tokens_travel(operator: Operator) -> None:
    bottom, _ = ends(operator)
    trunk = RemoteTrunk(operator, up="fp32", down="int8")
    with torch.no_grad():
        trunk(bottom(IDS, LENGTHS), LENGTHS)
    small = trunk.traffic["s_A up"]
    padded = torch.cat([IDS, torch.zeros(3, 20, dtype=torch.long)], 1)
    with torch.no_grad():
        trunk(bottom(padded, LENGTHS), LENGTHS)
    assert trunk.traffic["s_A up"] == 2 * small
    assert small < 14 * 32 * 4 + 600  # 14 tokens of 32 values, and a header


def test_a_forgotten_forward_pass_is_sent_again(start_server: StartServer, tiny_causal: dict[str, Path]) -> None:
    """A server without memory for graphs gives the identical gradient, for one more message."""
    with start_server(tiny_causal["llama"], cut=2, graph_mb=0) as server:
        transport = Transport(server.url)
        operator = Operator(transport, None)
        bottom, top = ends(operator)
        trunk = RemoteTrunk(operator, up="fp32", down="fp32")
        forgotten = gradient(top, trunk, bottom(IDS, LENGTHS))
        requests = transport.traffic.requests
        local = load_backbone(str(tiny_causal["llama"]), cut=Cut(2, 2)).require_cut()
        assert torch.equal(forgotten, gradient(local.parts["top"], local.parts["trunk"], bottom(IDS, LENGTHS)))
        assert requests == 2 + 2 + 3  # hello, parts, and forward, refused backward, backward
        transport.close()


def test_equal_requests_get_equal_answers(operator: Operator) -> None:
    """Although gradients are rounded at random: what is recorded twice is one view."""
    body = {**quantize("hidden", torch.randn(5, 32), "int8"), "lengths": torch.tensor([5], dtype=torch.int32)}
    body |= quantize("cotangents", torch.randn(5, 32), "int8")
    request = encode(TrunkRequest(up="int8", down="int4"), body)
    answers = {operator.transport.post(f"{operator.path}/trunk/backward", request) for _ in range(3)}
    assert len(answers) == 1


def test_what_the_server_records(start_server: StartServer, tiny_causal: dict[str, Path], tmp_path: Path) -> None:
    with start_server(tiny_causal["llama"], cut=2, record=tmp_path / "record") as server:
        transport = Transport(server.url)
        operator = Operator(transport, None)
        bottom, top = ends(operator)
        gradient(top, RemoteTrunk(operator, up="int8", down="fp16"), bottom(IDS, LENGTHS))
        transport.close()
    transcript = Transcript(tmp_path / "record")
    assert [event.kind for event in transcript.events] == ["trunk-forward", "trunk-backward"]
    forward, backward = transcript.events
    assert forward.forward == backward.forward
    assert (backward.up, backward.down) == ("int8", "fp16")
    tensors = transcript.tensors(forward)
    assert {name.split(".")[0] for name in tensors} == {"hidden", "answer", "lengths"}
    assert tensors["hidden.values"].shape == (14, 32)
    recorded = transcript.recording.models[operator.info.name]
    assert (recorded.bottom, recorded.top) == (2, 2)


def post(operator: Operator, direction: str, request: TrunkRequest, tensors: dict[str, Tensor]) -> bytes:
    return operator.transport.post(f"{operator.path}/trunk/{direction}", encode(request, tensors))


def sent(values: Tensor, lengths: list[int], codec: Codec = "fp32") -> dict[str, Tensor]:
    return {**quantize("hidden", values, codec), "lengths": torch.tensor(lengths, dtype=torch.int32)}


FP32 = TrunkRequest(up="fp32", down="fp32")


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        (sent(torch.randn(5, 32), [4]), InvalidTensor, "5 tokens; the lengths add up to 4"),
        (sent(torch.randn(5, 31), [5]), InvalidTensor, "hidden"),
        (sent(torch.randn(0, 32), []), EmptyBatch, "0 examples"),
        (sent(torch.randn(5, 32), [5, 0]), EmptyBatch, "without tokens"),
        (sent(torch.randn(40, 32), [40]), SequenceTooLong, "limit is 32"),
        (sent(torch.randn(5, 32), [5], "int8"), CodecMismatch, "int8"),
        ({"hidden.values": torch.full((1, 32), torch.nan), "lengths": torch.ones(1, dtype=torch.int32)},
         NonFiniteTensor, "NaN"),
        ({"lengths": torch.ones(1, dtype=torch.int32)}, InvalidTensor, "missing"),
    ],
    ids=["tokens", "dim", "none", "length-0", "long", "codec", "nan", "nothing"],
)  # fmt: skip
def test_refusals(operator: Operator, tensors: dict[str, Tensor], error: type[RequestError], says: str) -> None:
    with pytest.raises(error, match=says):
        post(operator, "forward", FP32, tensors)


def test_a_sequence_of_one_token(operator: Operator, whole: CutModel) -> None:
    values = torch.randn(1, 32)
    _, answer = decode(post(operator, "forward", FP32, sent(values, [1])), TrunkResponse)
    with torch.no_grad():
        assert torch.equal(answer["hidden.values"], whole.parts["trunk"](values[None], torch.tensor([1]))[0])


def test_cotangents_of_another_shape(operator: Operator) -> None:
    tensors = {**sent(torch.randn(5, 32), [5]), **quantize("cotangents", torch.randn(4, 32), "fp32")}
    with pytest.raises(InvalidTensor, match="4 tokens"):
        post(operator, "backward", FP32, tensors)


def test_the_trunk_itself_is_not_offered(operator: Operator) -> None:
    with pytest.raises(UnknownPart, match=r"no part 'trunk'.*bottom, top"):
        fetch_part(operator, "trunk")


def test_a_server_that_is_not_cut(tiny_server: Server) -> None:
    transport = Transport(tiny_server.url)
    operator = Operator(transport, "llama")
    with pytest.raises(UnknownPart, match="--cut"):
        RemoteTrunk(operator)
    with pytest.raises(UnknownPart, match="none"):
        fetch_part(operator, "bottom")
    transport.close()


def test_a_codec_that_is_not_offered(operator: Operator) -> None:
    with pytest.raises(ConfigError, match=r"int2.*int8"):
        RemoteTrunk(operator, up="int2")  # pyright: ignore[reportArgumentType] - the mistake


def test_another_tenant_gets_no_graph(operator: Operator) -> None:
    """Graphs are kept by tenant: naming a forward call by its hash is no way to somebody else's."""
    request = TrunkRequest(up="fp32", down="fp32", forward="0" * 64)
    tensors = {**quantize("cotangents", torch.randn(5, 32), "fp32"), "lengths": torch.tensor([5], dtype=torch.int32)}
    body = encode(request, tensors)
    answer = httpx2.post(f"{operator.transport.url}{operator.path}/trunk/backward", content=body)
    assert answer.status_code == 404
    assert answer.json()["type"] == "urn:blindtune:problem:graph-lost"
