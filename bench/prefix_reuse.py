"""How much sooner an answer starts when the conversation is remembered.

`python -m bench.prefix_reuse CHECKPOINT`, a quantized one with a context of more than 2,300 tokens.

What it is: the time to the first token of the second turn of a conversation of 2,000 tokens, of a
retry, and of an edit of the second question, each beside the same prompt read afresh; in turns,
several rounds, medians. What it is not: the speed of reading or answering as such.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.machine import describe_machine
from m1local.chat import ChatSession
from m1local.context import Context
from m1local.engine import Engine
from m1local.generate import Event, Finished, TextDelta
from m1local.manifest import CheckpointManifest

FIRST_TOKENS = 2000
ANSWER_TOKENS = 16
WORDS = "The patient reports a cough, and fever since Monday; the heart sounds are normal. "


def first_token_seconds(events: Iterator[Event]) -> tuple[float, Finished]:
    """Run an answer; returns when its first text came, and its last event."""
    begun, first, finished = time.perf_counter(), None, None
    for event in events:
        if isinstance(event, TextDelta) and first is None:
            first = time.perf_counter() - begun
        if isinstance(event, Finished):
            finished = event
    assert first is not None, "there was no answer"
    assert finished is not None, "the answer did not end"
    return first, finished


def long_question(engine: Engine) -> str:
    """A question with which the first prompt takes about `FIRST_TOKENS` tokens."""
    per_repeat = len(engine.tokenizer.encode(WORDS * 10)) / 10
    return WORDS * round(FIRST_TOKENS / per_repeat)


def forget(context: Context) -> None:
    """Empty `context`, which may have been another conversation's."""
    context.cache.rollback(0)
    context.token_ids.clear()


def steps(session: ChatSession) -> Iterator[tuple[str, Iterator[Event]]]:
    """What is timed, one after the other, in a conversation that has had its first turn."""
    yield "second turn", session.send("What should be done next?")
    yield "retry", session.retry()
    yield "edit of the second question", session.edit(2, "Is it dangerous?")


@dataclass(slots=True)
class Row:
    """One step: what it took with and without what was remembered, in each round."""

    kept: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens_read: int = 0

    def summary(self) -> dict[str, float]:
        """Medians, and the median of the ratios of each round."""
        ratios = [fresh / kept for kept, fresh in zip(self.kept, self.fresh, strict=True)]
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens_read": self.tokens_read,
            "seconds": round(statistics.median(self.kept), 4),
            "seconds_afresh": round(statistics.median(self.fresh), 3),
            "times_sooner": round(statistics.median(ratios), 1),
        }


def measure(engine: Engine, rounds: int) -> dict[str, Row]:
    """Both ways for each step, in turns."""
    settings = replace(engine.settings(temperature=0.0), max_new_tokens=ANSWER_TOKENS)
    question, rows = long_question(engine), defaultdict[str, Row](Row)
    for number in range(1, rounds + 1):
        session = ChatSession(engine, settings=settings)
        forget(session.context)
        first, finished = first_token_seconds(session.send(question))
        print(f"round {number}: first turn, {finished.prompt_tokens} tokens, {first:.2f} s")
        for name, events in steps(session):
            kept, ended = first_token_seconds(events)
            again = ChatSession(engine, settings=settings)
            again.restore(session.turns[:-2])
            forget(again.context)
            fresh, recomputed = first_token_seconds(again.send(session.messages[-2].content))
            assert recomputed.cached_tokens == 0, "the other way was not fresh"
            row = rows[name]
            row.kept.append(kept)
            row.fresh.append(fresh)
            row.prompt_tokens = ended.prompt_tokens
            row.tokens_read = ended.prompt_tokens - ended.cached_tokens
            print(f"  {name}: {kept:.3f} s, afresh {fresh:.2f} s", flush=True)
    return dict(rows)


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the quantized checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("bench/results/prefix_reuse.json"))
    arguments = parser.parse_args()
    engine = Engine.load(arguments.folder, context_tokens=FIRST_TOKENS + 400)
    rows = measure(engine, arguments.rounds)
    result = {
        "command": "python -m bench.synthetic S --layers 4 && m1 quantize S C --no-certify && "
        "python -m bench.prefix_reuse C",
        "machine": describe_machine(),
        "recipe": CheckpointManifest.read(arguments.folder).recipe,
        "layers": engine.model.config.num_hidden_layers,
        "rounds": arguments.rounds,
        "rows": [{"step": name} | row.summary() for name, row in rows.items()],
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name}: {row.summary()}")


if __name__ == "__main__":
    main()
