"""Whether the demo learned anything: `python -m bench.demo --data DIR --first FOLDER`.

What it is: perplexity on held-out answers beside simpler models of the same text and beside the
demo with its convolution or its window disabled; choosing the right one of four answers; thirty
fixed questions. What it is not: what quantization costs; that is bench/quality.py. Writes
bench/results/demo.json, from which the model card is made.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional

from bench.machine import describe_machine
from m1local.checkpoint import load_model
from m1local.engine import Engine
from m1local.home import DEMO
from m1local.model import M1Attention, M1Model
from m1local.tokenizer import M1Tokenizer, Message
from m1local_quantize.evaluate import Sample
from tools.demo.corpus import DETAILED, cut_documents, read_medquad, read_texts
from tools.demo.questions import answer_all, summary

OPTIONS = 4


def sample(tokenizer: M1Tokenizer, question: str, answer: str, system: str, length: int) -> Sample:
    """An answer to be judged given its question, cut to `length` tokens."""
    asked = [Message("user", question)]
    if system:
        asked.insert(0, Message("system", system))
    prompt = tokenizer.render(asked)
    token_ids = (prompt + tokenizer.render([Message("assistant", answer)]))[:length]
    return Sample(tuple(token_ids), len(prompt) + 1)


@torch.inference_mode()
def log_probability(model: M1Model, judged: Sample) -> tuple[float, int]:
    """Natural log of the probability of the judged tokens, and how many they are."""
    ids = torch.tensor([judged.token_ids])
    targets = ids[0, judged.first_judged :]
    log_probs = model(ids)[0, judged.first_judged - 1 : -1].log_softmax(-1)
    return -float(functional.nll_loss(log_probs, targets, reduction="sum")), targets.numel()


def total_nats(model: M1Model, samples: Iterable[Sample]) -> float:
    """What all judged tokens cost."""
    return -sum(log_probability(model, judged)[0] for judged in samples)


def with_identity_taps(model: M1Model) -> None:
    """Let every token's keys and values be its own: what a model without convolution does."""
    for name, parameter in model.named_parameters():
        if "conv_" in name:
            parameter.data.copy_(torch.tensor([0.0, 1.0]).expand(parameter.shape))


def with_mean_taps(model: M1Model) -> None:
    """As `with_identity_taps`, but with the weight both taps had together."""
    for name, parameter in model.named_parameters():
        if "conv_" in name:
            both = parameter.data.sum(-1, keepdim=True)
            parameter.data.copy_(torch.cat((torch.zeros_like(both), both), dim=-1))


def without_window(model: M1Model) -> None:
    """Let the sliding layers see everything."""
    for module in model.modules():
        if isinstance(module, M1Attention):
            module.layout = replace(module.layout, window=None)


class NGrams:
    """Unigrams, and bigrams that fall back to them (Witten-Bell), over token ids."""

    def __init__(self, texts: Iterable[list[int]], vocabulary: int) -> None:
        """Count `texts`."""
        self._vocabulary = vocabulary
        self._single: Counter[int] = Counter()
        self._pairs: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for ids in texts:
            self._single.update(ids)
            for first, second in pairwise(ids):
                self._pairs[first][second] += 1
        self._total = self._single.total()
        self._followers = {first: after.total() for first, after in self._pairs.items()}

    def unigram(self, before: int, token: int) -> float:
        """P(token), with one imagined occurrence of every token."""
        return (self._single[token] + 1) / (self._total + self._vocabulary)

    def bigram(self, before: int, token: int) -> float:
        """P(token | before)."""
        after, seen = self._pairs.get(before, Counter()), self._followers.get(before, 0)
        kinds = len(after) or 1
        known = after[token] if seen else 0
        return (known + kinds * self.unigram(before, token)) / (seen + kinds)

    @staticmethod
    def nats(probability: Callable[[int, int], float], samples: Iterable[Sample]) -> float:
        """What the judged tokens of `samples` cost."""
        total = 0.0
        for judged in samples:
            ids = judged.token_ids
            total -= sum(
                math.log(probability(ids[i - 1], ids[i]))
                for i in range(judged.first_judged, len(ids))
            )
        return total


def selection_accuracy(model: M1Model, tokenizer: M1Tokenizer, path: Path, length: int) -> float:
    """Share of questions whose right answer gains most by the question being asked."""
    right = 0
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        row = json.loads(line)
        gains = []
        for option in row["options"]:
            asked = sample(tokenizer, row["question"], option, DETAILED, length)
            unasked = sample(tokenizer, "", option, DETAILED, length)
            gains.append(log_probability(model, asked)[0] - log_probability(model, unasked)[0])
        right += gains.index(max(gains)) == row["answer_idx"]
    return right / len(lines)


def perplexities(
    folder: Path, first: Path | None, data: Path, rows: list[dict[str, str]]
) -> dict[str, float]:
    """Perplexity per token of the demo's vocabulary, whichever model reads the answers."""
    tokenizer, model = M1Tokenizer.from_folder(folder), load_model(folder, dtype=torch.float32)
    length = model.config.max_position_embeddings

    def samples_for(reader: M1Tokenizer, system: str, most: int) -> list[Sample]:
        return [sample(reader, row["question"], row["answer"], system, most) for row in rows]

    samples = samples_for(tokenizer, DETAILED, length)
    count = sum(len(s.token_ids) - s.first_judged for s in samples)
    nats = {"the demo": total_nats(model, samples)}
    plain = samples_for(tokenizer, "", length)
    nats["the demo, without asking for detail"] = total_nats(model, plain)
    for name, change in (
        ("taps (0, 1)", with_identity_taps),
        ("taps (0, sum of both)", with_mean_taps),
        ("no window", without_window),
    ):
        changed = load_model(folder, dtype=torch.float32)
        change(changed)
        nats[f"the demo, {name}"] = total_nats(changed, samples)
    entries = read_medquad(data / "train/medquad_train.jsonl")
    texts = cut_documents(read_texts(data / "train", entries))
    ngrams = NGrams((tokenizer.encode(text) for text in texts), model.config.vocab_size)
    nats["bigrams"] = ngrams.nats(ngrams.bigram, samples)
    nats["unigrams"] = ngrams.nats(ngrams.unigram, samples)
    if first is not None:
        earlier, reader = load_model(first, dtype=torch.float32), M1Tokenizer.from_folder(first)
        most = earlier.config.max_position_embeddings
        cut = samples_for(reader, "", most)
        judged = sum(len(s.token_ids) - s.first_judged for s in cut)
        whole = sum(len(s.token_ids) - s.first_judged for s in samples_for(reader, "", 1 << 30))
        # What it cannot read for its shorter context is taken to cost as much as the rest.
        nats["the first demo"] = total_nats(earlier, cut) * whole / judged
    return {name: round(math.exp(value / count), 2) for name, value in nats.items()}


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--first", type=Path, help="an earlier demo, to compare with")
    parser.add_argument("--output", type=Path, default=Path("bench/results/demo.json"))
    arguments = parser.parse_args()
    evaluation: Path = arguments.data / "eval"
    lines = (evaluation / "medquad_dev.jsonl").read_text(encoding="utf-8").splitlines()
    model = load_model(arguments.model, dtype=torch.float32)
    tokenizer = M1Tokenizer.from_folder(arguments.model)
    selection = evaluation / "medquad_selection_dev.jsonl"
    answers = answer_all(Engine.load(arguments.model))
    result = {
        "command": "python -m bench.demo --data DIR --first FOLDER",
        "machine": describe_machine(),
        "rows": len(lines),
        "questions": summary(answers),
        "answers": [asdict(answer) for answer in answers],
        "selection_accuracy": round(
            selection_accuracy(model, tokenizer, selection, model.config.max_position_embeddings), 3
        ),
        "perplexity": perplexities(
            arguments.model, arguments.first, arguments.data, [json.loads(line) for line in lines]
        ),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "answers"}, indent=1))
    for answer in answers:
        marks = "".join("x" if ok else "." for ok in (answer.ends, answer.is_about_subject))
        print(f"{marks} {answer.repeats}  {answer.question}  {answer.text}")
    arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
