"""The tokenizer: text to ids and back, and the chat template.

What it is: SentencePiece (`tokenizer.model`) with the overlay of `added_tokens_decoder`
(`tokenizer_config.json`), which gives some pieces another meaning: in the real files id 74 is the
piece `<reserved_24>` and also the marker `<C_A>` that begins an answer. What it is not: the
vendor's Python class, which is never executed, nor a Jinja template.

Two promises hold for any text whatever, a user's, a system prompt's or a file's:
- it yields no id of `added_tokens_decoder`, so nobody can type a marker;
- it decodes to itself.
Facts: the real files; checked by tests/test_tokenizer.py.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from sentencepiece import SentencePieceProcessor

from m1local.errors import ConfigError, TokenizerError
from m1local.folder import read_json_object

Role = Literal["system", "user_system", "user", "assistant", "function", "code"]

ROLE_MARKERS: Mapping[Role, str] = {
    "system": "<B_SYS>",
    "user_system": "<B_USYS>",
    "user": "<C_Q>",
    "assistant": "<C_A>",
    "function": "<B_FUNC>",
    "code": "<B_CODE>",
}
TURN_ROLES: tuple[Role, ...] = ("system", "user", "assistant")  # their markers end an answer
SPACE_PIECE = "\u2581"  # how SentencePiece writes a space; a literal one needs byte pieces
FILES = ("tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        """Raise ValueError for a role the template does not know."""
        if self.role not in get_args(Role):
            raise ValueError(f"role {self.role!r} is none of {get_args(Role)}")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """What the overlay makes of an id."""

    content: str
    special: bool


class IncrementalDecoder:
    """Turns ids into text as they come, never showing half a character.

    The only way from ids to text: Chinese characters and emoji are often split over tokens, and
    decoding token by token would destroy them.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        """Decode ids through `token_bytes`, the bytes of each id."""
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that becomes complete with this token; often empty."""
        return self._utf8.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        """What is left at the end: U+FFFD where a character was never completed."""
        return self._utf8.decode(b"", final=True)


class M1Tokenizer:
    """Encodes text, builds prompts from messages, decodes answers."""

    def __init__(
        self, processor: SentencePieceProcessor, added_tokens: Mapping[int, AddedToken]
    ) -> None:
        """Overlay `added_tokens` on a SentencePiece model that keeps text as it is."""
        self._processor = processor
        self._added = dict(added_tokens)
        self._ids_by_content = {token.content: i for i, token in self._added.items()}
        size: int = processor.get_piece_size()
        outside = [i for i in self._added if not 0 <= i < size]
        if outside:
            raise TokenizerError(
                f"tokenizer_config.json adds the ids {outside}, but tokenizer.model has only "
                f"{size} pieces; the two files belong to different models."
            )
        self._token_bytes = [self._bytes_of(i) for i in range(size)]
        self._byte_ids = {
            int(processor.id_to_piece(i)[3:-1], 16): i for i in range(size) if processor.is_byte(i)
        }
        # Text that SentencePiece would read as the piece behind an added token.
        pieces = {
            processor.id_to_piece(i)
            for i in self._added
            if not (processor.is_control(i) or processor.is_unknown(i))
        }
        self._overlaid = re.compile("|".join(map(re.escape, sorted(pieces)))) if pieces else None
        probe = "a b\n 1"
        if self.decode(self.encode(probe)) != probe:
            raise TokenizerError(
                "tokenizer.model changes the text it encodes; it is no M1 one. "
                "Fetch the model's own."
            )

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read tokenizer.model and tokenizer_config.json; raises TokenizerError."""
        model = folder / FILES[0]
        if not model.is_file():
            raise TokenizerError(f"{folder} has no {FILES[0]}; fetch it from the model's source.")
        try:
            processor = SentencePieceProcessor(model_file=str(model))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(
                f"{model} is no SentencePiece model ({error}); fetch it again."
            ) from error
        return cls(processor, read_added_tokens(folder / FILES[1]))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._token_bytes)

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each id; none for a special token."""
        return self._token_bytes

    @property
    def added_token_ids(self) -> frozenset[int]:
        """The ids no text may yield."""
        return frozenset(self._added)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: none of an added token, and they decode to `text` exactly.

        Lone surrogates, which are no text, become U+FFFD first.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        token_ids: list[int] = []
        for part in self._harmless_parts(text):
            if part == SPACE_PIECE:
                token_ids += [self._byte_ids[byte] for byte in part.encode()]
                continue
            encoded = self._processor.encode(part)
            token_ids += encoded if self._added.keys().isdisjoint(encoded) else self._spell(part)
        return token_ids

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`; special tokens leave no trace."""
        joined = b"".join(self._token_bytes[i] for i in token_ids)
        return joined.decode("utf-8", "replace")

    def decoder(self) -> IncrementalDecoder:
        """A fresh decoder for one answer."""
        return IncrementalDecoder(self._token_bytes)

    def ids_containing(self, strings: Iterable[str]) -> frozenset[int]:
        """The ids whose text contains one of `strings`, and the special ones, which have none."""
        wanted = [text.encode() for text in strings if text]
        return frozenset(
            i
            for i, text in enumerate(self._token_bytes)
            if not text or any(part in text for part in wanted)
        )

    def marker(self, role: Role) -> int:
        """The id that begins a turn of `role`."""
        content = ROLE_MARKERS[role]
        if content not in self._ids_by_content:
            raise TokenizerError(f"tokenizer_config.json does not define the marker {content}.")
        return self._ids_by_content[content]

    def render(self, messages: Iterable[Message]) -> list[int]:
        """The prompt of a conversation: marker, text, marker, text … without separators."""
        token_ids: list[int] = []
        for message in messages:
            token_ids += [self.marker(message.role), *self.encode(message.content)]
        return token_ids

    @property
    def turn_token_ids(self) -> frozenset[int]:
        """The markers that begin another turn: generating one ends the answer."""
        contents = [ROLE_MARKERS[role] for role in TURN_ROLES]
        return frozenset(
            self._ids_by_content[text] for text in contents if text in self._ids_by_content
        )

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            token = self._added[token_id]
            return b"" if token.special else token.content.encode()
        processor = self._processor
        if processor.is_byte(token_id):
            return bytes([int(processor.id_to_piece(token_id)[3:-1], 16)])
        if processor.is_control(token_id) or processor.is_unknown(token_id):
            return b""
        piece: str = processor.id_to_piece(token_id)
        return piece.replace(SPACE_PIECE, " ").encode()

    def _harmless_parts(self, text: str) -> Iterable[str]:
        """Cut `text` so that no part contains the piece of an added token."""
        cuts: list[str] = re.split(f"({SPACE_PIECE})", text) if self._byte_ids else [text]
        for part in cuts:
            if self._overlaid is not None and part != SPACE_PIECE:
                start = 0
                for match in self._overlaid.finditer(part):
                    yield part[start : match.start() + 1]  # the first character, then the rest
                    start = match.start() + 1
                part = part[start:]
            if part:
                yield part

    def _spell(self, part: str) -> list[int]:
        """Encode byte by byte: the last resort where cutting did not help."""
        missing = set(part.encode()) - self._byte_ids.keys()
        if missing:
            raise TokenizerError(
                f"tokenizer.model has no pieces for the bytes {sorted(missing)}; it is no M1 one. "
                "Fetch the model's own."
            )
        return [self._byte_ids[byte] for byte in part.encode()]


def read_added_tokens(path: Path) -> dict[int, AddedToken]:
    """Read `added_tokens_decoder`; raises TokenizerError where it is missing or malformed."""
    try:
        raw = read_json_object(path).get("added_tokens_decoder")
    except ConfigError as error:
        raise TokenizerError(str(error)) from error
    if not isinstance(raw, dict) or not raw:
        raise TokenizerError(f"{path} has no added_tokens_decoder; fetch the file again.")
    try:
        return {int(key): _added_token(value) for key, value in raw.items()}
    except (TypeError, KeyError, ValueError) as error:
        raise TokenizerError(
            f"{path}: added_tokens_decoder is malformed ({error}); fetch the file again."
        ) from error


def _added_token(value: Mapping[str, Any]) -> AddedToken:
    content = value["content"]
    if not isinstance(content, str) or not content:
        raise ValueError(f"content is {content!r}")
    return AddedToken(content=content, special=bool(value.get("special", False)))
