"""What the page's settings mean: values of a form to the settings of an answer, and the presets.

What it is: names, ranges and the system prompts of the presets. What it is not: the form's look,
or the check of a value, which m1local.sampling does.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Self

from m1local.chat import Overflow
from m1local.errors import M1Error
from m1local.generate import GenerationSettings
from m1local_app.language import LANGUAGES, marked, speaking, tr

# Name and system prompt; the first is none.
PRESETS = (
    (marked("General"), ""),
    (
        marked("Explain to a patient"),
        marked(
            "Explain medical matters to a patient without training: short sentences, everyday "
            "words, each technical term explained. Say what is uncertain, when to see a doctor, "
            "and which signs are urgent."
        ),
    ),
    (
        marked("Summarise a report"),
        marked(
            "Summarise the medical report that you are given: reason, findings, values outside "
            "their range, conclusions, open questions. Use only what it says, quote numbers "
            "exactly, and name what is missing or contradicts itself."
        ),
    ),
    (
        marked("Differential diagnosis"),
        marked(
            "You assist a physician. Give a differential diagnosis as a table: condition, what "
            "speaks for it, what against it, the next test. Put what is dangerous and must not be "
            "missed first. Say what information is missing. Decide nothing."
        ),
    ),
)
OWN = marked("Own text, or none of these")  # in the list of roles, where no preset is meant
OVERFLOWS = (
    (marked("Stop and say so"), "stop"),
    (marked("Leave out the oldest turns"), "rolling"),
    (marked("Leave out turns in the middle"), "truncate-middle"),
)


@dataclass(frozen=True, slots=True)
class Form:
    """The values of the settings form, in the order it shows them."""

    system: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    max_new_tokens: int
    seed: int | None
    overflow: str

    @classmethod
    def of(cls, settings: GenerationSettings, *, system: str, overflow: str) -> Self:
        """The form that shows `settings`."""
        sampling = settings.sampling
        return cls(
            system,
            sampling.temperature,
            sampling.top_k or 0,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            settings.max_new_tokens,
            sampling.seed,
            overflow,
        )

    @classmethod
    def read(cls, values: Sequence[Any]) -> Self:
        """The form that the browser sent; raises M1Error for a field that was left empty."""
        names = ("temperature", "top-k", "top-p", "min-p", "repeat-penalty", "predict")
        system, *numbers, seed, overflow = values
        for name, value in zip(names, numbers, strict=True):
            if value is None:
                raise M1Error(tr("The setting {name} is empty; give it a number.", name=name))
        temperature, top_k, top_p, min_p, penalty, tokens = numbers
        if int(tokens) < 1:
            raise M1Error(tr("{value!r} is no value of {name}.", value=tokens, name="predict"))
        number = None if seed is None else int(seed)
        return cls(
            str(system or "").strip(), float(temperature), int(top_k), float(top_p), float(min_p),
            float(penalty), int(tokens), number, str(overflow),
        )  # fmt: skip

    def settings(self, base: GenerationSettings) -> GenerationSettings:
        """`base` with what the form says; raises SamplingError for a value out of its range."""
        sampling = replace(
            base.sampling,
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
        return replace(base, sampling=sampling, max_new_tokens=self.max_new_tokens)

    @property
    def policy(self) -> Overflow:
        """What to do when the context is full."""
        return Overflow(self.overflow)

    @property
    def values(self) -> tuple[Any, ...]:
        """One value for each field, in order."""
        return astuple(self)


NAMES = tuple(each.name for each in fields(Form))


def roles() -> list[str]:
    """The presets' names in the chosen language, and at the end the entry for none of them."""
    return [*(tr(name) for name, _ in PRESETS), tr(OWN)]


def preset(name: str) -> str | None:
    """The system prompt of the preset called `name` in the chosen language; None for no preset."""
    found = {tr(known): prompt for known, prompt in PRESETS}.get(name)
    return tr(found) if found else found


def role(system: str) -> str:
    """The entry of `roles` that the system prompt `system` is of, whichever its language."""
    for name, prompt in PRESETS:
        for spoken in LANGUAGES:
            with speaking(spoken):
                same = system.strip() == (tr(prompt) if prompt else "")
            if same:
                return tr(name)
    return tr(OWN)
