"""A conversation with a chat model.

What it is: messages, the prompt they make, and answers streamed into them. An answer that is
abandoned half way stays as far as it went, so the conversation and the cache agree at any moment.
What it is not: a store (nothing is written) or a front end (nothing is printed).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from m1local.engine import Engine
from m1local.generate import Event, GenerationSettings, TextDelta, generate
from m1local.tokenizer import Message


@dataclass(slots=True)
class Turn:
    """A message, and for an answer the very tokens it was made of.

    Encoding an answer's text again may cut it differently, and the cache would be of no use.
    """

    message: Message
    token_ids: list[int] = field(default_factory=list)


class ChatSession:
    """Messages of one conversation and how the next answer is made."""

    def __init__(
        self, engine: Engine, *, system: str = "", settings: GenerationSettings | None = None
    ) -> None:
        """Begin an empty conversation, with a system prompt unless it is empty."""
        self.engine = engine
        self.system = system
        self.settings = settings or engine.defaults
        self.turns: list[Turn] = []

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, without the system prompt."""
        return [turn.message for turn in self.turns]

    def send(self, text: str) -> Iterator[Event]:
        """Ask, and stream the answer; both become part of the conversation.

        Closing the stream keeps what was answered so far; if that is nothing, or the prompt does
        not fit, the question is taken back. Raises ContextLengthError before anything is computed.
        """
        question = Turn(Message("user", text))
        answer: list[str] = []
        token_ids: list[int] = []
        prompt = self._prompt([*self.turns, question])
        engine = self.engine
        try:
            for event in generate(engine.context, engine.tokenizer, prompt, self.settings):
                if isinstance(event, TextDelta):
                    answer.append(event.text)
                    token_ids += event.token_ids
                yield event
        finally:
            if token_ids:
                text = "".join(answer)
                # After a stop string, or half a character, the tokens say more than the text.
                same = engine.tokenizer.decode(token_ids) == text
                reply = Turn(Message("assistant", text), token_ids if same else [])
                self.turns += [question, reply]

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.turns.clear()

    def _prompt(self, turns: list[Turn]) -> list[int]:
        tokenizer = self.engine.tokenizer
        token_ids = tokenizer.render([Message("system", self.system)] if self.system else [])
        for turn in turns:
            if turn.token_ids:
                token_ids += [tokenizer.marker(turn.message.role), *turn.token_ids]
            else:
                token_ids += tokenizer.render([turn.message])
        return [*token_ids, tokenizer.marker("assistant")]
