"""J(x) v: differences of hidden states agree with the derivative that autograd computes in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from blindtune.errors import ConfigError, UnknownTargetModule
from blindtune.models import FrozenBackbone, Tokens
from blindtune.models.tangents import check_offered, directions_layout, expand_directions, tangents
from blindtune.wire import Directions, Limits, Readout
from tests.models.test_lora import batch
from tests.tiny import LAYERS, NAMES

LoadTiny = Callable[..., FrozenBackbone]
SEED = "3" * 64


def directions(backbone: FrozenBackbone, count: int = 3, **more: object) -> Directions:
    return Directions.model_validate(
        {"modules": list(backbone.lora.shapes), "rank": 4, "seed": SEED, "count": count, **more}
    )


def derivative(backbone: FrozenBackbone, tokens: Tokens, readout: Readout, along: Directions) -> Tensor:
    """J(x) v by two reverse passes: u ↦ Jᵀu is linear, and its derivative along v is J v."""
    layout = directions_layout(along, backbone.lora.shapes)
    results = []
    for v in expand_directions(along, layout.size).double():
        b = torch.zeros(1, layout.size, dtype=torch.float64, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
            hidden = backbone.forward(tokens, readout, layout, b)[0]
        u = torch.zeros_like(hidden, requires_grad=True)
        (vjp,) = torch.autograd.grad(hidden, b, u, create_graph=True)
        (jvp,) = torch.autograd.grad(vjp, u, v.unsqueeze(0))
        results.append(jvp)
    return torch.stack(results)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


class TestTangents:
    @pytest.mark.parametrize("name", [name for name in NAMES if name != "opt"])
    def test_are_the_derivative(self, name: str, tiny_backbone: LoadTiny):
        exact = tiny_backbone(name, dtype="float64")
        tokens, along = batch(4, 7), directions(exact, 5)
        readout = Readout(pooling="first" if name == "t5" else "mean", layers=(1, LAYERS))
        expected = derivative(exact, tokens, readout, along)
        assert expected.shape[:2] == (5, 4)
        # the tiny T5 is far from linear: its attention isn't scaled, and its weights are large
        assert error(tangents(exact, tokens, readout, along), expected) < (0.05 if name == "t5" else 1e-4)
        assert error(tangents(tiny_backbone(name), tokens, readout, along), expected) < (0.05 if name == "t5" else 2e-4)

    @pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
    def test_lower_layers_run_once_and_do_not_change(self, pooling: str, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        upper = [name for name in backbone.lora.shapes if f".{LAYERS - 1}." in name]
        calls: list[int] = []
        handle = backbone.lora.blocks[0].register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
        readout = Readout.model_validate({"pooling": pooling, "layers": (1, LAYERS)})
        found = tangents(backbone, batch(4, 7), readout, directions(backbone, 4, modules=upper))
        handle.remove()
        assert calls == [4]
        below, above = found.chunk(2, dim=-1)
        assert float(below.abs().max()) == 0.0 < float(above.abs().max())

    def test_directions_are_public_and_do_not_depend_on_how_many_are_asked_for(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        size = directions_layout(directions(backbone), backbone.lora.shapes).size
        some = expand_directions(directions(backbone, 6), size)
        assert torch.equal(some[2:5], expand_directions(directions(backbone, 3, first=2), size))
        assert torch.equal(some.abs(), torch.full_like(some, 0.5))  # 1 / √4
        assert float((some @ some.T / size * 4 - torch.eye(6)).abs().max()) < 0.1
        other = expand_directions(directions(backbone, 6, seed="4" * 64), size)
        assert not torch.equal(other, some)

    def test_their_inner_products_estimate_the_tangent_kernel(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert", dtype="float64")
        tokens, readout = batch(5, 6), Readout(pooling="mean")
        upper = [name for name in backbone.lora.shapes if f".{LAYERS - 1}.attention.self" in name]
        along = directions(backbone, 600, modules=upper)
        layout = directions_layout(along, backbone.lora.shapes)
        b = torch.zeros(1, layout.size, dtype=torch.float64, requires_grad=True)
        hidden = backbone.forward(tokens, readout, layout, b)[0]
        jacobian = torch.stack([torch.autograd.grad(value, b, retain_graph=True)[0][0] for value in hidden.flatten()])
        rows = jacobian.reshape(5, -1)
        sketch = tangents(backbone, tokens, readout, along).transpose(0, 1).flatten(1)
        assert error(sketch @ sketch.T * 4 / 600, rows @ rows.T) < 0.1


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "pooling", "words"),
        [
            ({"count": 65}, "mean", "65 directions"),
            ({"first": 60, "count": 5}, "mean", "65 directions"),
            ({"rank": 300}, "mean", "rank 300"),
            ({}, "none", "single tokens"),
        ],
    )
    def test_what_the_server_does_not_offer(self, given: dict, pooling: str, words: str, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        with pytest.raises(ConfigError, match=words):
            check_offered(
                directions(backbone, **given),
                Readout.model_validate({"pooling": pooling}),
                backbone.info("m", Limits()),
            )

    def test_modules_that_do_not_exist(self, tiny_backbone: LoadTiny):
        backbone = tiny_backbone("bert")
        with pytest.raises(UnknownTargetModule):
            tangents(backbone, batch(1, 3), Readout(pooling="mean"), directions(backbone, modules=["no.such"]))
