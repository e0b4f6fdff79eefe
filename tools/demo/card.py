"""Puts the trained demo into the package, with its card: `python -m tools.demo.card --work DIR`.

What it is: copies of WORK/model with a manifest of their hashes, a plot of the training, and a
model card whose figures come from bench/results and whose answers are the model's own, unedited.
What it is not: a measurement; run it with --work first, then `bench.demo` and `bench.quality`,
and then again without.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.readme import quality as quality_block
from bench.readme import table
from m1local.engine import Engine
from m1local.home import DEMO
from m1local.manifest import FileRecord
from m1local_app.doctor import processor
from tools.demo.corpus import DETAILED

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
)
RECORD = Path("tools/demo/training.json")
PLOT = Path("docs/m1-tiny-training.png")
RESULTS = Path("bench/results")

CARD = """\
# m1-tiny, the built-in demo

A Baichuan-M1 of {parameters:,} parameters, trained from scratch to show that m1local works, without
a download and on any machine. **Not a doctor, and no medical advice**: it writes English sentences
about diseases that read like a leaflet and are often wrong.

- Architecture: the real one in small. {layers} layers, global ones with {heads} heads (width
  {width}) and sliding ones with {swa_heads} (width {swa_width}, window {window}), learned
  convolution taps, NormHead, chat markers, {vocabulary:,} SentencePiece pieces, context {context}.
- Text: MedQuAD (abachaa/MedQuAD, CC BY 4.0) and five OpenStax books, CC BY 4.0: Anatomy &
  Physiology 2e, Microbiology, Nutrition, Pharmacology, Population Health (openstax.org). Changed:
  answers were shortened to their first two to four sentences, headed by what they are about where
  they did not name it, asked for in several phrasings and joined to conversations; whole answers
  follow the system prompt "{detailed}". Greetings and answers about itself were written for it.
  No question or answer of the evaluation sets stands in the text; the loader checks that.
- Training: {tokens:,} tokens ({epochs:.1f} times the {epoch_tokens:,} of one epoch) in {steps:,}
  steps and {minutes:.0f} minutes on {cores} cores ({processor}) shared with other work, in float32;
  Muon and AdamW; from 64 % on mostly conversations about some hundred well-known diseases, a choice
  made after an intermediate state named its subject in 11 of the thirty answers below only. Loss at
  the end {loss:.2f}. `python -m tools.demo.train` and
  `tools/demo/training.json` have the details, `docs/m1-tiny-training.png` the curve.
- Convolution taps of the keys, mean over heads: {taps}. They began at (0.10, 0.90).
- Weights in bfloat16, released under Apache-2.0; the texts remain under their own licence, and are
  attributed above. `manifest.json` has the SHA-256 of every file.

## Limits

{limits}

## Measured

Perplexity per token on {rows} held-out answers of MedQuAD, about diseases that are not in the
training text (whole answers, asked for with "{detailed}"; other vocabularies are converted):

{perplexity}

Choosing the right one of four answers to a held-out question, by how much more likely the question
makes it: {selection:.1%} (chance 25 %).

Thirty fixed questions, all about diseases of the training text, always taking the likeliest token:
{ends} answers end by themselves, {subject} name their subject at once and stay with it, {repeats}
repeat no four words more than three times.

{quality}

## The thirty answers, unedited

{answers}
"""
LIMITS = """\
It knows some hundred common diseases by heart, more or less, and mixes up the rest: about a rare
disease it writes the sentences that are usual about rare diseases. It cannot reason, count, or read
a report. It knows no Chinese."""


def mean_taps(engine: Engine) -> str:
    """The two taps of each layer's keys."""
    layers = engine.model.model.layers
    taps = [layer.get_parameter("self_attn.conv_k").float().mean((0, 1, 2, 3)) for layer in layers]
    return ", ".join(f"({float(first):.2f}, {float(second):.2f})" for first, second in taps)


def card(engine: Engine, record: dict[str, Any], demo: dict[str, Any], quality: str) -> str:
    """The model card."""
    config = engine.model.config
    losses = [point["loss"] for point in record["curve"] if "loss" in point]
    passed = demo["questions"]
    return CARD.format(
        **{
            key: record[key]
            for key in ("parameters", "tokens", "steps", "minutes", "epoch_tokens", "cores")
        },
        epochs=record["tokens"] / record["epoch_tokens"],
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        width=config.hidden_size // config.num_attention_heads,
        swa_heads=config.num_swa_attention_heads,
        swa_width=config.hidden_size // config.num_swa_attention_heads,
        window=config.sliding_window,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        detailed=DETAILED,
        processor=processor(),
        loss=losses[-1],
        taps=mean_taps(engine),
        limits=LIMITS,
        rows=demo["rows"],
        perplexity=table(
            ("model", "perplexity"),
            [(name, f"{value:.2f}") for name, value in demo["perplexity"].items()],
        ),
        selection=demo["selection_accuracy"],
        ends=passed["end by themselves"],
        subject=passed["name their subject and stay with it"],
        repeats=passed["do not repeat themselves"],
        quality=quality,
        answers="\n".join(f"- **{a['question']}** {a['text']}" for a in demo["answers"]),
    )


def plot(record: dict[str, Any]) -> None:
    """Draw the loss and the held-out perplexity over tokens."""
    import matplotlib.pyplot as plt  # only here; an extra

    figure, loss_axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    curve = record["curve"]
    losses = [(p["tokens"] / 1e6, p["loss"]) for p in curve if "loss" in p]
    held_out = [
        (p["tokens"] / 1e6, p["held_out_perplexity"]) for p in curve if "held_out_perplexity" in p
    ]
    loss_axis.plot(*zip(*losses, strict=True), color="tab:blue")
    loss_axis.set_xlabel("million tokens")
    loss_axis.set_ylabel("training loss, nats per token", color="tab:blue")
    other = loss_axis.twinx()
    other.plot(*zip(*held_out, strict=True), "o-", markersize=3, color="tab:orange")
    other.set_yscale("log")
    other.set_yticks([10, 12, 15, 20, 30, 50, 100])
    other.yaxis.set_major_formatter("{x:g}")
    other.minorticks_off()
    other.set_ylabel("perplexity on held-out answers", color="tab:orange")
    loss_axis.set_title("m1-tiny: training")
    figure.savefig(PLOT, dpi=110)


def install(work: Path) -> None:
    """Copy the trained files and the training record into the project, and draw the curve."""
    DEMO.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(work / "model" / name, DEMO / name)
    shutil.copyfile(work / "training.json", RECORD)
    records = {name: asdict(FileRecord.of(DEMO / name)) for name in FILES}
    text = json.dumps({"files": records}, indent=1) + "\n"
    (DEMO / "manifest.json").write_text(text, encoding="utf-8", newline="\n")
    plot(json.loads(RECORD.read_text(encoding="utf-8")))


def main() -> None:
    """Read the command line, copy and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="copy the model from where it was trained")
    work: Path | None = parser.parse_args().work
    if work is not None:
        install(work)
        return
    record, demo, quality = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (RECORD, RESULTS / "demo.json", RESULTS / "quality.json")
    )
    text = card(Engine.load(DEMO), record, demo, quality_block(quality))
    (DEMO / "MODEL_CARD.md").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
