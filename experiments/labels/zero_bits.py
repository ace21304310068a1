"""Compares the methods that send nothing about labels: what they cost, and how well they predict.

python -m experiments.labels.zero_bits TASK [--methods features,tangent-sketch+directions=16] [--seeds 1] [--train N]

A method is followed by what differs from its defaults, as in `experiments.labels.run`. With `--train N` and `--held-out
N`, random parts of the texts are used. One JSON file for each method and seed.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blindtune.client import Backbone
from blindtune.data import Examples, split_examples
from blindtune.labels import LinearHead, PrivateModel, TangentSketch, evaluate, make_method
from blindtune.labels.methods import options_of
from blindtune.local import local_operators
from blindtune.models import FrozenBackbone, load_backbone
from experiments.labels.run import read_settings
from experiments.labels.tasks import TASKS, Task

RESULTS = Path(__file__).parents[1] / "results" / "labels" / "zero_bits"


def passes(model: PrivateModel) -> float:
    """Passes through the whole model for each text: the frozen features, and those of the tangents."""
    method, blocks = model.method, model.backbone.info.layers
    if not isinstance(method, TangentSketch):
        return 1.0
    adapted = len(method.blocks_of(model.backbone.info)) / blocks
    requests = method.requests_per_text - 1  # the blocks below run once in each
    return 1.0 + 2 * method.directions * adapted + requests * (1.0 - adapted)


def measure(task: Task, hosted: FrozenBackbone, parts: tuple[Examples, ...], arm: str, seed: int) -> dict[str, Any]:
    """Fits one method; returns its accuracies and costs."""
    train, validation, test = parts
    name, options = read_settings(arm)
    method = make_method(name, options)
    pairs = method.reads["pairs"] if task.pair is not None else "joint"
    pool = local_operators(hosted, count=1)
    backbone = Backbone(pool, readout=method.reads["readout"], pairs=pairs, num_adapters=0, max_length=task.max_length,
                        codec="fp16")  # fmt: skip
    model = PrivateModel(backbone, LinearHead(backbone.hidden_size, len(train.classes)), method, seed=seed)
    before, start = backbone.traffic, time.perf_counter()
    method.inputs(backbone, backbone.rows([*train.texts, *validation.texts, *test.texts]))
    seconds, after = time.perf_counter() - start, backbone.traffic
    texts = sum(len(part) for part in parts)
    model.prepare(train.texts, train.labels or [])
    choice = model.choice
    result = {
        "method": name, "options": options_of(method), "seed": seed, "train": len(train),
        "chosen": str(choice and choice.chosen), "cross_validated": choice and choice.chosen.accuracy,
        "validation": evaluate(model, validation), "test": evaluate(model, test), "test_texts": len(test),
        "best_by_weight": best_by_weight(model), "passes_per_text": passes(model),
        "bytes_sent_per_text": (after.sent - before.sent) / texts,
        "bytes_received_per_text": (after.received - before.received) / texts, "seconds": seconds,
    }  # fmt: skip
    backbone.close()
    return result


def best_by_weight(model: PrivateModel) -> dict[str, float]:
    """The best cross-validated accuracy with each weight of the sketch; 0 is the kernel of features alone."""
    best: dict[str, float] = {}
    for tried in model.choice.tried if model.choice else []:
        if "weight" in tried.settings:
            weight = f"{tried.settings['weight']:g}"
            best[weight] = max(best.get(weight, 0.0), tried.accuracy)
    return best


def some(examples: Examples, most: int | None, seed: int) -> Examples:
    """A random part of examples, the same for all methods."""
    if most is None or len(examples) <= most:
        return examples
    return split_examples(examples, most / len(examples), seed)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--methods", default="features,tangent-sketch")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--train", type=int)
    parser.add_argument("--held-out", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = replace(TASKS[given.task], most_train=None, most_test=given.held_out)
    hosted = load_backbone(task.model)
    train, *held_out = task.load()
    for seed in map(int, given.seeds.split(",")):
        parts = (some(train, given.train, seed), *held_out)
        for arm in given.methods.split(","):
            result = {"task": given.task, "arm": arm, **measure(task, hosted, parts, arm, seed)}
            suffix = "" if given.train is None else f"-{given.train}"
            path = RESULTS / given.task / f"{arm}-{seed}{suffix}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
