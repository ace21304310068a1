"""What the benchmarks share: real servers, real text, paired timing, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

from blindtune.cli.processes import local_servers
from blindtune.data.film_reviews import film_reviews
from blindtune.models import LoraAdapter, Tokens, find_source

RESULTS = Path(__file__).parent / "results"
CACHE = Path(".cache")
MODEL = "minilm"
BATCH = 32


def sentences(count: int) -> tuple[list[str], list[int]]:
    """Real film-review sentences with binary labels."""
    examples = film_reviews(CACHE).take(range(count))
    return [str(text) for text in examples.texts], list(examples.labels or [])


@contextmanager
def servers(dtype: str = "float32") -> Generator[list[str]]:
    """Addresses of two operators in processes of their own, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in "ab"]
        with local_servers(MODEL, places, threads=1, dtype=dtype) as started:
            yield [server.url for server in started]


class LocalPeft(nn.Module):
    """The stock way: PEFT on the whole model in this process, mean pooling over tokens."""

    def __init__(self, config: LoraConfig, adapter: LoraAdapter | None = None) -> None:
        super().__init__()
        source = find_source(MODEL)
        self.model = get_peft_model(AutoModel.from_pretrained(source.location), config).eval()
        if adapter is not None:
            self.copy_from(adapter)

    def copy_from(self, adapter: LoraAdapter) -> None:
        named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, matrices in adapter.named_matrices().items():
                for part, matrix in zip(("lora_A", "lora_B"), matrices, strict=True):
                    named[f"base_model.model.{name}.{part}.default.weight"].copy_(matrix)

    def matrices(self, adapter: LoraAdapter) -> list[tuple[Tensor, Tensor]]:
        """Pairs of (our parameter, PEFT's parameter)."""
        named = dict(self.model.named_parameters())
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, matrices in adapter.named_matrices().items():
            for part, matrix in zip(("lora_A", "lora_B"), matrices, strict=True):
                pairs.append((matrix, named[f"base_model.model.{name}.{part}.default.weight"]))
        return pairs

    def forward(self, tokens: Tokens) -> Tensor:
        ids, lengths = tokens.input_ids.long(), tokens.lengths.long()
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if tokens.token_type_ids is not None:
            arguments["token_type_ids"] = tokens.token_type_ids.long()
        hidden = self.model(**arguments).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return (hidden * weights).sum(1) / weights.sum(1)


def relative_error(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """‖a − b‖ / ‖b‖ over all pairs together."""
    difference = sum(float((a - b).double().pow(2).sum()) for a, b in pairs)
    return (difference / sum(float(b.double().pow(2).sum()) for _, b in pairs)) ** 0.5


def interleaved(tasks: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each task, run in turn so that noise of the machine hits all alike. One warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Median of paired ratios, with the quartiles."""
    ratios = sorted(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "q25": low, "q75": high, "pairs": len(ratios)}


def write(name: str, result: dict[str, Any]) -> None:
    """Prints the result and writes it with what it was measured on."""
    RESULTS.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    document = {"machine": machine, **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))
