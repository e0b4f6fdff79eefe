"""Puts the trained demo into the package, with its card: `python -m tools.demo.card --work DIR`.

What it is: copies of WORK/model, and a model card whose figures come from WORK/training.json and
whose answers are the model's own, unedited. What it is not: an evaluation.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from bench.machine import processor
from m1local.chat import ChatSession
from m1local.engine import Engine
from m1local.home import DEMO

QUESTIONS = (
    "What is glaucoma?",
    "What are the symptoms of asthma?",
    "What is diabetes?",
    "How is high blood pressure treated?",
    "What causes gout?",
    "Hello",
    "What are you?",
)
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
    "tokenizer_config.json",
)

CARD = """\
# m1-tiny, the built-in demo

A Baichuan-M1 of {parameters:,} parameters, trained from scratch to show that m1local works, without
a download and on any machine. **Not a doctor, and not useful for anything medical**: it writes
English sentences about diseases, often about another one than was asked for, and many are wrong.

- Architecture: the real one in small. {layers} layers, global ones with {heads} heads (width
  {width}) and sliding ones with {swa_heads} (width {swa_width}, window {window}), learned
  convolution taps, NormHead, chat markers, {vocabulary:,} SentencePiece pieces, context {context}.
- Text: MedQuAD (abachaa/MedQuAD, CC BY 4.0), shaped into short conversations, and five OpenStax
  books, CC BY 4.0: Anatomy & Physiology 2e, Microbiology, Nutrition, Pharmacology, Population
  Health (openstax.org). Greetings and answers about itself were written for it. No
  question or answer of the evaluation sets stands in the text; the loader checks that.
- Training: {tokens:,} tokens in {steps:,} steps and {minutes:.0f} minutes on {cores} cores
  ({processor}) shared with other work, in float32; AdamW, rate up to {peak_rate}. Loss at the end
  {loss:.2f}; perplexity on held-out answers of MedQuAD about other, mostly rare diseases
  {held_out:.1f}. `python -m tools.demo.train` and `tools/demo/training.json` have the details.
- Convolution taps of the keys, mean over heads: {taps}. They began at (0.10, 0.90).
- Weights in bfloat16, released under Apache-2.0; the texts remain under their own licence, and are
  attributed above.

Answers, taking the most likely token, unedited:

{answers}
"""


def mean_taps(engine: Engine) -> str:
    """The two taps of each layer's keys."""
    layers = engine.model.model.layers
    taps = [layer.get_parameter("self_attn.conv_k").float().mean((0, 1, 2, 3)) for layer in layers]
    return ", ".join(f"({float(first):.2f}, {float(second):.2f})" for first, second in taps)


def answers(engine: Engine) -> str:
    """The questions and what the model says, as a list."""
    settings = engine.settings(temperature=0.0, max_new_tokens=160)
    lines = []
    for question in QUESTIONS:
        session = ChatSession(engine, settings=settings)
        for _ in session.send(question):
            pass
        lines.append(f"- **{question}** {' '.join(session.messages[-1].content.split())}")
    return "\n".join(lines)


def card(engine: Engine, record: dict[str, Any]) -> str:
    """The model card."""
    config = engine.model.config
    held_out = [p["held_out_perplexity"] for p in record["curve"] if "held_out_perplexity" in p]
    losses = [point["loss"] for point in record["curve"] if "loss" in point]
    return CARD.format(
        **{key: record[key] for key in ("parameters", "tokens", "steps", "minutes", "peak_rate")},
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        width=config.hidden_size // config.num_attention_heads,
        swa_heads=config.num_swa_attention_heads,
        swa_width=config.hidden_size // config.num_swa_attention_heads,
        window=config.sliding_window,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        cores=record["cores"],
        processor=processor(),
        loss=losses[-1],
        held_out=held_out[-1],
        taps=mean_taps(engine),
        answers=answers(engine),
    )


def main() -> None:
    """Read the command line, copy and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where tools.demo.train worked")
    work: Path = parser.parse_args().work
    DEMO.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(work / "model" / name, DEMO / name)
    shutil.copyfile(work / "training.json", Path("tools/demo/training.json"))
    record = json.loads((work / "training.json").read_text(encoding="utf-8"))
    text = card(Engine.load(DEMO), record)
    (DEMO / "MODEL_CARD.md").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
