"""The demo's tokenizer: SentencePiece BPE made the way the real model's files are.

What it is: identity normalisation, no dummy prefix, single digits, byte fallback, and chat markers
laid over reserved pieces by tokenizer_config.json. What it is not: the real model's vocabulary,
which is under the vendor's licence.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

OVERLAY = {
    0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", 4: "<B_SYS>", 5: "<B_USYS>", 6: "<C_Q>",
    7: "<C_A>", 8: "<B_FUNC>", 9: "<B_CODE>",
}  # fmt: skip
NOT_SPECIAL = {7, 8, 9}  # as in the real files, where <C_A> is a marker all the same


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train on `texts` and write tokenizer.model and tokenizer_config.json into `folder`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        user_defined_symbols=["<SEP>", *(f"<reserved_{i}>" for i in range(12))],
        max_sentence_length=8000,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {
        str(i): {"content": content, "special": i not in NOT_SPECIAL}
        for i, content in OVERLAY.items()
    }
    config = {"add_bos_token": False, "add_eos_token": False, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
