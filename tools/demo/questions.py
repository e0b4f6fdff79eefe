"""Thirty fixed questions to the demo, and what counts as a good answer to each.

What it is: a list made before the first answer was seen, and four checks that need no judge: the
answer ends by itself, its first sentence names what was asked about, no other disease is named
more often, and no four words follow each other more than three times. What it is not: a check
whether the answer is right; read them in the model card.
"""

from collections import Counter
from dataclasses import dataclass

from m1local.chat import ChatSession
from m1local.engine import Engine
from m1local.generate import Finished, FinishReason
from tools.demo.corpus import SENTENCE_END, WELL_KNOWN

MOST_TOKENS = 256
NGRAM = 4
MOST_REPEATS = 3

# Question, and the names of its subject, any of which will do.
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What is glaucoma?", ("glaucoma",)),
    ("What are the symptoms of asthma?", ("asthma",)),
    ("What is diabetes?", ("diabetes",)),
    ("How is high blood pressure treated?", ("high blood pressure", "hypertension")),
    ("What causes gout?", ("gout",)),
    ("What is a stroke?", ("stroke",)),
    ("What is epilepsy?", ("epilepsy", "epilepsies")),
    ("Tell me about measles.", ("measles",)),
    ("What is osteoporosis?", ("osteoporosis",)),
    ("What is malaria?", ("malaria",)),
    ("How is tuberculosis treated?", ("tuberculosis", "tb")),
    ("What are kidney stones?", ("kidney stone",)),
    ("What is a migraine?", ("migraine",)),
    ("anemia symptoms", ("anemia",)),
    ("What are the symptoms of Parkinson's disease?", ("parkinson",)),
    ("How is breast cancer diagnosed?", ("breast cancer",)),
    ("Explain celiac disease in simple words.", ("celiac",)),
    ("What is cystic fibrosis?", ("cystic fibrosis",)),
    ("Is cystic fibrosis inherited?", ("cystic fibrosis",)),
    ("what is psoriasis", ("psoriasis",)),
    ("What is appendicitis?", ("appendi",)),
    ("heart failure", ("heart failure",)),
    ("What is Lyme disease?", ("lyme",)),
    ("What are the symptoms of a cataract?", ("cataract",)),
    ("How is sleep apnea diagnosed?", ("sleep apnea",)),
    ("What is depression?", ("depression", "depressive")),
    ("Who is at risk for sickle cell disease?", ("sickle cell",)),
    ("What is Marfan syndrome?", ("marfan",)),
    ("What are the symptoms of hypothyroidism?", ("hypothyroidism", "underactive thyroid")),
    ("How can I prevent type 2 diabetes?", ("diabetes",)),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the demo says, and whether it passes the four checks."""

    question: str
    text: str
    ends: bool
    names_subject: bool
    stays: bool
    repeats: int  # how often the most frequent run of four words occurs

    @property
    def is_about_subject(self) -> bool:
        """Names its subject at once and stays with it."""
        return self.names_subject and self.stays


def answer_all(engine: Engine) -> list[Answer]:
    """Ask every question, each in its own conversation, always taking the likeliest token."""
    settings = engine.settings(temperature=0.0, max_new_tokens=MOST_TOKENS)
    answers = []
    for question, names in QUESTIONS:
        session = ChatSession(engine, settings=settings)
        last = list(session.send(question))[-1]
        text = " ".join(session.messages[-1].content.split())
        ends = isinstance(last, Finished) and last.reason is FinishReason.STOP
        answers.append(judge(question, names, text, ends=ends))
    return answers


def judge(question: str, names: tuple[str, ...], text: str, *, ends: bool) -> Answer:
    """Apply the checks to one answer."""
    lower = text.lower()
    first = SENTENCE_END.split(text)[0].lower()
    own = max(lower.count(name) for name in names)
    # "diabetes" in "diabetic retinopathy", or "cancer" in "breast cancer", is not another disease.
    others = [d for d in WELL_KNOWN if not any(d in name or name in d for name in names)]
    words = lower.split()
    runs = Counter(zip(*(words[start:] for start in range(NGRAM)), strict=False))
    return Answer(
        question=question,
        text=text,
        ends=ends,
        names_subject=any(name in first for name in names),
        stays=all(lower.count(other) <= own for other in others),
        repeats=max(runs.values(), default=0),
    )


def summary(answers: list[Answer]) -> dict[str, int]:
    """How many pass each check."""
    return {
        "questions": len(answers),
        "end by themselves": sum(answer.ends for answer in answers),
        "name their subject and stay with it": sum(a.is_about_subject for a in answers),
        "do not repeat themselves": sum(a.repeats <= MOST_REPEATS for a in answers),
    }
