"""A conversation with a chat model.

What it is: turns, the prompt they make, and answers streamed into them; going back by undo, edit
and retry; and what to leave out when the context is full. An answer that is abandoned half way
stays as far as it went, so the conversation and the cache agree at any moment.
What it is not: a store (nothing is written) or a front end (nothing is printed).
"""

import enum
import itertools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from m1local.context import Context
from m1local.engine import Engine
from m1local.errors import M1Error
from m1local.generate import (
    Event,
    Finished,
    GenerationSettings,
    ShorterPrompt,
    TextDelta,
    TurnsDropped,
    generate,
)
from m1local.tokenizer import Message

ANSWER_SHARE = 4  # where turns may be dropped, an answer finds at least a quarter of the context
_keys = itertools.count(1)


class Overflow(enum.Enum):
    """What to do when a conversation outgrows the context."""

    STOP = "stop"  # say so, and end
    TRUNCATE_MIDDLE = "truncate-middle"  # keep the first question and answer, and the last ones
    ROLLING = "rolling"  # keep the last ones


@dataclass(slots=True)
class Turn:
    """A message, and for an answer the very tokens it was made of, and how.

    Encoding an answer's text again may cut it differently, and the cache would be of no use.
    `settings` holds the seed that was drawn; `finish` is why the answer ended, None if it was
    abandoned.
    """

    message: Message
    token_ids: list[int] = field(default_factory=list)
    settings: GenerationSettings | None = None
    finish: Finished | None = None


class ChatSession:
    """Messages of one conversation and how the next answer is made."""

    def __init__(
        self,
        engine: Engine,
        *,
        system: str = "",
        settings: GenerationSettings | None = None,
        overflow: Overflow = Overflow.STOP,
    ) -> None:
        """Begin an empty conversation, with a system prompt unless it is empty."""
        self.engine = engine
        self.system = system
        self.settings = settings or engine.defaults
        self.overflow = overflow
        self.turns: list[Turn] = []
        self.answering: Turn | None = None  # the answer being made, or made last
        self._hidden = range(0)  # turns that are left out of the prompt
        self._key = next(_keys)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, without the system prompt."""
        return [turn.message for turn in self.turns]

    @property
    def context(self) -> Context:
        """What the model remembers of this conversation, perhaps nothing."""
        return self.engine.contexts.of(self._key)

    @property
    def used_tokens(self) -> int:
        """How many tokens of the context the conversation takes now."""
        return len(self._prompt(self.turns))

    def send(self, text: str) -> Iterator[Event]:
        """Ask, and stream the answer; both become part of the conversation.

        Closing the stream keeps what was answered so far; if that is nothing, or the prompt does
        not fit, the question is taken back. Raises ContextLengthError before anything is computed.
        """
        return self._answer(self.turns, Turn(Message("user", text)))

    def retry(self) -> Iterator[Event]:
        """Answer the last question again; the old answer goes when the new one has begun.

        Raises M1Error where nothing was asked yet.
        """
        at = self._last_question()
        return self._answer(self.turns[:at], self.turns[at])

    def edit(self, index: int, text: str) -> Iterator[Event]:
        """Ask `text` in place of turn `index`, a question; all after it goes with the old one.

        Raises M1Error where that turn is none.
        """
        if not 0 <= index < len(self.turns) or self.turns[index].message.role != "user":
            raise M1Error(f"Turn {index + 1} is no question of this conversation.")
        return self._answer(self.turns[:index], Turn(Message("user", text)))

    def undo(self) -> str:
        """Take back the last question and its answer; returns the question.

        Raises M1Error where nothing was asked yet.
        """
        at = self._last_question()
        question = self.turns[at].message.content
        self._replace(self.turns[:at])
        return question

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.restore([])

    def restore(self, turns: Sequence[Turn]) -> None:
        """Go on with `turns` of an earlier conversation: questions, each with its answer."""
        self.turns, self._hidden = list(turns), range(0)

    def _last_question(self) -> int:
        asked = [i for i, turn in enumerate(self.turns) if turn.message.role == "user"]
        if not asked:
            raise M1Error("Nothing was asked yet.")
        return asked[-1]

    def _replace(self, turns: list[Turn]) -> None:
        self.turns = turns
        if len(turns) < self._hidden.stop:
            self._hidden = range(0)

    def _answer(self, before: list[Turn], question: Turn) -> Iterator[Event]:
        """Answer `question` after `before`; both replace the conversation once there is an answer.

        A generator, so nothing happens before the first event is asked for.
        """
        engine, settings = self.engine, _with_seed(self.settings)
        asked, hidden = [*before, question], self._hidden
        if len(before) < hidden.stop:
            self._hidden = range(0)
        answer, reply = [], Turn(Message("assistant", ""), settings=settings)
        self.answering, context = reply, self.context
        try:
            dropped = self._make_room(asked, 0)
            if dropped is not None:
                yield dropped
            prompt = [*self._prompt(asked), engine.tokenizer.marker("assistant")]
            for event in generate(
                context, engine.tokenizer, prompt, settings, lambda n: self._shorten(asked, n)
            ):
                if isinstance(event, TextDelta):
                    answer.append(event.text)
                    reply.token_ids += event.token_ids
                elif isinstance(event, Finished):
                    reply.finish = event
                yield event
        finally:
            if reply.token_ids:
                text = "".join(answer)
                reply.message = Message("assistant", text)
                # After a stop string, or half a character, the tokens say more than the text.
                if engine.tokenizer.decode(reply.token_ids) != text:
                    reply.token_ids = []
                self.turns = [*asked, reply]
            else:
                self._hidden = hidden

    def _shorten(self, asked: Sequence[Turn], answer_tokens: int) -> ShorterPrompt | None:
        """What to go on with when the context is full after `answer_tokens` of the answer."""
        dropped = self._make_room(asked, answer_tokens)
        if dropped is None:
            return None
        prompt = [*self._prompt(asked), self.engine.tokenizer.marker("assistant")]
        fits = len(prompt) + answer_tokens < self.engine.contexts.capacity
        return ShorterPrompt(prompt, dropped) if fits else None

    def _make_room(self, asked: Sequence[Turn], answer_tokens: int) -> TurnsDropped | None:
        """Hide more of `asked` where the policy says so and room is wanted; returns what went."""
        if self.overflow is Overflow.STOP:
            return None
        capacity = self.engine.contexts.capacity
        share = capacity // ANSWER_SHARE
        wanted = min(self.settings.max_new_tokens, share) if not answer_tokens else share
        needed = before = len(self._prompt(asked)) + 1 + answer_tokens
        if needed + wanted <= capacity:
            return None
        first = self._hidden.start
        if not self._hidden and self.overflow is Overflow.TRUNCATE_MIDDLE and len(asked) > 3:
            first = 2
        stop = max(self._hidden.stop, first)
        hidden_before = len(self._hidden)
        # More than is needed now, or the next question would find it full again.
        while needed + share > capacity and (stop < len(asked) - 1 or first > 0):
            stop, first = (stop + 2, first) if stop < len(asked) - 1 else (stop, 0)
            self._hidden = range(first, stop)
            needed = len(self._prompt(asked)) + 1 + answer_tokens
        turns = len(self._hidden) - hidden_before
        return TurnsDropped(turns, before - needed) if turns else None

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        tokenizer = self.engine.tokenizer
        token_ids = tokenizer.render([Message("system", self.system)] if self.system else [])
        for index, turn in enumerate(turns):
            if index in self._hidden:
                continue
            if turn.token_ids:
                token_ids += [tokenizer.marker(turn.message.role), *turn.token_ids]
            else:
                token_ids += tokenizer.render([turn.message])
        return token_ids


def _with_seed(settings: GenerationSettings) -> GenerationSettings:
    """`settings` with a seed, drawn now if there is none, so that an answer can be made again."""
    if settings.sampling.seed is not None:
        return settings
    return replace(settings, sampling=replace(settings.sampling, seed=secrets.randbelow(2**32)))
