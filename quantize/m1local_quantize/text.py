"""The text that quantization is measured on, or calibrated with: read, checked, made into samples.

What it is: questions and answers in the chat template (.jsonl with "question" and "answer"), or
plain text cut into pieces (.txt, and .jsonl with "text"). The shipped ones are a few medical
questions and answers in English and Chinese, written for this project. What it is not: an exam.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from m1local.errors import CalibrationError
from m1local.tokenizer import M1Tokenizer, Message
from m1local_quantize.evaluate import Sample

SHIPPED = Path(__file__).parent / "texts" / "medical.jsonl"
CALIBRATION = Path(__file__).parent / "texts" / "calibration.jsonl"  # no text is in both
PIECE_TOKENS = 512
MOST_TOKENS_PER_CHARACTER = 2  # of a .jsonl line; those with more are left out
FEWEST_TOKENS = 32  # judged, in all; figures from fewer mean nothing


@dataclass(frozen=True, slots=True)
class Text:
    """Samples, and what to call the text they come from."""

    name: str
    sha256: str
    samples: tuple[Sample, ...]

    @classmethod
    def read(cls, path: Path, tokenizer: M1Tokenizer, *, longest: int, chat: bool = True) -> Self:
        """Read `path`; samples have at most `longest` tokens. Without `chat` there is no template.

        Raises CalibrationError for a file that is missing, binary, empty, malformed or too short.
        """
        try:
            content = path.read_bytes()
            decoded = content.decode("utf-8")
        except OSError as error:
            raise CalibrationError(
                f"{path} cannot be read ({error.strerror}); give a .txt or .jsonl file."
            ) from error
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is no UTF-8 text ({error}).") from error
        if "\0" in decoded:
            raise CalibrationError(f"{path} is a binary file; give a .txt or .jsonl file.")
        read = _read_jsonl if path.suffix == ".jsonl" else _read_plain
        samples = read(path, decoded, tokenizer, min(longest, PIECE_TOKENS), chat)
        judged = sum(len(sample.token_ids) - sample.first_judged for sample in samples)
        if judged < FEWEST_TOKENS:
            raise CalibrationError(
                f"{path} has only {judged} tokens to judge; at least {FEWEST_TOKENS} are needed."
            )
        return cls(path.name, hashlib.sha256(content).hexdigest(), tuple(samples))


def _read_jsonl(
    path: Path, content: str, tokenizer: M1Tokenizer, longest: int, chat: bool
) -> list[Sample]:
    samples: list[Sample] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row.get("question", ""), row.get("answer", row.get("text"))
            if not isinstance(question, str) or not isinstance(answer, str):
                raise TypeError("no text under the key answer, nor under text")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CalibrationError(
                f'{path}, line {number}: expected {{"question": …, "answer": …}} or '
                f'{{"text": …}} ({error}).'
            ) from error
        if _is_foreign(answer, tokenizer):
            continue
        if not question or not chat:
            samples += _cut(tokenizer.encode(f"{question} {answer}".strip()), longest)
            continue
        prompt = tokenizer.render([Message("user", question)])
        ids = (prompt + tokenizer.render([Message("assistant", answer)]))[:longest]
        if len(ids) > len(prompt) + 1:
            samples.append(Sample(tuple(ids), len(prompt) + 1))
    return samples


def _is_foreign(text: str, tokenizer: M1Tokenizer) -> bool:
    """Whether the tokenizer reads `text` mostly as single bytes: the model never learned it.

    Its guesses at bytes would outweigh all else, a Chinese character being three of them.
    """
    return len(tokenizer.encode(text)) > MOST_TOKENS_PER_CHARACTER * len(text)


def _read_plain(
    path: Path, content: str, tokenizer: M1Tokenizer, longest: int, chat: bool
) -> list[Sample]:
    return _cut(tokenizer.encode(content), longest)


def _cut(ids: list[int], longest: int) -> list[Sample]:
    pieces = (ids[start : start + longest] for start in range(0, len(ids), longest))
    return [Sample(tuple(piece)) for piece in pieces if len(piece) > 1]
