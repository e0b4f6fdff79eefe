"""The slash commands: what each does, what each says, and every mistake in one line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from m1local.chat import ChatSession
from m1local.engine import Engine
from m1local.errors import M1Error, SamplingError
from m1local_app import parameters
from m1local_app.conversation import Conversation
from m1local_app.history import History
from m1local_app.slash import COMMANDS, Leave, SlashCommands, command_names


@pytest.fixture
def slash(engine: Engine, tiny_checkpoint: Path, tmp_path: Path) -> Iterator[SlashCommands]:
    session = ChatSession(engine, settings=engine.settings(max_new_tokens=6))
    with History.open(tmp_path / "history.db") as store:
        conversation = Conversation(session, store, label="tiny", checkpoint="")
        yield SlashCommands(conversation, folder=tiny_checkpoint, stats=True)


def ask(slash: SlashCommands, text: str) -> None:
    for _ in slash.conversation.send(text):
        pass


def obey(slash: SlashCommands, line: str) -> None:
    for _ in slash.obey(line) or ():
        pass


def questions(slash: SlashCommands) -> list[str]:
    return [m.content for m in slash.conversation.session.messages if m.role == "user"]


def test_every_command_and_alias_is_known(slash: SlashCommands) -> None:
    names = command_names()
    assert len(names) == len(set(names))
    for command in COMMANDS:
        assert callable(getattr(slash, f"_{command.name}"))
    for wanted in ("/?", "/new", "/regen", "/exit", "/quit", "/bye", "/u", "/e", "/r"):
        assert wanted in names


def test_help_names_every_command(slash: SlashCommands, capsys: pytest.CaptureFixture[str]) -> None:
    obey(slash, "/?")
    said = capsys.readouterr()
    assert said.out == ""
    for command in COMMANDS:
        assert f"/{command.name}" in said.err


def test_a_conversation_that_was_deleted_elsewhere_keeps_its_title(slash: SlashCommands) -> None:
    ask(slash, "hello")
    store, identifier = slash.conversation.store, slash.conversation.id
    assert store is not None
    assert identifier is not None
    title = slash.conversation.title
    store.delete(identifier)
    assert slash.conversation.title == title != ""
    ask(slash, "and on")
    assert [one.id for one in store.conversations()] == [identifier]


def test_an_unknown_command_is_one_line(slash: SlashCommands) -> None:
    for line in ("/nonsense", "/", "/help/me"):
        with pytest.raises(M1Error, match="no command /"):
            obey(slash, line)


def test_leaving(slash: SlashCommands) -> None:
    for line in ("/bye", "/exit", "/QUIT"):
        with pytest.raises(Leave):
            obey(slash, line)


def test_going_back(slash: SlashCommands, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("/retry", "/undo", "/edit"):
        with pytest.raises(M1Error, match="Nothing was asked"):
            obey(slash, line)
    ask(slash, "one")
    ask(slash, "two")
    obey(slash, "/retry")
    assert questions(slash) == ["one", "two"]
    obey(slash, "/edit 1 first")
    assert questions(slash) == ["first"]
    obey(slash, "/edit in other words")
    assert questions(slash) == ["in other words"]
    obey(slash, "/edit")
    assert (slash.ask_again, slash.editing) == ("in other words", 0)
    with pytest.raises(M1Error, match="There is no question 9"):
        obey(slash, "/edit 9 x")
    obey(slash, "/undo")
    assert questions(slash) == []
    assert slash.ask_again == "in other words"
    assert "Taken back" in capsys.readouterr().err


def test_earlier_versions_come_back(
    slash: SlashCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(slash, "one")
    ask(slash, "two")
    with pytest.raises(M1Error, match="no other versions"):
        obey(slash, "/version")
    before = slash.conversation.session.messages
    obey(slash, "/edit 1 other")
    assert questions(slash) == ["other"]
    obey(slash, "/version")
    assert "version 2 of 2" in capsys.readouterr().err
    for wrong in ("0", "3", "x"):
        with pytest.raises(M1Error, match="There are 2 versions"):
            obey(slash, f"/version {wrong}")
    obey(slash, "/version 1")
    assert slash.conversation.session.messages == before


def test_parameters_are_set_shown_and_checked(
    slash: SlashCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    session = slash.conversation.session
    obey(slash, "/set temp 0.25")
    obey(slash, "/set parameter top_k 7")
    obey(slash, "/set --seed 5")
    obey(slash, "/set stop END OF IT")
    obey(slash, "/set loop-guard off")
    assert session.settings.sampling.temperature == 0.25
    assert (session.settings.sampling.top_k, session.settings.sampling.seed) == (7, 5)
    assert (session.settings.stop, session.settings.loop_guard) == (("END OF IT",), False)
    obey(slash, "/set seed none")
    assert session.settings.sampling.seed is None
    obey(slash, "/set system be kind")
    assert session.system == "be kind"
    capsys.readouterr()
    obey(slash, "/set")
    shown = capsys.readouterr().err
    for name in parameters.NAMES:
        assert name in shown
    before = session.settings
    for line in ("/set temp warm", "/set predict 0", "/set nonsense 1", "/set temp",
                 "/set loop-guard perhaps"):  # fmt: skip
        with pytest.raises(M1Error):
            obey(slash, line)
    with pytest.raises(SamplingError):
        obey(slash, "/set temp -1")
    assert session.settings == before


def test_every_parameter_can_be_set_to_what_is_listed(slash: SlashCommands) -> None:
    settings = slash.conversation.session.settings
    for line in parameters.listed(settings).splitlines():
        name, value = line.split(maxsplit=1)
        if name != "stop":
            assert parameters.changed(settings, name, value) == settings, line


def test_what_can_be_shown(slash: SlashCommands, capsys: pytest.CaptureFixture[str]) -> None:
    for what, wanted in (
        ("info", "layers"),
        ("license", "no medical advice"),
        ("parameters", "repeat-penalty"),
        ("system", "no system prompt"),
        ("quality", "not quantized"),
    ):
        obey(slash, f"/show {what}")
        assert wanted in " ".join(capsys.readouterr().err.split())
    with pytest.raises(M1Error, match="/show info"):
        obey(slash, "/show everything")


def test_files_are_read_and_mistakes_said(slash: SlashCommands, tmp_path: Path) -> None:
    (tmp_path / "my note.txt").write_text("\ufeff病人 has a cough\n", encoding="utf-8")
    obey(slash, f"/read {tmp_path}/my note.txt")
    obey(slash, f'/read "{tmp_path}/my note.txt" What is it?')
    assert questions(slash) == ["病人 has a cough", "病人 has a cough\n\nWhat is it?"]
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    for line, wanted in (
        ("/read", "Say which file"),
        (f"/read {tmp_path}/nowhere.txt", "cannot be read: No such file"),
        (f"/read {tmp_path}/image.png", "UTF-8"),
        (f"/read {tmp_path}", "cannot be read"),
        (f"/read nowhere.txt {'a long question ' * 30}", "nowhere.txt cannot be read"),
        ("/read ~nobody-at-all/note.txt", "cannot be read"),
        ("/read a\0b", "cannot be read"),
    ):
        with pytest.raises(M1Error, match=wanted):
            obey(slash, line)


def test_conversations_are_saved_listed_loaded_and_exported(
    slash: SlashCommands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(M1Error, match="Nothing was said"):
        obey(slash, f"/export {tmp_path}/early.md")
    ask(slash, "高血压是什么")
    obey(slash, "/save 血压")
    obey(slash, "/clear")
    assert questions(slash) == []
    ask(slash, "asthma")
    capsys.readouterr()
    obey(slash, "/list")
    listed = capsys.readouterr().err
    assert "血压" in listed
    assert "asthma" in listed
    obey(slash, "/list 血压")
    assert "asthma" not in capsys.readouterr().err
    obey(slash, "/load 血压")
    assert questions(slash) == ["高血压是什么"]
    obey(slash, f"/export {tmp_path}/talk.html")
    assert "高血压是什么" in (tmp_path / "talk.html").read_text(encoding="utf-8")
    obey(slash, f"/export {tmp_path}/talk.html --overwrite")
    obey(slash, f'/export "{tmp_path}/a talk.md"')
    assert (tmp_path / "a talk.md").exists()
    for line, wanted in (
        ("/load", "Say which one"),
        ("/load nowhere", "No conversation is called"),
        ("/save", "how it shall be called"),
        (f"/export {tmp_path}/talk.docx", "md"),
        (f"/export {tmp_path}/talk.html", "is there already"),
    ):
        with pytest.raises(M1Error, match=wanted):
            obey(slash, line)


def test_without_a_store_its_commands_say_so(engine: Engine, tiny_checkpoint: Path) -> None:
    conversation = Conversation(ChatSession(engine), None, label="tiny", checkpoint="")
    slash = SlashCommands(conversation, folder=tiny_checkpoint, stats=False)
    for line in ("/save x", "/load x", "/list", "/export x.md"):
        with pytest.raises(M1Error, match="--no-history"):
            obey(slash, line)


def test_switches(slash: SlashCommands, capsys: pytest.CaptureFixture[str]) -> None:
    obey(slash, "/stats")
    assert "Nothing was answered yet" in capsys.readouterr().err
    ask(slash, "one")
    obey(slash, "/stats off")
    assert not slash.stats
    assert "tokens/s" in capsys.readouterr().err
    obey(slash, "/multi")
    assert slash.multi
    obey(slash, "/lang zh")
    assert "中文" in capsys.readouterr().err
    for line in ("/lang fr", "/stats perhaps"):
        with pytest.raises(M1Error):
            obey(slash, line)
