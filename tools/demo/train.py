"""Trains m1-tiny, the built-in demo: `python -m tools.demo.train --data DIR --work DIR`.

What it is: a plain training loop for a native M1 (learned convolution taps, both kinds of layer,
NormHead, chat markers): Muon for the matrices, AdamW for the rest, bf16 autocast where the CPU or
GPU has it, and a learning rate that falls to zero over `--minutes` of training time. It saves
every few minutes and goes on where it was cut off. What it is not: a way to train anything large.

The result lies in WORK/model: a checkpoint folder like any other, in bf16.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from m1local.config import M1Config
from m1local.model import M1Model
from m1local.tokenizer import M1Tokenizer, Message
from tools.demo.config import CONFIG, CONTEXT, GENERATION
from tools.demo.corpus import DETAILED, cut_documents, read_medquad, read_texts
from tools.demo.muon import Muon
from tools.demo.rows import BATCH_TOKENS, ROW_TOKENS, Mixture, pack
from tools.demo.vocabulary import train_tokenizer

LAST_PART = 0.64  # of the time; from here on mostly short conversations
SAVE_SECONDS = 240
ADAM_RATE = 4e-3  # embedding, head, norms, taps
MUON_RATE = 2e-2  # all other matrices


@dataclass(slots=True)
class Progress:
    """What a resumed run must know besides weights and optimizer."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0


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
    chosen = learned[:, 1:]
    hidden_states = model.model(ids[:, :-1])[chosen]  # the head is not computed for the others
    head = functional.normalize(model.lm_head.weight, dim=-1)  # NormHead, differentiable
    logits = functional.linear(hidden_states, head).float()
    return functional.cross_entropy(logits, ids[:, 1:][chosen])


class Trainer:
    """Model, optimizer and progress, saved and restored together."""

    def __init__(self, work: Path, device: str) -> None:
        """Start afresh, or from WORK/state.pt where a run was cut off."""
        self.model = M1Model(M1Config.from_dict(CONFIG)).to(device)
        initialize(self.model)
        self.progress = Progress()
        self.curve: list[dict[str, float]] = []
        self._smoothed = 0.0
        self._bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
        body: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            is_body = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
            (body if is_body else others).append(parameter)
        self.optimizers = (
            Muon(body, lr=MUON_RATE),
            torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._state = work / "state.pt"
        if self._state.exists():
            self._restore(device)

    def set_rate(self, done: float) -> None:
        """Warm up over 2 % of the time, hold, then fall to zero over the last 60 %."""
        scale = min(1.0, done / 0.02 + 1e-3, (1.0 - done) / 0.6)
        for optimizer, rate in zip(self.optimizers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * max(scale, 0.0)

    def step(self, ids: Tensor, learned: Tensor) -> None:
        """One update."""
        begun = time.monotonic()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            loss = losses(self.model, ids, learned)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        self._smoothed = 0.98 * self._smoothed + 0.02 * value if self._smoothed else value
        self.progress.seconds += time.monotonic() - begun
        self.progress.steps += 1
        self.progress.tokens += BATCH_TOKENS

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
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "progress": vars_of(self.progress),
                "curve": self.curve,
            },
            partial,
        )
        os.replace(partial, self._state)

    def _restore(self, device: str) -> None:
        state = torch.load(self._state, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        self.curve = state["curve"]


def vars_of(progress: Progress) -> dict[str, float]:
    """The fields of `progress`, for saving."""
    return {"seconds": progress.seconds, "steps": progress.steps, "tokens": progress.tokens}


@torch.inference_mode()
def held_out_perplexity(model: M1Model, tokenizer: M1Tokenizer, path: Path, rows: int) -> float:
    """Perplexity per token of every n-th of the answers in medquad_dev.jsonl, `rows` in all."""
    lines = path.read_text(encoding="utf-8").splitlines()
    total, count = 0.0, 0
    for line in lines[:: len(lines) // rows]:
        row = json.loads(line)
        asked = [Message("system", DETAILED), Message("user", row["question"])]
        question = tokenizer.render(asked)
        answer = tokenizer.render([Message("assistant", row["answer"])])
        ids = torch.tensor([(question + answer)[: CONTEXT + 1]])
        learned = torch.arange(ids.shape[1])[None] > len(question)
        if learned.any():
            total += float(losses(model, ids, learned)) * int(learned.sum())
            count += int(learned.sum())
    return math.exp(total / count)


def export(trainer: Trainer, work: Path, epoch_tokens: int) -> None:
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
        "epoch_tokens": epoch_tokens,
        "batch_tokens": BATCH_TOKENS,
        "row_tokens": ROW_TOKENS,
        "muon_rate": MUON_RATE,
        "adam_rate": ADAM_RATE,
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
    mixture = Mixture(arguments.data, tokenizer)
    trainer = Trainer(arguments.work, device)
    if arguments.compile:
        trainer.model.model.compile(dynamic=False)
    progress, seconds = trainer.progress, arguments.minutes * 60
    saved_at = time.monotonic()
    while progress.seconds < seconds:
        seed = arguments.seed * 1000 + progress.steps
        last = progress.seconds > LAST_PART * seconds
        items = mixture.last_epoch(seed) if last else mixture.epoch(seed)
        for ids, learned in pack(items):
            trainer.set_rate(progress.seconds / seconds)
            trainer.step(ids.to(device), learned.to(device))
            if progress.steps % 25 == 0:
                trainer.report()
            finished = progress.seconds >= seconds
            if finished or time.monotonic() - saved_at > SAVE_SECONDS:
                trainer.save()
                dev = arguments.data / "eval/medquad_dev.jsonl"
                with torch.compiler.set_stance("force_eager"):  # every answer has its own length
                    perplexity = held_out_perplexity(trainer.model, tokenizer, dev, 40)
                trainer.report_held_out(perplexity)
                saved_at = time.monotonic()
            if finished or (not last and progress.seconds > LAST_PART * seconds):
                break
    export(trainer, arguments.work, mixture.epoch_tokens)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--work", type=Path, required=True, help="folder for state and result")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
