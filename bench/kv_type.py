"""What a context in bytes costs: `python -m bench.kv_type --text medquad_dev.jsonl`.

What it is: the demo (or any original that fits in memory) reading held-out answers a few tokens at
a time, with the cache as it is and in q8_0, and the KL divergence between the two. What it is not:
the cost of quantized weights; that is bench/quality.py.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import describe_machine
from bench.quality import read_samples
from m1local.cache import KVCache
from m1local.checkpoint import load_model
from m1local.home import DEMO
from m1local.kv_store import BYTES, FLOAT
from m1local.model import M1Model
from m1local_quantize.evaluate import Sample
from m1local_quantize.source import Source

AT_A_TIME = 8  # tokens: what the kernels for answers read


@torch.inference_mode()
def log_probabilities(model: M1Model, sample: Sample, kv_type: str) -> Tensor:
    """(T, V) of the judged tokens, read through a cache of that type."""
    ids = torch.tensor([sample.token_ids])
    cache = KVCache.allocate(
        model.config, ids.shape[1], dtype=torch.float32, max_chunk=AT_A_TIME, kv_type=kv_type
    )
    parts = [model(chunk, cache) for chunk in torch.split(ids, AT_A_TIME, dim=1)]
    return torch.cat(parts, 1)[0, sample.first_judged - 1 : -1].log_softmax(-1)


def divergence(model: M1Model, samples: Sequence[Sample]) -> dict[str, float]:
    """Mean and 99 % KL divergence and top-1 agreement of the two caches."""
    found, same = [], []
    for sample in samples:
        exact = log_probabilities(model, sample, FLOAT)
        rounded = log_probabilities(model, sample, BYTES)
        found.append((exact.exp() * (exact - rounded)).sum(-1))
        same.append((exact.argmax(-1) == rounded.argmax(-1)).float())
    kl, agreement = torch.cat(found), torch.cat(same)
    return {
        "tokens": len(kl),
        "mean_kl": round(float(kl.mean()), 6),
        "p99_kl": round(float(kl.quantile(0.99)), 6),
        "top1_agreement": round(float(agreement.mean()), 5),
    }


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="questions and answers, .jsonl")
    parser.add_argument("--model", type=Path, default=DEMO, help="an original checkpoint")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("bench/results/kv_type.json"))
    given = parser.parse_args()
    source = Source.open(given.model)
    samples = read_samples(
        given.text,
        source.tokenizer,
        system="Answer in detail.",
        rows=given.rows,
        length=source.config.max_position_embeddings,
    )
    result = {
        "command": f"python -m bench.kv_type --text {given.text.name} --rows {given.rows}",
        "machine": describe_machine(),
        **divergence(load_model(given.model, dtype=torch.float32), samples),
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
