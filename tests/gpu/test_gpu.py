"""Provider, client and attacker on a GPU do what they do on a CPU. Skipped where there is none, as in CI.

pytest tests/gpu                                                   # on a machine with one
BLINDTUNE_TEST_DEVICE=cuda pytest tests/cli tests/texts           # servers of other tests on it too
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from blindtune.client import Upload
from blindtune.errors import OutOfMemory
from blindtune.models import FrozenBackbone, Tokens
from blindtune.models.cut.emulator import load_emulator
from blindtune.server.memory import with_room
from blindtune.wire import (
    BackwardRequest,
    BackwardResponse,
    ForwardRequest,
    ForwardResponse,
    Pooling,
    decode,
    encode,
)
from tests.audit.texts.test_attacks import save
from tests.cli.commands import run
from tests.conftest import Server, StartServer
from tests.models.test_lora import batch, random_adapters
from tests.tiny import NAMES
from tests.tiny_causal import save_tiny_causal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

POOLING: dict[str, Pooling] = {"t5": "first", "llama": "last", "opt": "last"}
NORMS = ("t5", "llama")
"""transformers computes their norms in float32, whatever the model is in."""
DEVICES = ("cpu", "cuda")
ADAPTER = "adapter_model.safetensors"


def apart(one: Tensor, other: Tensor) -> float:
    """|x − y| / |y|."""
    return float((one.double() - other.double()).norm() / other.double().norm())


class TestPasses:
    """h(x, θ) and Jᵀ c from a server on the GPU, in float64, against a model on the CPU."""

    @pytest.fixture(scope="class")
    def server(self, start_server: StartServer, tiny_models: dict[str, Path]):
        models = [f"{name}={folder}" for name, folder in tiny_models.items()]
        with start_server(models, device="cuda", dtype="float64") as server:
            yield server

    @staticmethod
    def uploaded(http: httpx2.Client, backbone: FrozenBackbone, name: str, **options: Any) -> tuple[list[str], Any]:
        config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
        _, adapters = random_adapters(backbone, config, 2)
        bodies = [Upload.of(name, adapter.layout.spec, adapter.vector().detach()) for adapter in adapters]
        for body in bodies:
            assert http.put(f"/v1/adapters/{body.sha256}", content=body.body).status_code == 200
        return [body.sha256 for body in bodies], adapters

    @staticmethod
    def forward(http: httpx2.Client, name: str, hashes: list[str], tokens: Tokens, **options: Any) -> Tensor:
        request = ForwardRequest(adapters=hashes, pooling=POOLING.get(name, "mean"), **options)
        answer = http.post(f"/v1/models/{name}/forward", content=encode(request, tokens.tensors()))
        assert answer.status_code == 200, answer.text
        return decode(answer.content, ForwardResponse)[1]["hidden"]

    @pytest.mark.parametrize("name", NAMES)
    def test_equal_those_of_the_cpu(self, name: str, server: Server, tiny_backbone: Callable[..., FrozenBackbone]):
        backbone, tokens = tiny_backbone(name, "float64"), batch(4, 6)
        pooling = POOLING.get(name, "mean")
        with httpx2.Client(base_url=server.url, timeout=60) as http:
            hashes, adapters = self.uploaded(http, backbone, name)
            leaf = torch.stack([adapter.vector().detach() for adapter in adapters]).double().requires_grad_()
            expected = backbone.forward(tokens, pooling, adapters[0].layout, leaf)
            for retain in (False, True):
                found = self.forward(http, name, hashes, tokens, retain=retain)
                assert apart(found, expected.detach()) < 1e-5  # hidden states travel in float32
            cotangents = torch.randn(2, *expected.shape, generator=torch.Generator().manual_seed(0))
            wanted = [torch.autograd.grad(expected, leaf, c.double(), retain_graph=True)[0] for c in cotangents]
            asked = BackwardRequest(adapters=hashes, pooling=pooling)
            body = encode(asked, {**tokens.tensors(), "cotangents": cotangents})
            answers: list[Tensor] = []
            for retained in (True, False):
                response = http.post(f"/v1/models/{name}/backward", content=body)
                told, tensors = decode(response.content, BackwardResponse)
                assert told.retained is retained
                assert apart(tensors["gradients"], torch.stack(wanted)) < (1e-5 if name in NORMS else 1e-9)
                answers.append(tensors["gradients"])
            assert apart(*answers) < 1e-13  # kernels may add up in another order
            assert apart(self.forward(http, name, [], tokens), backbone.forward(tokens, pooling)) < 1e-5

    def test_dropout_is_the_same_in_a_repeated_call(self, server: Server, tiny_backbone: Callable[..., FrozenBackbone]):
        backbone, tokens = tiny_backbone("bert"), batch(4, 6)
        with httpx2.Client(base_url=server.url, timeout=60) as http:
            hashes, _ = self.uploaded(http, backbone, "bert", lora_dropout=0.3)
            first, again = (self.forward(http, "bert", hashes, tokens, seed=5) for _ in range(2))
            other = self.forward(http, "bert", hashes, tokens, seed=6)
        assert torch.equal(first, again)
        assert apart(first, other) > 1e-3


@pytest.fixture(scope="module")
def notes(film_examples: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = zip(film_examples.texts, film_examples.labels, strict=True)
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": int(y)}) for t, y in list(rows)[:160]))
    return path


class TestLabels:
    @pytest.mark.parametrize("method", ["padded-lora", "lora"])
    def test_operators_on_different_devices_train_together(
        self, method: str, start_server: StartServer, tiny_models: dict[str, Path], notes: Path, tmp_path: Path
    ):
        """Shares of a gradient add up although each was rounded in its own way."""
        adapters: list[dict[str, Tensor]] = []
        for number, pair in enumerate((("cpu", "cpu"), ("cpu", "cuda"))):
            out = tmp_path / str(number)
            shares = ["--set", "m=2"] if method == "lora" else []
            with ExitStack() as stack:
                a, b = (stack.enter_context(start_server(tiny_models["bert"], device=device)) for device in pair)
                run("labels", "train", "--server", a.url, "--server", b.url, "--data", notes, "--method", method,
                    *shares, "--output", out, "--steps", 6, "--batch-size", 16, "--validation", 0)  # fmt: skip
            found = sorted(out.rglob(ADAPTER))
            assert found
            adapters.append(load_file(found[0]))
        changes = [torch.cat([t.flatten() for name, t in a.items() if "lora_B" in name]) for a in adapters]
        assert changes[0].norm() > 0
        if method == "lora":  # of padded LoRA's pads each run draws its own
            assert apart(changes[1], changes[0]) < 0.3  # two pairs of CPUs: .09, since Adam makes much of little

    def test_an_audit_on_the_gpu_finds_what_one_on_the_cpu_finds(
        self, start_server: StartServer, tiny_models: dict[str, Path], notes: Path, tmp_path: Path
    ):
        seen = tmp_path / "seen"
        with start_server(tiny_models["bert"], device="cuda", record=seen) as server:
            run("labels", "train", "--server", server.url, "--data", notes, "--method", "lora",
                "--output", tmp_path / "out", "--steps", 10, "--batch-size", 16, "--validation", 0)  # fmt: skip
        found: list[dict[str, Any]] = []
        for device in DEVICES:
            results = tmp_path / f"{device}.json"
            run("labels", "audit", seen, "--labels", notes, "--points", 2, "--updates", 2, "--device", device,
                "--json", results, "--report", tmp_path / "audit.html")  # fmt: skip
            found.append(json.loads(results.read_text()))
        print(*(result["headline"] for result in found))
        cells = [{(f["channel"], f["attack"], f["step"], f["knows"]): f["auc"] for f in r["findings"]} for r in found]
        assert cells[0].keys() == cells[1].keys()
        differences = [abs(cells[0][key] - cells[1][key]) for key in cells[0]]
        assert sum(differences) / len(differences) < 0.02


DESIGNS = {
    "online": ("online", "--set", "up=fp32", "--set", "down=fp32"),
    "online int4": ("online", "--set", "up=int4", "--set", "down=int4"),
    "decorrelated": ("online", "--set", "decorrelation_weight=2"),
    "noisy": ("online", "--set", "noise=0.01", "--set", "clip_norm=4"),
    "whole weights": ("online", "--tune", "full", "--lr", "0.003"),
    "gradfree": ("gradfree",),
    "groups": ("gradfree", "--set", "anonymity=4"),
    "two points": ("gradfree", "--set", "zo=true"),
    "offline": ("offline",),
    "in the emulator": ("offline", "--set", "tune_emulator=true"),
    "offsite": ("offsite",),
}


class TestTexts:
    @pytest.fixture(scope="class")
    def model(self, film_sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_tiny_causal("llama", tmp_path_factory.mktemp("model") / "tiny", film_sentences[:400], layers=8)

    @pytest.fixture(scope="class")
    def public(self, film_sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("public") / "public.txt"
        path.write_text("\n".join(film_sentences[100:600]))
        return path

    @pytest.fixture(scope="class")
    def emulators(self, model: Path, public: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        """Built on each device."""
        folder = tmp_path_factory.mktemp("emulators")
        for device in DEVICES:
            run("emulator", "build", "--model", model, "--cut", 2, "--keep", 2, "--public", public, "--steps", 20,
                "--key", folder / "key.pem", "--output", folder / device, "--batch-size", 4, "--max-length", 24,
                "--device", device, "--int8")  # fmt: skip
        return {device: folder / device for device in DEVICES}

    @pytest.fixture(scope="class")
    def servers(self, model: Path, emulators: dict[str, Path], start_server: StartServer):
        """One on each device, with the same emulator."""
        with ExitStack() as stack:
            yield {
                device: stack.enter_context(start_server(model, cut=2, emulator=emulators["cpu"], device=device))
                for device in DEVICES
            }

    @pytest.fixture(scope="class")
    def questions(self, film_sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("data") / "questions.jsonl"
        short = [sentence for sentence in film_sentences if 4 <= len(sentence.split()) <= 12][:48]
        rows = [{"question": s, "choices": ["good", "bad", "fine"], "answer": i % 3} for i, s in enumerate(short)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    @staticmethod
    def train(url: str, questions: Path, output: Path, device: str, *options: object) -> dict[str, Any]:
        results = output.with_suffix(".json")
        run("texts", "train", "--server", url, "--data", questions, "--output", output, "--device", device,
            "--steps", 8, "--batch-size", 8, "--max-length", 24, "--json", results, "--design", *options)  # fmt: skip
        return json.loads(results.read_text())

    def test_an_emulator_is_distilled_to_the_same_loss(self, emulators: dict[str, Path]):
        found = [load_emulator(emulators[device]).manifest.distillation for device in DEVICES]
        assert found[0] is not None
        assert found[1] is not None
        for stage in ("full", "before", "after"):
            assert getattr(found[1], stage).lm_loss == pytest.approx(getattr(found[0], stage).lm_loss, rel=1e-3)

    @pytest.mark.parametrize("design", list(DESIGNS))
    def test_a_client_and_a_server_on_the_gpu_train_alike(
        self, design: str, servers: dict[str, Server], questions: Path, tmp_path: Path
    ):
        cpu, cuda = (
            self.train(servers[device].url, questions, tmp_path / str(number), device, *DESIGNS[design])
            for number, device in enumerate(DEVICES)
        )
        print(cpu["train_loss"], cuda["train_loss"], cpu["validation"], cuda["validation"])
        tolerance = 0.05 if design == "noisy" else 0.01
        assert cuda["train_loss"] == pytest.approx(cpu["train_loss"], rel=tolerance)
        assert cuda["validation"]["loss"] == pytest.approx(cpu["validation"]["loss"], rel=2 * tolerance)
        assert cuda["traffic"].keys() == cpu["traffic"].keys()
        assert cuda["client_flops"] == pytest.approx(cpu["client_flops"], rel=0.1)

    @pytest.mark.parametrize("design", ["online", "gradfree", "offline"])
    def test_a_run_goes_on_on_the_gpu(self, design: str, servers: dict[str, Server], questions: Path, tmp_path: Path):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        self.train(servers["cuda"].url, questions, whole, "cuda", design)
        self.train(servers["cuda"].url, questions, parts, "cuda", design, "--training", "save_every=3")
        state = [load_file(folder / ADAPTER) for folder in (whole, parts)]
        self.train(servers["cuda"].url, questions, parts, "cuda", design, "--resume")
        state.append(load_file(parts / ADAPTER))
        for other in state[1:]:
            assert all(torch.allclose(other[name], tensor, atol=1e-4) for name, tensor in state[0].items())

    def test_tuned_ends_go_back_to_a_provider_on_a_gpu(
        self, servers: dict[str, Server], questions: Path, tmp_path: Path
    ):
        out, results = tmp_path / "out", tmp_path / "deployed.json"
        self.train(servers["cpu"].url, questions, tmp_path / "ends", "cpu", "offline")
        start = ["--start", tmp_path / "ends"]
        self.train(servers["cuda"].url, questions, out, "cuda", "offline", "--set", "tune_emulator=true", *start)
        found: list[dict[str, Any]] = []
        for device in DEVICES:
            run("texts", "deploy", out, "--server", servers[device].url, "--data", questions, "--prompt", "the film is",
                "--max-new-tokens", 4, "--json", results)  # fmt: skip
            found.append(json.loads(results.read_text()))
        assert found[1]["deployed"]["loss"] == pytest.approx(found[0]["deployed"]["loss"], rel=1e-4)
        assert found[1]["texts"] == found[0]["texts"]
        aucs: list[list[float]] = []
        for device in DEVICES:
            run("texts", "membership", out, "--server", servers["cuda"].url, "--members", questions,
                "--others", questions, "--device", device, "--json", results)  # fmt: skip
            aucs.append([f["auc"] for f in json.loads(results.read_text())["findings"]])
        assert aucs[1] == pytest.approx(aucs[0], abs=0.01)

    def test_all_attacks_run_there_and_read_as_much(
        self, start_server: StartServer, questions: Path, public: Path, film_sentences: list[str], tmp_path: Path
    ):
        model, seen, truth = tmp_path / "llama", tmp_path / "seen", tmp_path / "truth.jsonl"
        save("llama", model, film_sentences[:600])
        with start_server(model, cut=2, record=seen, device="cuda") as server:
            options = ["--set", "decorrelation_weight=2", "--set", "noise=0.001", "--set", "clip_norm=8"]
            self.train(server.url, questions, tmp_path / "out", "cuda", "online", *options, "--ground-truth", truth)
        best: dict[str, dict[str, dict[str, float]]] = {}
        for device in DEVICES:
            results = tmp_path / f"{device}.json"
            run("texts", "audit", seen, "--ground-truth", truth, "--public", public, "--run", tmp_path / "out",
                "--sequences", 8, "--device", device, "--json", results)  # fmt: skip
            found = json.loads(results.read_text())
            assert found["valid"]
            best[device] = {
                kind: {f"{r['attack']}, {r['stage']}": r["metrics"]["accuracy"][0] for r in found[kind]}
                for kind in ("attacks", "adaptive", "control")
            }
        for kind, rows in best["cpu"].items():
            assert best["cuda"][kind].keys() == rows.keys()
            print(kind, {name: (round(value, 2), round(best["cuda"][kind][name], 2)) for name, value in rows.items()})
            strongest = [max(best[device][kind].values()) for device in DEVICES]
            assert strongest[1] == pytest.approx(strongest[0], abs=0.1)
        assert "BiSR, end" in best["cuda"]["attacks"]


class TestMemory:
    def test_what_does_not_fit_is_refused_after_caches_were_emptied(self):
        torch.cuda.empty_cache()
        kept = [torch.ones(2**28, device="cuda")]  # 1 GiB that a cache holds
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
        try:
            fits = with_room(lambda: float(torch.ones(2**28, device="cuda").sum()), kept.clear)
            assert fits == 2.0**28
            assert not kept
            with pytest.raises(OutOfMemory, match="memory"):
                with_room(lambda: torch.ones(2**30, device="cuda"), kept.clear)
            assert float(torch.ones(8, device="cuda").sum()) == 8
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
