"""How often the audit raises a false alarm, and how often it finds a weak leak. Writes results/audit_power.json.

Synthetic runs go through the audit's own attacks and statistics: random features for the channels and looks of a
run, random labels. In half of the runs one channel's leading direction tells the label with an AUC of 0.65.
An alarm is a permutation p-value of the headline (the maximum over everything) of at most 0.05.

python -m experiments.audit_power [RUNS]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta, norm

from blindtune.audit.attackers import Attacked
from blindtune.audit.channel_id import ChannelId, ChannelKind
from blindtune.audit.labels import ATTACKS, Channel
from blindtune.audit.statistics import chance_of_maximum

RESULT = Path(__file__).parent / "results" / "audit_power.json"
RUNS, TEXTS, DIM, CHANNELS, LOOKS = 200, 600, 24, 4, 3
LEAK, LEVEL, PERMUTATIONS = 0.65, 0.05, 400


def one_run(seed: int, leak: float | None) -> tuple[float, float]:
    """The headline's AUC and p-value; `leak` is the AUC of one channel's leading direction, or None."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, TEXTS)
    rows = list(range(TEXTS))
    attacked = Attacked("synthetic", LOOKS, TEXTS)
    attacks = [attack for attack in ATTACKS.values() if attack.unsupervised]
    scales = np.exp(-np.arange(DIM) / 6)
    base = random.normal(0, 1, (CHANNELS, TEXTS, DIM))
    for look in range(LOOKS):
        features = (base + 0.5 * random.normal(0, 1, base.shape)) * scales  # looks of one run resemble each other
        if leak is not None and look > 0:
            separation = np.sqrt(2) * norm.ppf(leak)  # of two normal distributions with this AUC
            features[0, :, 0] = 3 * (random.normal(0, 1, TEXTS) + separation * labels)
        for index, channel in enumerate(features.astype(np.float32)):
            attacked.attack(
                ChannelId(ChannelKind.ACTIVATION, adapter=index), look, Channel(channel), rows, labels, attacks
            )
    headline = max(finding.auc for finding in attacked.findings)
    chance = chance_of_maximum(attacked.cached, attacked.labels, permutations=PERMUTATIONS, seed=seed)
    return headline, chance.p


def share(hits: int, runs: int) -> dict[str, Any]:
    """With a 95% Clopper-Pearson interval."""
    low = beta.ppf(0.025, hits, runs - hits + 1) if hits else 0.0
    high = beta.ppf(0.975, hits + 1, runs - hits) if hits < runs else 1.0
    return {"share": hits / runs, "low": float(low), "high": float(high), "hits": hits, "runs": runs}


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    start = time.perf_counter()
    null = [one_run(seed, None) for seed in range(runs)]
    planted = [one_run(10_000 + seed, LEAK) for seed in range(runs)]
    result = {
        "false_alarms": share(sum(p <= LEVEL for _, p in null), runs),
        "found": share(sum(p <= LEVEL for _, p in planted), runs),
        "headline_under_null": {"mean": float(np.mean([a for a, _ in null])), "max": max(a for a, _ in null)},
        "planted_auc": LEAK,
        "level": LEVEL,
        "permutations": PERMUTATIONS,
        "texts": TEXTS,
        "scores_per_run": CHANNELS * LOOKS * sum(attack.unsupervised for attack in ATTACKS.values()),
        "seconds": round(time.perf_counter() - start, 1),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
