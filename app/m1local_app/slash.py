"""The slash commands of the terminal.

What it is: what each command does to a conversation and says about it; a command that asks the
model returns the answer's events. What it is not: reading lines or showing answers (terminal.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m1local.errors import M1Error
from m1local_app import language, parameters
from m1local_app.answer_view import context_line, note, speed_line
from m1local_app.columns import one_line, shortened, table
from m1local_app.language import marked, tr
from m1local_app.textfile import at_home, read_text_file

if TYPE_CHECKING:
    from m1local.generate import Event
    from m1local_app.conversation import Conversation
    from m1local_app.history import History

Answer = Iterator["Event"] | None
LISTED = 20
OVERWRITE = "--overwrite"


class Leave(Exception):  # noqa: N818  # nothing went wrong
    """The user wants to leave."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command: how it is called, and what it says of itself."""

    name: str
    hint: str
    help: str
    aliases: tuple[str, ...] = ()


COMMANDS = (
    Command("help", "", marked("this list"), ("?",)),
    Command("retry", "", marked("answer the last question again"), ("regen", "r")),
    Command("edit", "[N] [TEXT]", marked("ask the last or N-th question in other words"), ("e",)),
    Command(
        "version", "[K]", marked("other versions of the last answer or question; show the K-th")
    ),
    Command("undo", "", marked("take the last question and its answer back"), ("u",)),
    Command("clear", "", marked("begin a new conversation"), ("new",)),
    Command("history", "", marked("the conversation so far, its questions numbered")),
    Command("read", "FILE [TEXT]", marked("ask about a text file")),
    Command("system", "[TEXT]", marked("show the system prompt, or set it")),
    Command("set", "[NAME VALUE]", marked("change a parameter: /set temp 0.2; alone: list them")),
    Command("show", "WHAT", marked("info, license, parameters, system or quality")),
    Command("stats", "[on|off]", marked("speed and context; show or hide them after answers")),
    Command("save", "TITLE", marked("give the conversation a title")),
    Command("load", "ID|TITLE", marked("go on with another conversation")),
    Command("list", "[WORDS]", marked("the kept conversations, or those that hold the words")),
    Command("export", "[FILE]", marked("write the conversation to a .md, .html or .json file")),
    Command("multi", "", marked("Enter begins another line, Alt-Enter sends; again: as before")),
    Command("lang", "en|zh", marked("speak English or Chinese")),
    Command("bye", "", marked("leave"), ("exit", "quit", "x")),
)
PATH_COMMANDS = ("/read", "/export")


def command_names() -> list[str]:
    """All names and aliases, each with its slash."""
    return [f"/{name}" for command in COMMANDS for name in (command.name, *command.aliases)]


class SlashCommands:
    """Obeys the commands of one terminal."""

    def __init__(self, conversation: "Conversation", *, folder: Path, stats: bool) -> None:
        """Act on `conversation` with the checkpoint in `folder`."""
        self.conversation = conversation
        self.stats = stats  # whether speed is said after answers
        self.multi = False
        self.ask_again = ""  # a text the user shall find at the prompt
        self.editing: int | None = None  # the turn that the next message replaces
        self._folder = folder
        names = {name: command.name for command in COMMANDS for name in command.aliases}
        self._names = names | {command.name: command.name for command in COMMANDS}

    def knows(self, line: str) -> bool:
        """Whether `line` begins with a command's name."""
        return line[1:].strip().partition(" ")[0].lower() in self._names

    def obey(self, line: str) -> Answer:
        """Do what `line` says; raises Leave, or M1Error with what was wrong."""
        typed, _, argument = line[1:].strip().partition(" ")
        name = self._names.get(typed.lower())
        if name is None:
            raise M1Error(tr("There is no command /{name}; /help lists them.", name=typed))
        handler: Callable[[str], Answer] = getattr(self, f"_{name}")
        return handler(argument.strip())

    def _help(self, argument: str) -> None:
        rows = [(f"/{each.name} {each.hint}".strip(), tr(each.help)) for each in COMMANDS]
        rows += [
            ('"""', tr("begin and end a message of several lines")),
            ("Ctrl-C", tr("stop the answer; at the prompt twice: leave")),
            ("Alt-Enter", tr("another line")),
            ("Ctrl-R, Ctrl-G", tr("search what was typed; write in $EDITOR")),
        ]
        width = max(len(left) for left, _ in rows)
        note("\n".join(f"{left:<{width}}  {right}" for left, right in rows))

    def _bye(self, argument: str) -> None:
        raise Leave

    def _retry(self, argument: str) -> Answer:
        sampling = self.conversation.session.settings.sampling
        if sampling.seed is not None or not sampling.temperature:
            note(
                tr(
                    "The seed is set, or the temperature 0: with the same settings the answer will "
                    "be the same."
                )
            )
        return self.conversation.retry()

    def _edit(self, argument: str) -> Answer:
        questions = self._questions()
        if not questions:
            raise M1Error(tr("Nothing was asked yet."))
        first, _, rest = argument.partition(" ")
        number, text = (int(first), rest) if first.isdecimal() else (len(questions), argument)
        if not 1 <= number <= len(questions):
            raise M1Error(
                tr(
                    "There is no question {number} ({count} so far); /history numbers them.",
                    number=number,
                    count=len(questions),
                )
            )
        turn = questions[number - 1]
        if text.strip():
            return self.conversation.edit(turn, text.strip())
        self.ask_again = self.conversation.session.messages[turn].content
        self.editing = turn
        note(tr("Question {number} is edited; Ctrl-C leaves it as it is.", number=number))
        return None

    def _undo(self, argument: str) -> None:
        self.ask_again = self.conversation.undo()
        note(tr("Taken back; the question is at the prompt, Ctrl-C drops it."))

    def _version(self, argument: str) -> None:
        versions = self.conversation.versions()
        if not versions:
            raise M1Error(tr("There are no other versions; /retry and /edit make some."))
        turn = max(versions)
        shown, count = versions[turn]
        if argument:
            if not argument.isdecimal() or not 1 <= int(argument) <= count:
                raise M1Error(tr("There are {count} versions; say which: /version K", count=count))
            self.ask_again = self.conversation.flip(turn, int(argument) - shown)
            shown = int(argument)
        self._history("")
        note(tr("This is version {shown} of {count}.", shown=shown, count=count))

    def _clear(self, argument: str) -> None:
        self.conversation.clear()
        note(tr("A new conversation; the system prompt stays."))

    def _history(self, argument: str) -> None:
        number, lines = 0, []
        for message in self.conversation.session.messages:
            number += message.role == "user"
            mark = f"{number:>3}" if message.role == "user" else "   "
            lines.append(f"{mark}  {_short(message.content)}")
        note("\n".join(lines) or tr("Nothing was said yet."))

    def _read(self, argument: str) -> Answer:
        if not argument:
            raise M1Error(tr("Say which file: /read FILE [QUESTION]"))
        path, question = _path_and_rest(argument)
        text = read_text_file(path)
        return self.conversation.send(f"{text}\n\n{question}".strip())

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.set_system(argument)
            note(tr("The system prompt is set."))
        else:
            note(
                self.conversation.session.system
                or tr("There is no system prompt; /system TEXT sets one.")
            )

    def _set(self, argument: str) -> None:
        session = self.conversation.session
        name, _, value = argument.removeprefix("parameter ").strip().partition(" ")
        if name == "system":
            return self._system(value)
        if name and value:
            session.settings = parameters.changed(session.settings, name, value.strip())
        elif name:
            raise M1Error(tr("Say what {name} shall be: /set NAME VALUE", name=name))
        note(parameters.listed(session.settings))
        return None

    def _show(self, argument: str) -> None:
        from m1local_app.describe import describe, licence, quality

        shown: Mapping[str, Callable[[], str]] = {
            "info": lambda: describe(self._folder),
            "license": lambda: licence(self._folder),
            "licence": lambda: licence(self._folder),
            "parameters": lambda: parameters.listed(self.conversation.session.settings),
            "system": lambda: self.conversation.session.system or tr("There is no system prompt."),
            "quality": lambda: quality(self._folder),
        }
        if argument not in shown:
            raise M1Error(tr("/show info, license, parameters, system or quality"))
        note(shown[argument]())

    def _stats(self, argument: str) -> None:
        session = self.conversation.session
        if argument in ("on", "off"):
            self.stats = argument == "on"
        elif argument:
            raise M1Error(tr("/stats, /stats on or /stats off"))
        answered = [turn.finish for turn in session.turns if turn.finish is not None]
        capacity = session.engine.contexts.capacity
        note(speed_line(answered[-1], None) if answered else tr("Nothing was answered yet."))
        note(context_line(session.used_tokens, capacity))
        note(tr("Speed is shown.") if self.stats else tr("Speed is not shown."))

    def _save(self, argument: str) -> None:
        if not argument:
            raise M1Error(tr("Say how it shall be called: /save TITLE"))
        self._store()
        self.conversation.rename(argument)
        note(tr("Called {title}; `m1 chat --session` and /load find it.", title=argument))

    def _load(self, argument: str) -> None:
        if not argument:
            raise M1Error(tr("Say which one: /load ID or TITLE; /list lists them."))
        found = self._store().find(argument, parts=True)
        self.ask_again = self.conversation.open(found.id)
        note(tr("{title}, {count} messages", title=found.title, count=found.messages))
        self._history("")

    def _list(self, argument: str) -> None:
        store = self._store()
        if argument:
            hits = store.search(argument, limit=LISTED)
            rows = [[str(hit.conversation.id), _short(hit.message.content)] for hit in hits]
        else:
            found = store.conversations(limit=LISTED)
            rows = [[str(each.id), str(each.messages), each.title] for each in found]
        note(table(rows) if rows else tr("There is none."))

    def _export(self, argument: str) -> None:
        from m1local_app.export import write_export

        store = self._store()
        if self.conversation.id is None:
            raise M1Error(tr("Nothing was said yet."))
        overwrite = argument.endswith(OVERWRITE)
        named = argument.removesuffix(OVERWRITE).strip() or "conversation.md"
        path = at_home(_path_and_rest(named)[0] if named[0] in "\"'" else Path(named))
        write_export(store, self.conversation.id, path, overwrite=overwrite)
        note(tr("Wrote {path}.", path=path))

    def _multi(self, argument: str) -> None:
        self.multi = not self.multi
        note(tr("Alt-Enter sends.") if self.multi else tr("Enter sends."))

    def _lang(self, argument: str) -> None:
        if argument not in language.LANGUAGES:
            raise M1Error(tr("/lang en or /lang zh"))
        language.choose(argument)
        note(tr("English"))

    def _questions(self) -> list[int]:
        messages = self.conversation.session.messages
        return [index for index, message in enumerate(messages) if message.role == "user"]

    def _store(self) -> "History":
        if self.conversation.store is None:
            raise M1Error(tr("Nothing is kept here: this was started with --no-history."))
        return self.conversation.store


def _path_and_rest(argument: str) -> tuple[Path, str]:
    """A path, in quotes where it has spaces and something follows, and what follows it."""
    if argument[0] in "\"'" and argument.count(argument[0]) > 1:
        path, _, rest = argument[1:].partition(argument[0])
        return Path(path), rest.strip()
    with contextlib.suppress(OSError, ValueError):  # longer than a name may be, or with a NUL
        if at_home(Path(argument)).is_file():
            return Path(argument), ""
    path, _, rest = argument.partition(" ")
    return Path(path), rest.strip()


def _short(text: str) -> str:
    return shortened(one_line(text), 72)
