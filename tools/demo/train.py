"""Trains m1-tiny, the built-in demo: `python -m tools.demo.train --data DIR --work DIR`.

What it is: a plain training loop for a native M1 (learned convolution taps, both kinds of layer,
NormHead, chat markers): AdamW, bf16 autocast where the CPU or GPU has it, and a learning rate that
falls to zero over `--minutes` of training time. It saves every few minutes and goes on where it
was cut off. What it is not: a way to train anything large.

The result lies in WORK/model: a checkpoint folder like any other, in bf16.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from m1local.config import M1Config
from m1local.model import M1Model
from m1local.tokenizer import M1Tokenizer, Message
from tools.demo.corpus import (
    Conversations,
    HeldOut,
    cut_documents,
    read_medquad,
    read_texts,
    well_known,
)
from tools.demo.vocabulary import train_tokenizer

ROW_TOKENS = 768
DOCUMENT_SHARE = 0.2  # of the tokens of an epoch; the rest is conversations
LAST_PART = 0.84  # of the time; from here on the well-known diseases
SAVE_SECONDS = 180

CONFIG: dict[str, Any] = {
    "architectures": ["BaichuanM1ForCausalLM"],
    "model_type": "baichuan_m1",
    "vocab_size": 3584,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 8,
    "num_swa_key_value_heads": 4,
    "sliding_window": 128,
    "sliding_window_layers": [1, 3],
    "conv_window": 2,
    "max_position_embeddings": ROW_TOKENS,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
# Low temperature and a light penalty: a model this small loops easily.
GENERATION = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.85,
    "repetition_penalty": 1.1,
    "max_new_tokens": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "user_token_id": 6,
    "assistant_token_id": 7,
}


@dataclass(slots=True)
class Progress:
    """What a resumed run must know besides weights and optimizer."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0


class Rows:
    """Cuts conversations and documents into rows of ids, each beginning at a turn or a document."""

    def __init__(self, data: Path, tokenizer: M1Tokenizer) -> None:
        """Read the text under `data`/train; refuse what `data`/eval holds out."""
        held_out = HeldOut(data / "eval")
        entries = [
            entry
            for entry in read_medquad(data / "train/medquad_train.jsonl")
            if held_out.find(" ".join(entry.sentences)) is None
        ]
        texts = read_texts(data / "train", entries)
        held_out.check(texts)
        self._entries = entries
        patients = [entry for entry in entries if entry.for_patients]
        self._documents = cut_documents(read_texts(data / "train", patients))
        self._tokenizer = tokenizer

    def epoch(self, seed: int) -> list[tuple[list[int], list[bool]]]:
        """All rows of one epoch, shuffled: ids (ROW_TOKENS + 1) and which of them are learned."""
        order = random.Random(seed)
        items = [self._conversation(c) for c in Conversations(self._entries, seed=seed).epoch()]
        budget = sum(len(ids) for ids, _ in items) * DOCUMENT_SHARE / (1 - DOCUMENT_SHARE)
        for text in order.sample(self._documents, len(self._documents)):
            ids = [*self._tokenizer.encode(text), CONFIG["eos_token_id"]]
            items.append((ids, [True] * len(ids)))
            budget -= len(ids)
            if budget < 0:
                break
        order.shuffle(items)
        return list(self._pack(items))

    def last_epoch(self, seed: int) -> list[tuple[list[int], list[bool]]]:
        """Rows for the end of training: well-known diseases, and a fifth of anything else."""
        order = random.Random(seed)
        known = Conversations(well_known(self._entries), seed=seed, sentence_counts=(2,))
        items = [self._conversation(c) for _ in range(4) for c in known.epoch()]
        others = [self._conversation(c) for c in Conversations(self._entries, seed=seed).epoch()]
        items += order.sample(others, min(len(others), len(items) // 4))
        order.shuffle(items)
        return list(self._pack(items))

    def _conversation(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        learned: list[bool] = []
        for message in messages:
            turn = self._tokenizer.render([message])
            # An answer ends with the marker of the next turn, which is learned with it.
            ends_answer = bool(ids) and message.role == "user"
            ids += turn
            is_answer = message.role == "assistant"
            learned += [ends_answer and learned[-1], *[is_answer] * (len(turn) - 1)]
        return [*ids, CONFIG["eos_token_id"]], [*learned, True]

    @staticmethod
    def _pack(items: list[tuple[list[int], list[bool]]]) -> Iterator[tuple[list[int], list[bool]]]:
        row: list[int] = []
        learned: list[bool] = []
        for ids, flags in items:
            row += ids
            learned += flags
            if len(row) > ROW_TOKENS:
                yield row[: ROW_TOKENS + 1], learned[: ROW_TOKENS + 1]
                row, learned = [], []


def initialize(model: M1Model) -> None:
    """Small normal matrices; taps that begin near identity but free to move."""
    residual = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if "conv_" in name:
            parameter.data.copy_(torch.tensor([0.1, 0.9]).expand(parameter.shape))
        elif "norm" not in name:
            std = 0.02 if "embed" in name else parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= residual
            torch.nn.init.normal_(parameter, std=std)


def losses(model: M1Model, ids: Tensor, learned: Tensor) -> Tensor:
    """Mean cross entropy over the learned next tokens of ids (B, T + 1)."""
    hidden_states = model.model(ids[:, :-1])
    head = functional.normalize(model.lm_head.weight, dim=-1)  # NormHead, differentiable
    logits = functional.linear(hidden_states, head).float()
    targets = torch.where(learned[:, 1:], ids[:, 1:], -100)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


class Trainer:
    """Model, optimizer and progress, saved and restored together."""

    def __init__(self, work: Path, device: str, peak_rate: float) -> None:
        """Start afresh, or from WORK/state.pt where a run was cut off."""
        self.model = M1Model(M1Config.from_dict(CONFIG)).to(device)
        initialize(self.model)
        self.progress = Progress()
        self.curve: list[dict[str, float]] = []
        self.peak_rate = peak_rate
        self._smoothed = 0.0
        self._bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": others},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self._state = work / "state.pt"
        if self._state.exists():
            self._restore(device)

    def set_rate(self, done: float) -> None:
        """Warm up over 2 % of the time, hold, then fall to zero over the last 60 %."""
        scale = min(1.0, done / 0.02 + 1e-3, (1.0 - done) / 0.6)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_rate * max(scale, 0.0)

    def step(self, ids: Tensor, learned: Tensor) -> None:
        """One update."""
        begun = time.monotonic()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            loss = losses(self.model, ids, learned)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        self._smoothed = 0.98 * self._smoothed + 0.02 * value if self._smoothed else value
        self.progress.seconds += time.monotonic() - begun
        self.progress.steps += 1
        self.progress.tokens += ids.shape[0] * ROW_TOKENS

    def report(self) -> None:
        """Print where we are and keep it for the curve."""
        progress = self.progress
        self.curve.append({"tokens": progress.tokens, "loss": round(self._smoothed, 4)})
        print(
            f"step {progress.steps}  {progress.seconds / 60:.1f} min  "
            f"{progress.tokens / progress.seconds:.0f} tokens/s  loss {self._smoothed:.3f}",
            flush=True,
        )

    def report_held_out(self, perplexity: float) -> None:
        """Print and keep a perplexity on held-out answers."""
        point = {"tokens": self.progress.tokens, "held_out_perplexity": round(perplexity, 3)}
        self.curve.append(point)
        print(f"saved; held-out perplexity {perplexity:.2f}", flush=True)

    def save(self) -> None:
        """Write the state so that a cut at any moment leaves the old one or the new one."""
        partial = self._state.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": vars_of(self.progress),
                "curve": self.curve,
            },
            partial,
        )
        os.replace(partial, self._state)

    def _restore(self, device: str) -> None:
        state = torch.load(self._state, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self.curve = state["curve"]


def vars_of(progress: Progress) -> dict[str, float]:
    """The fields of `progress`, for saving."""
    return {"seconds": progress.seconds, "steps": progress.steps, "tokens": progress.tokens}


@torch.inference_mode()
def held_out_perplexity(model: M1Model, tokenizer: M1Tokenizer, path: Path, rows: int) -> float:
    """Perplexity per token of the first `rows` answers in medquad_dev.jsonl, given the question."""
    total, count = 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines()[:rows]:
        row = json.loads(line)
        question = tokenizer.render([Message("user", row["question"])])
        answer = tokenizer.render([Message("assistant", row["answer"])])
        ids = torch.tensor([(question + answer)[: ROW_TOKENS + 1]])
        learned = torch.arange(ids.shape[1])[None] > len(question)
        if not learned.any():
            continue
        total += float(losses(model, ids, learned)) * int(learned.sum())
        count += int(learned.sum())
    return math.exp(total / count)


def export(trainer: Trainer, work: Path, arguments: argparse.Namespace) -> None:
    """Write WORK/model: bf16 weights, configuration, tokenizer (already there), training record."""
    folder = work / "model"
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in trainer.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    record = {
        "parameters": sum(v.numel() for v in weights.values()),
        "minutes": round(trainer.progress.seconds / 60, 1),
        "steps": trainer.progress.steps,
        "tokens": trainer.progress.tokens,
        "batch_rows": arguments.batch,
        "row_tokens": ROW_TOKENS,
        "peak_rate": arguments.rate,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "curve": trainer.curve,
    }
    (work / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def prepare_tokenizer(data: Path, folder: Path) -> M1Tokenizer:
    """The tokenizer in `folder`, trained on the same text first where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.model").exists():
        entries = read_medquad(data / "train/medquad_train.jsonl")
        texts = cut_documents(read_texts(data / "train", entries))
        train_tokenizer(texts, folder, vocab_size=int(CONFIG["vocab_size"]))
    return M1Tokenizer.from_folder(folder)


def train(arguments: argparse.Namespace) -> None:
    """Run until the time is used up; resume where WORK holds a state."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    tokenizer = prepare_tokenizer(arguments.data, arguments.work / "model")
    rows = Rows(arguments.data, tokenizer)
    trainer = Trainer(arguments.work, device, arguments.rate)
    if arguments.compile:
        trainer.model.model.compile()
    progress, seconds = trainer.progress, arguments.minutes * 60
    saved_at = time.monotonic()
    while progress.seconds < seconds:
        seed = arguments.seed * 1000 + progress.steps
        last = progress.seconds > LAST_PART * seconds
        epoch = rows.last_epoch(seed) if last else rows.epoch(seed)
        for ids, learned in batches(epoch, arguments.batch):
            trainer.set_rate(progress.seconds / seconds)
            trainer.step(ids.to(device), learned.to(device))
            if progress.steps % 25 == 0:
                trainer.report()
            finished = progress.seconds >= seconds
            if finished or time.monotonic() - saved_at > SAVE_SECONDS:
                trainer.save()
                dev = arguments.data / "eval/medquad_dev.jsonl"
                trainer.report_held_out(held_out_perplexity(trainer.model, tokenizer, dev, 40))
                saved_at = time.monotonic()
            if finished:
                break
    export(trainer, arguments.work, arguments)


def batches(
    epoch: list[tuple[list[int], list[bool]]], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in batches: ids (B, T + 1) and which of them are learned."""
    for first in range(0, len(epoch) - size + 1, size):
        chosen = epoch[first : first + size]
        yield (
            torch.tensor([ids for ids, _ in chosen]),
            torch.tensor([flags for _, flags in chosen]),
        )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--work", type=Path, required=True, help="folder for state and result")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=4, help=f"rows of {ROW_TOKENS} tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
