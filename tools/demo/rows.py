"""Turns the demo's text into rows of token ids, each with what is to be learned of it.

What it is: the mixture (short conversations, whole answers, books), the loss mask, and packing.
What it is not: the text itself (tools/demo/corpus.py) or the training loop.
"""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m1local.tokenizer import M1Tokenizer, Message
from tools.demo.config import CONFIG
from tools.demo.corpus import Conversations, HeldOut, cut_documents, read_medquad, read_texts

BOOK_SHARE = 0.15  # of the tokens of an epoch
KNOWN_TIMES = 5  # how often the conversations about well-known diseases come in the last epochs
BATCH_TOKENS = 4096
ROW_TOKENS = (512, 512, 512, 1024)  # in turn: short rows cost less, long ones teach the context


class Item(NamedTuple):
    """One conversation or document: its ids and which of them are learned."""

    ids: list[int]
    learned: list[bool]


class Mixture:
    """The demo's text as items, in the proportions of the beginning or the end of training."""

    def __init__(self, data: Path, tokenizer: M1Tokenizer) -> None:
        """Read the text under `data`/train; refuse what `data`/eval holds out."""
        held_out = HeldOut(data / "eval")
        self._entries = [
            entry
            for entry in read_medquad(data / "train/medquad_train.jsonl")
            if held_out.find(entry.answer) is None
        ]
        books = read_texts(data / "train", [])
        held_out.check([*books, *(entry.answer for entry in self._entries)])
        held_out.check(" ".join(entry.sentences) for entry in self._entries)
        self._documents = cut_documents(books)
        self._tokenizer = tokenizer
        self.epoch_tokens = 0  # of the last epoch drawn

    def epoch(self, seed: int) -> list[Item]:
        """Every disease and every answer at least once, and some of the books; shuffled."""
        order = random.Random(seed)
        conversations = Conversations(self._entries, seed=seed)
        items = [self._conversation(c) for _ in range(2) for c in conversations.short()]
        items += [self._conversation(c, whole=w) for c, w in conversations.detailed()]
        budget = sum(len(item.ids) for item in items) * BOOK_SHARE / (1 - BOOK_SHARE)
        for text in order.sample(self._documents, len(self._documents)):
            ids = [*self._tokenizer.encode(text), CONFIG["eos_token_id"]]
            items.append(Item(ids, [True] * len(ids)))
            budget -= len(ids)
            if budget < 0:
                break
        order.shuffle(items)
        self.epoch_tokens = sum(len(item.ids) for item in items)
        return items

    def last_epoch(self, seed: int) -> list[Item]:
        """Mostly well-known diseases, the others once, and an eighth of the whole answers."""
        order = random.Random(seed)
        known = Conversations([e for e in self._entries if e.is_well_known], seed=seed)
        others = Conversations([e for e in self._entries if not e.is_well_known], seed=seed)
        items = [self._conversation(c) for _ in range(KNOWN_TIMES) for c in known.short()]
        items += [self._conversation(c) for c in others.short()]
        everything = Conversations(self._entries, seed=seed)
        detailed = list(everything.detailed())[: len(self._entries) // 8]
        items += [self._conversation(c, whole=w) for c, w in detailed]
        order.shuffle(items)
        return items

    def _conversation(self, messages: list[Message], *, whole: bool = True) -> Item:
        ids: list[int] = []
        learned: list[bool] = []
        for message in messages:
            turn = self._tokenizer.render([message])
            # An answer ends with the marker of the next turn, which is learned with it.
            ends_answer = bool(ids) and message.role == "user"
            ids += turn
            is_answer = message.role == "assistant"
            learned += [ends_answer and learned[-1], *[is_answer] * (len(turn) - 1)]
        return Item([*ids, CONFIG["eos_token_id"]], [*learned, whole])


def pack(items: Iterable[Item]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of rows, each row beginning with an item: ids (B, T + 1) and what is learned."""
    source = iter(items)
    number = 0
    while True:
        length = ROW_TOKENS[number % len(ROW_TOKENS)]
        rows = [row for _ in range(BATCH_TOKENS // length) if (row := _row(source, length))]
        if len(rows) < BATCH_TOKENS // length:
            return
        yield (
            torch.tensor([row.ids for row in rows]),
            torch.tensor([row.learned for row in rows]),
        )
        number += 1


def _row(source: Iterator[Item], length: int) -> Item | None:
    """The next items, cut where the row is full; None when they run out."""
    row = Item([], [])
    for item in source:
        row.ids.extend(item.ids)
        row.learned.extend(item.learned)
        if len(row.ids) > length:
            return Item(row.ids[: length + 1], row.learned[: length + 1])
    return None
