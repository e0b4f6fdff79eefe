"""A card that is there while the CPU computes: which, why, and what helps.

What it is: what `m1 doctor` says about it, and one line where a model is to run, before hours are
spent on a CPU: pip installs a torch without CUDA on Windows, and a driver may be older than torch
wants. What it is not: for whoever chose the CPU (--gpu-layers 0).
"""

from dataclasses import dataclass
from functools import cache

import torch

from m1local.cuda import driver
from m1local.memory import used_device
from m1local_app.answer_view import note
from m1local_app.language import tr

# Forced, since to pip a torch of any build is there already.
INSTALL = (
    'pip install --force-reinstall "torch>=2.8,<2.14" '
    "--index-url https://download.pytorch.org/whl/cu128"
)
SAID = 160  # characters of an error


@dataclass(frozen=True, slots=True)
class IdleCard:
    """A card's name, why torch cannot use it, and what to do."""

    name: str
    reason: str
    advice: str


def idle_card() -> IdleCard | None:
    """The first card, if there is one and torch does not use it."""
    if used_device().type != "cpu":
        return None
    if torch.cuda.is_available():
        return IdleCard(
            torch.cuda.get_device_name(0),
            tr("this build of torch has no code for the card"),
            tr("one for an older CUDA may have"),
        )
    name = driver.first_card()
    if not name:
        return None
    if torch.version.cuda is None:
        return IdleCard(name, tr("torch was built without CUDA"), INSTALL)
    refusal = _refusal()
    if "too old" in refusal:
        return IdleCard(name, refusal, tr("update NVIDIA's driver"))
    return IdleCard(
        name, refusal, tr("restart the machine; if that does not help, update NVIDIA's driver")
    )


def _refusal() -> str:
    """Why torch does not begin to use a card, in its own words."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # of torch or the driver; it is only to be said
        return str(error).partition(". ")[0].partition("\n")[0][:SAID]
    return tr("torch finds no card")


@cache
def tell() -> None:
    """Say once that a card is idle, if one is."""
    found = idle_card()
    if found is None:
        return
    note(
        tr("{card} is not used, the CPU computes: {reason}.", card=found.name, reason=found.reason)
    )
    note(f"-> {found.advice}", copied=True)
