"""Words of an emergency: what is noticed, and what is not."""

import pytest

from m1local_app.language import choose
from m1local_app.red_flags import DESPAIR_ADVICE, URGENT_ADVICE, advice


@pytest.mark.parametrize(
    "question",
    [
        "I have chest pain since this morning",
        "My father can't breathe",
        "my father can’t breathe",
        "Her face is drooping and she has slurred speech",
        "sudden weakness of my left arm",
        "He is unconscious",
        "my son swallowed a battery",
        "She had a seizure",
        "my chest hurts",
        "he isn't breathing",
        "我胸痛",
        "爸爸胸口很疼",
        "喘不上来气",
        "他喝了农药",
        "奶奶没有呼吸了",
        "孩子呼吸困难怎么办?",
        "他突然昏迷了",
        "CHEST PAIN",
    ],
)
def test_signs_of_an_emergency_are_noticed(question: str) -> None:
    assert advice(question) == URGENT_ADVICE


@pytest.mark.parametrize(
    "question", ["I want to die", "thoughts of suicide", "我想自杀", "不想活了"]
)
def test_despair_has_an_advice_of_its_own(question: str) -> None:
    assert advice(question) == DESPAIR_ADVICE


@pytest.mark.parametrize(
    "question",
    [
        "What is glaucoma?",
        "How is asthma treated?",
        "What is the risk of stroke with high blood pressure?",
        "chestnut allergy",
        "The pain of a sprained ankle",
        "I breathe well",
        "高血压是什么?",
        "如何预防脑卒中?",
        "青光眼的症状",
        "",
    ],
)
def test_other_questions_are_left_alone(question: str) -> None:
    assert advice(question) is None


def test_the_advice_is_in_the_chosen_language() -> None:
    choose("zh")
    assert "120" in (advice("胸痛") or "")
    assert "急救电话" in (advice("chest pain") or "")
