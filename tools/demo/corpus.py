"""The demo's training text: MedQuAD and OpenStax, shaped into conversations and documents.

What it is: a loader that turns question-answer pairs into short conversations (the first sentences
of an answer, asked for in several phrasings, with follow-ups about the same disease) and longer
text into documents. What it is not: a general data pipeline, and never a reader of held-out text:
`assert_held_out` refuses a corpus that contains an answer or a question of the evaluation sets.
Sources: MedQuAD (abachaa/MedQuAD) and five OpenStax books, both CC BY 4.0.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from m1local.tokenizer import Message

SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["(]?[A-Z])')
STAGE_DIRECTIONS = re.compile(
    r"\((?:Watch|Click|To enlarge|For more|See)[^)]*\)|\[[^\]]*\]|Key Points\s*|^\s*Summary ?:",
    re.IGNORECASE,
)
# Sentences that are no answer: addresses, links, pointers to a picture, a table's introduction.
NO_ANSWER = re.compile(
    r"http|www\.|e-mail|\d{3}-\d{3,4}|keyboard|this graphic|the video|click|MedlinePlus|"
    r"these resources|following resources|glossary",
    re.IGNORECASE,
)
# Sources written for patients about common diseases; the others list thousands of rare ones.
PATIENT_SOURCES = ("4_MPlus", "7_Senior", "8_NHLBI", "5_NIDDK", "9_CDC", "6_NINDS", "1_Cancer")

WELL_KNOWN_TIMES = 8  # conversations about each well-known disease in an epoch
DETAILED = "Answer in detail."  # the system prompt under which answers are not shortened
DETAILED_CHARACTERS = 1200  # longer answers are cut there, and their end is not learned

# What a visitor asks first.
NAMES = """
acne, age-related macular degeneration, allergy, alzheimer's disease, anemia, angina, anxiety,
appendicitis, arrhythmia, arthritis, asthma, atherosclerosis, atrial fibrillation, autism, back
pain, breast cancer, bronchitis, burns, cancer, cataract, celiac disease, chickenpox, cholera,
cholesterol, cirrhosis, colorectal cancer, common cold, concussion, constipation, copd, coronary
heart disease, cough, crohn's disease, cystic fibrosis, deep vein thrombosis, dehydration,
dementia, dengue, depression, diabetes, diabetic retinopathy, diarrhea, down syndrome, dry eye,
eczema, endometriosis, epilepsy, fever, fibromyalgia, flu, food poisoning, fractures,
gallstones, gerd, glaucoma, gout, hay fever, headache, hearing loss, heart attack, heart
disease, heart failure, heartburn, hemophilia, hepatitis, hepatitis c, high blood cholesterol,
high blood pressure, hiv/aids, hives, hyperthyroidism, hypothyroidism, infertility, insomnia,
irritable bowel syndrome, kidney failure, kidney stones, leukemia, low blood pressure, lung
cancer, lupus, lyme disease, malaria, malnutrition, measles, meningitis, menopause, migraine,
multiple sclerosis, mumps, obesity, osteoarthritis, osteoporosis, pancreatitis, parkinson's
disease, peptic ulcer, pinkeye, pneumonia, pregnancy, prostate cancer, psoriasis, rabies,
rheumatoid arthritis, rosacea, rubella, schizophrenia, sciatica, sepsis, shingles, sickle cell
disease, sleep apnea, stroke, sunburn, tetanus, thalassemia, thyroid diseases, tinnitus,
tuberculosis, ulcerative colitis, urinary tract infections, varicose veins, vertigo
"""
WELL_KNOWN = frozenset(" ".join(name.split()) for name in NAMES.split(","))

PHRASINGS: dict[str, tuple[str, ...]] = {
    "information": (
        "What is {}?",
        "What is {}",
        "What is {}?",
        "what is {}?",
        "Tell me about {}.",
        "{}",
        "{}?",
        "Can you explain {}?",
        "What does {} mean?",
        "Explain {} in simple words.",
    ),
    "symptoms": (
        "What are the symptoms of {}?",
        "What are the signs of {}?",
        "{} symptoms",
        "How do I know if I have {}?",
        "Which symptoms does {} cause?",
    ),
    "treatment": (
        "What are the treatments for {}?",
        "How is {} treated?",
        "{} treatment",
        "How do doctors treat {}?",
        "What can be done about {}?",
    ),
    "causes": ("What causes {}?", "What is the cause of {}?", "Why do people get {}?"),
    "frequency": ("How many people are affected by {}?", "How common is {}?", "Is {} rare?"),
    "genetic changes": (
        "What are the genetic changes related to {}?",
        "Which genes are involved in {}?",
    ),
    "inheritance": ("Is {} inherited?", "How is {} inherited?", "Does {} run in families?"),
    "exams and tests": ("How is {} diagnosed?", "How to diagnose {}?", "Which tests find {}?"),
    "outlook": ("What is the outlook for {}?", "What is the prognosis of {}?"),
    "susceptibility": ("Who is at risk for {}?", "Who gets {}?", "What are risk factors for {}?"),
    "prevention": ("How to prevent {}?", "Can {} be prevented?", "How can I prevent {}?"),
    "complications": ("What are the complications of {}?",),
}
FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "information": ("What is it?", "Explain it."),
    "symptoms": ("What are the symptoms?", "What are its signs?"),
    "treatment": ("How is it treated?", "What are the treatments?", "And the treatment?"),
    "causes": ("What causes it?", "What is the cause?"),
    "frequency": ("How common is it?",),
    "genetic changes": ("Which genes are involved?",),
    "inheritance": ("Is it inherited?",),
    "exams and tests": ("How is it diagnosed?",),
    "outlook": ("What is the outlook?",),
    "susceptibility": ("Who is at risk?",),
    "prevention": ("Can it be prevented?", "How can I prevent it?"),
    "complications": ("What are the complications?",),
}
# Begin an answer that would not name what it is about.
HEADINGS = {
    "symptoms": "Symptoms of {}: ",
    "treatment": "Treatment of {}: ",
    "causes": "Causes of {}: ",
    "frequency": "Frequency of {}: ",
    "genetic changes": "Genes in {}: ",
    "inheritance": "Inheritance of {}: ",
    "exams and tests": "Tests for {}: ",
    "outlook": "Outlook for {}: ",
    "susceptibility": "Risk of {}: ",
    "prevention": "Preventing {}: ",
    "complications": "Complications of {}: ",
}
MORE = ("Tell me more.", "Tell me more about it.", "Go on.", "Can you say more?")
SYSTEM_PROMPTS = (
    "You are a helpful medical assistant.",
    "You explain medicine to patients in plain English.",
    "Answer briefly and clearly.",
)
NOTICE = "I am a small demonstration model, so please ask a doctor for medical advice."
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "hi", "Hey there", "Good morning", "Good evening"),
     "Hello! You can ask me about diseases, their symptoms and their treatment. " + NOTICE),
    (("What are you?", "Who are you?", "who are you", "What is your name?", "Are you a doctor?",
      "Are you human?", "Are you a bot?", "Introduce yourself."),
     "I am m1-tiny, a small demonstration model, and not a doctor. I was trained on open medical "
     "text, I make mistakes, and what I say is not medical advice."),
    (("Thank you.", "Thanks!", "thank you", "Thanks a lot", "Thank you very much!"),
     "You are welcome. " + NOTICE),
    (("Goodbye", "Bye", "bye!", "Good night", "See you"), "Goodbye, and stay well."),
    (("Help", "What can you do?", "How can you help me?", "What can I ask?"),
     "Ask me what a disease is, what its symptoms are, or how it is treated. " + NOTICE),
    (("I have chest pain.", "I think I am having a heart attack", "I cannot breathe",
      "I want to die", "I took too many pills"),
     "This may be an emergency. Please call your local emergency number now. I am only a small "
     "demonstration model and cannot help in an emergency."),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One MedQuAD pair, cleaned: what it is about, the kind of question, the answer's sentences."""

    focus: str
    kind: str
    question: str
    sentences: tuple[str, ...]  # cleaned; none where the answer is only a table
    answer: str  # as published, on one line
    for_patients: bool

    @property
    def is_well_known(self) -> bool:
        """Whether a visitor is likely to ask for it."""
        return self.focus.split("(")[0].strip().lower() in WELL_KNOWN

    @property
    def heading(self) -> str:
        """What to put before the answer where its first sentence does not name its subject."""
        name = self.focus.split("(")[0].strip()
        if name.lower().rstrip("s") in self.sentences[0].lower():
            return ""
        common = sum(letter.isupper() for letter in name) == 1 and " " not in name
        return HEADINGS.get(self.kind, "About {}: ").format(name.lower() if common else name)

    @property
    def defines_its_focus(self) -> bool:
        """Whether the answer begins by saying what the thing asked about is."""
        name = re.escape(self.focus.split("(")[0].strip().rstrip("s"))
        begins = re.compile(
            rf"(?:(?:a|an|the) )?{name}[^.]{{0,40}}? (?:is|are|refers|means)\b", re.I
        )
        return bool(self.sentences) and begins.match(self.sentences[0]) is not None


def read_medquad(path: Path) -> list[Entry]:
    """Read `medquad_train.jsonl`."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = " ".join(row["answer"].split())
        entries.append(
            Entry(
                focus=" ".join(row["focus"].split()),
                kind=row["qtype"],
                question=re.sub(r"[\s?]+$", "?", row["question"].replace("(are) ", "")),
                sentences=split_sentences(answer),
                answer=answer,
                for_patients=row["source"].startswith(PATIENT_SOURCES),
            )
        )
    return entries


def split_sentences(answer: str) -> tuple[str, ...]:
    """The sentences of `answer` that say something; none where it is a table."""
    if "Human Phenotype Ontology" in answer:  # some 2,000 tables, flattened
        return ()
    text = " ".join(STAGE_DIRECTIONS.sub(" ", answer).split())
    sentences = SENTENCE_END.split(re.sub(r"^- ", "", text))
    if sentences[0].endswith("?"):  # some answers repeat the question
        sentences = sentences[1:]
    return tuple(sentence for sentence in sentences if not NO_ANSWER.search(sentence))


def read_texts(folder: Path, entries: Iterable[Entry]) -> list[str]:
    """All training text, whole: the OpenStax books and every MedQuAD answer under its title."""
    books = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("openstax_*.txt"))]
    return books + [f"{entry.focus}\n{entry.answer}" for entry in entries]


def cut_documents(texts: Iterable[str], *, length: int = 1500) -> list[str]:
    """Cut `texts` at sentences into pieces of about `length` characters."""
    documents = []
    for text in texts:
        piece = ""
        for sentence in re.split(r"(?<=[.!?])(?=\s)|(?<=\n)(?=#)", text):
            if len(piece) + len(sentence) > length and piece.strip():
                documents.append(piece.strip())
                piece = ""
            piece += sentence
        if len(piece.strip()) > 40:
            documents.append(piece.strip())
    return documents


class Conversations:
    """Draws conversations from the pairs; another seed gives other phrasings and follow-ups."""

    def __init__(self, entries: Sequence[Entry], *, seed: int) -> None:
        """Group the pairs by what they are about."""
        self._random = random.Random(seed)
        self._entries = entries
        self._by_focus: dict[str, list[Entry]] = defaultdict(list)
        defined = {entry.focus for entry in entries if entry.defines_its_focus}
        for entry in entries:
            vague = entry.kind == "information" and not entry.defines_its_focus
            # A well-known disease without a definition is described by the next best.
            wanted = not vague or (entry.is_well_known and entry.focus not in defined)
            if entry.sentences and wanted and len(entry.sentences[0]) < 400:
                self._by_focus[entry.focus].append(entry)

    def short(self) -> Iterator[list[Message]]:
        """One pass of short answers: each disease once, what patients ask about several times."""
        plan = []
        for focus, entries in self._by_focus.items():
            if any(entry.is_well_known for entry in entries):
                plan += [focus] * (WELL_KNOWN_TIMES + len(entries))
            elif any(entry.for_patients for entry in entries):
                plan += [focus] * (1 + len(entries) // 2)
            else:
                plan.append(focus)
        self._random.shuffle(plan)
        for number, focus in enumerate(plan):
            yield self._conversation(self._by_focus[focus])
            if number % 50 == 0:
                yield self._small_talk()

    def detailed(self) -> Iterator[tuple[list[Message], bool]]:
        """One pass of whole answers, and whether each stands there to its end."""
        for entry in self._random.sample(self._entries, len(self._entries)):
            text = entry.answer[:DETAILED_CHARACTERS]
            whole = len(text) == len(entry.answer)
            question = self._ask(entry)
            yield (
                [
                    Message("system", DETAILED),
                    Message("user", question),
                    Message("assistant", text if whole else text.rpartition(" ")[0]),
                ],
                whole,
            )

    def _conversation(self, entries: Sequence[Entry]) -> list[Message]:
        pick = self._random
        definitions = [entry for entry in entries if entry.kind == "information"]
        first = pick.choice(definitions if definitions and pick.random() < 0.6 else entries)
        messages = self._maybe_system()
        answer, rest = self._beginning(first)
        messages += [Message("user", self._ask(first)), Message("assistant", answer)]
        follow = [e for e in entries if e.kind != first.kind and e.kind in FOLLOW_UPS]
        if rest and pick.random() < 0.2:
            messages += [Message("user", pick.choice(MORE)), Message("assistant", rest)]
        if follow and pick.random() < 0.35:
            entry = pick.choice(follow)
            question = pick.choice(FOLLOW_UPS[entry.kind])
            answer, _ = self._beginning(entry)
            messages += [Message("user", question), Message("assistant", answer)]
        return messages

    def _ask(self, entry: Entry) -> str:
        pick = self._random
        if entry.kind not in PHRASINGS or pick.random() < 0.15:
            return entry.question
        focus = entry.focus
        if focus[1:2].islower() and pick.random() < 0.7:
            focus = focus.lower() if pick.random() < 0.7 else focus[0].lower() + focus[1:]
        return pick.choice(PHRASINGS[entry.kind]).format(focus)

    def _beginning(self, entry: Entry) -> tuple[str, str]:
        """The first few sentences, and the few after them."""
        count = self._random.choice((2, 2, 3, 3, 4))
        while count > 1 and len(" ".join(entry.sentences[:count])) > 600:
            count -= 1
        rest = " ".join(entry.sentences[count : count + 4])
        beginning = entry.heading + " ".join(entry.sentences[:count])
        return beginning, rest if 40 < len(rest) < 900 else ""

    def _small_talk(self) -> list[Message]:
        questions, answer = self._random.choice(SMALL_TALK)
        question = Message("user", self._random.choice(questions))
        return [*self._maybe_system(), question, Message("assistant", answer)]

    def _maybe_system(self) -> list[Message]:
        if self._random.random() > 0.12:
            return []
        return [Message("system", self._random.choice(SYSTEM_PROMPTS))]


KEY_WORDS = 8  # shorter questions ("What is glaucoma?") are no evidence of a leak


class HeldOut:
    """The evaluation sets' questions and answers, to be looked for in training text.

    Every whole question and answer of at least `KEY_WORDS` words is looked for, in any place of a
    text and without case.
    """

    def __init__(self, evaluation: Path) -> None:
        """Read every .jsonl file of the folder `evaluation`."""
        self._probes: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for path in sorted(evaluation.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                for text in (row["question"], row.get("answer", "")):
                    words = tuple(text.lower().split())
                    if len(words) >= KEY_WORDS:
                        self._probes[words[:KEY_WORDS]].append(words)
        if not self._probes:
            raise ValueError(f"{evaluation} holds no .jsonl file with questions")

    def find(self, text: str) -> str | None:
        """The first held-out passage that stands in `text`, or None."""
        words = tuple(text.lower().split())
        for start in range(len(words) - KEY_WORDS + 1):
            for probe in self._probes.get(words[start : start + KEY_WORDS], ()):
                if words[start : start + len(probe)] == probe:
                    return " ".join(probe)
        return None

    def check(self, texts: Iterable[str]) -> None:
        """Raise AssertionError where one of `texts` contains a held-out passage."""
        for text in texts:
            if (passage := self.find(text)) is not None:
                raise AssertionError(f"held-out text in the training data: {passage}")
