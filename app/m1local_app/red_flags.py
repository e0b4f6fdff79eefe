"""Words of an emergency in a question, in English and Chinese, and what is said then.

What it is: a short list of patterns that are looked for, and one calm line of advice. What it is
not: a diagnosis or a triage. It knows words, not people: it will miss emergencies and see some
where there is none, so it only ever adds a line, and nothing is refused.
"""

import re

from m1local_app.language import marked, tr

# Each is a sign that emergency services name. "No chest pain" and "the chest pain of 2019" find it
# too: a line too many costs nothing. Words of prevention ("stroke risk") are no sign.
URGENT = (
    r"(chest|heart) (pain|pressure|tightness)", r"pain in (my|the|his|her) chest",
    r"chest (hurts|aches|is hurting)",
    r"crushing pain", r"heart attack",
    r"(can'?t|can ?not|unable to|hard to|struggling to|trouble|difficulty) breath(e|ing)",
    r"(isn'?t|not|stopped) breathing", r"short(ness)? of breath",
    r"(is|am|he'?s|she'?s|i'?m) (choking|suffocating)",
    r"(face|mouth) (is )?(droop|sagg)\w*", r"slurred speech", r"(sudden|one.sided) (weak|numb)\w+",
    r"having a stroke", r"(signs|symptoms) of (a )?stroke", r"worst headache",
    r"unconscious", r"not responding", r"(pass|passed|passing) out", r"seizures?", r"convuls\w+",
    r"(severe|heavy|uncontrolled) bleeding", r"(cough|vomit)\w* (up )?blood",
    r"anaphyla\w+", r"(throat|tongue|lips) (is |are )?swelling", r"overdos\w+", r"poison(ed|ing)",
    r"swallowed (bleach|poison|a battery|batteries)",
    "(胸|胸口|胸部|心口|心脏)(很|好|剧烈|一阵)?(剧)?(痛|疼)", "胸闷", "心绞痛", "心梗", "心肌梗死",
    "心脏病发作", "呼吸困难", "喘不(过|上)来?气", "没有?呼吸", "脑出血", "脑溢血", "服毒",
    "喝了?农药",
    "无法呼吸", "窒息", "口角歪斜", "嘴歪", "半身(无力|麻木|不遂)", "言语不清", "说话不清",
    "中风了", "脑卒中发作", "昏迷", "失去意识", "晕倒", "抽搐", "大出血", "咯血", "呕血", "吐血",
    "过敏性休克", "喉头水肿", "服药过量", "中毒", "剧烈头痛",
)  # fmt: skip
DESPAIR = (
    r"suicid\w*", r"kill(ing)? (myself|himself|herself)", r"end (my|his|her) (own )?life",
    r"want(s)? to die", r"hurt(ing)? myself", r"self.?harm\w*", r"don'?t want to live",
    "自杀", "自殺", "不想活", "想死", "轻生", "自残", "结束(自己的)?生命", "想(跳楼|自尽|一死)",
)  # fmt: skip


def _found(patterns: tuple[str, ...]) -> re.Pattern[str]:
    # Chinese has no spaces, so only Latin letters need to begin and end as words.
    return re.compile(
        "|".join(rf"\b(?:{each})\b" if each.isascii() else f"(?:{each})" for each in patterns),
        re.IGNORECASE,
    )


_URGENT, _DESPAIR = _found(URGENT), _found(DESPAIR)
URGENT_ADVICE = marked(
    "If this is happening now, call your local emergency number (112, 911; in China 120) before "
    "you read on. Do not wait for an answer here."
)
DESPAIR_ADVICE = marked(
    "If you are thinking of ending your life, please talk to someone now: your local emergency "
    "number or crisis line (988 in the United States; 12356 in China), or a person near you."
)


def advice(question: str) -> str | None:
    """The line to put above the answer to `question`, or None where no such word is in it."""
    text = question.replace("’", "'")
    if _DESPAIR.search(text):
        return tr(DESPAIR_ADVICE)
    return tr(URGENT_ADVICE) if _URGENT.search(text) else None
