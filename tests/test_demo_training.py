"""How the demo is trained: nothing held out is learned, rows, the optimizer, the questions.

On a handful of invented pairs; the real text is not part of the project.
"""

import json
from pathlib import Path

import pytest
import torch

from m1local.tokenizer import M1Tokenizer
from tools.demo import rows
from tools.demo.corpus import DETAILED, DETAILED_CHARACTERS, Conversations, HeldOut, read_medquad
from tools.demo.muon import Muon, orthogonal
from tools.demo.questions import judge
from tools.demo.rows import Item, Mixture, pack
from tools.demo.vocabulary import train_tokenizer

DISEASES = ("Glaucoma", "Gout", "Asthma", "Marfan Syndrome", "Xeroderma (XP)")
HELD_OUT = "Nobody has ever seen this long answer before, and nobody ever will see it again."


def pair(focus: str, kind: str, answer: str) -> dict[str, str]:
    return {
        "focus": focus,
        "qtype": kind,
        "question": f"What about {focus} ?",
        "answer": answer,
        "source": "4_MPlus",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    (folder / "eval").mkdir()
    pairs = []
    for name in DISEASES:
        text = f"{name} is a disease. It is common. See a doctor. "
        pairs.append(pair(name, "information", text * (40 if name == "Gout" else 9)))
        pairs.append(pair(name, "symptoms", "Pain is the first sign. Fever follows. Rest helps."))
    pairs.append(pair("Rare", "symptoms", "The Human Phenotype Ontology lists these signs."))
    text = "\n".join(json.dumps(p) for p in pairs)
    (folder / "train/medquad_train.jsonl").write_text(text)
    (folder / "train/openstax_book.txt").write_text("The heart pumps blood. Blood is red. " * 200)
    held = {"question": "What is this thing that nobody has seen?", "answer": HELD_OUT}
    (folder / "eval/dev.jsonl").write_text(json.dumps(held))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> M1Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Glaucoma is a disease of the eye. " * 50], folder, vocab_size=310)
    return M1Tokenizer.from_folder(folder)


def test_a_held_out_answer_is_found_anywhere_and_in_any_case(data: Path) -> None:
    held_out = HeldOut(data / "eval")
    assert held_out.find(f"Before it. {HELD_OUT.upper()} After it.") == HELD_OUT.lower()
    assert held_out.find(HELD_OUT.replace("again", "twice")) is None
    with pytest.raises(AssertionError, match="held-out"):
        held_out.check(["Harmless.", f"Not so: {HELD_OUT}"])


def test_books_with_held_out_text_are_refused(
    data: Path, tokenizer: M1Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "eval").symlink_to(data / "eval")
    (tmp_path / "train/medquad_train.jsonl").symlink_to(data / "train/medquad_train.jsonl")
    (tmp_path / "train/openstax_book.txt").write_text(f"A book. {HELD_OUT}")
    with pytest.raises(AssertionError, match="held-out"):
        Mixture(tmp_path, tokenizer)


def test_short_answers_name_their_subject_and_tables_are_not_among_them(data: Path) -> None:
    entries = read_medquad(data / "train/medquad_train.jsonl")
    for conversation in Conversations(entries, seed=1).short():
        answers = [m.content for m in conversation if m.role == "assistant"]
        assert not any("Phenotype" in answer for answer in answers)
    symptoms = next(e for e in entries if e.focus == "Gout" and e.kind == "symptoms")
    assert symptoms.heading == "Symptoms of gout: "
    xeroderma = next(e for e in entries if e.focus.startswith("Xero") and e.kind == "symptoms")
    assert xeroderma.heading == "Symptoms of xeroderma: "


def test_detailed_answers_follow_their_prompt_and_are_cut_unlearned(
    data: Path, tokenizer: M1Tokenizer
) -> None:
    entries = read_medquad(data / "train/medquad_train.jsonl")
    cut = 0
    for messages, whole in Conversations(entries, seed=1).detailed():
        assert messages[0].content == DETAILED
        assert len(messages[-1].content) <= DETAILED_CHARACTERS
        cut += not whole
    assert cut == 1
    mixture = Mixture(data, tokenizer)
    unlearned_ends = [item for item in mixture.epoch(1) if not item.learned[-1]]
    assert len(unlearned_ends) == 1


def test_only_answers_and_their_ends_are_learned(data: Path, tokenizer: M1Tokenizer) -> None:
    mixture = Mixture(data, tokenizer)
    user, assistant = tokenizer.marker("user"), tokenizer.marker("assistant")
    talks = [item for item in mixture.epoch(1) if assistant in item.ids]
    assert talks
    for item in talks:
        role = None
        for token, learned in zip(item.ids[:-1], item.learned[:-1], strict=True):
            if token in (user, assistant):
                # The first question is given; a later one's marker ends the answer before it.
                assert learned == (token == user and role == "assistant")
                role = "user" if token == user else "assistant"
            else:
                assert learned == (role == "assistant")
    assert mixture.epoch_tokens == sum(len(item.ids) for item in mixture.epoch(1))
    assert [item.ids for item in mixture.epoch(1)] != [item.ids for item in mixture.epoch(2)]


def test_rows_begin_with_an_item_and_lose_nothing_but_their_overhang() -> None:
    items = [Item([100 + n] * 300, [n % 2 == 0] * 300) for n in range(200)]
    lengths = []
    for ids, learned in pack(items):
        assert ids.shape == learned.shape
        assert ids.shape[0] * (ids.shape[1] - 1) == rows.BATCH_TOKENS
        lengths.append(ids.shape[1] - 1)
        for row, flags in zip(ids, learned, strict=True):
            assert torch.equal(flags, row % 2 == 0)
            assert int((row == row[0]).sum()) == 300
    assert tuple(lengths[:4]) == rows.ROW_TOKENS


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_muons_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    singular_values = torch.linalg.svdvals(orthogonal(matrix))
    assert orthogonal(matrix).shape == shape
    assert 0.5 < float(singular_values.min()) < float(singular_values.max()) < 1.3


def test_muon_follows_the_gradient() -> None:
    torch.manual_seed(1)
    matrix = torch.nn.Parameter(torch.randn(12, 6))
    wanted = torch.randn(12, 6)
    optimizer = Muon([matrix], lr=0.05)
    before = float((matrix.detach() - wanted).square().sum())
    for _ in range(100):
        matrix.grad = 2 * (matrix.detach() - wanted)
        optimizer.step()
    assert float((matrix.detach() - wanted).square().sum()) < before / 20


def test_answers_are_judged_by_their_first_sentence_and_by_repetition() -> None:
    names = ("glaucoma",)
    good = judge("What is it?", names, "Glaucoma harms the eye. It is painless.", ends=True)
    assert good.is_about_subject
    assert good.repeats == 1
    late = judge("What is it?", names, "It harms the eye. Glaucoma is painless.", ends=True)
    assert not late.is_about_subject
    wanders = judge("?", names, "Glaucoma is like asthma. Asthma is like gout.", ends=True)
    assert not wanders.stays
    loops = judge("?", names, "Glaucoma is a disease. " * 5, ends=False)
    assert loops.repeats == 5
