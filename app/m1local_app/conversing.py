"""From the command line's options to a conversation.

What it is: the question found, mistakes in options said before hours of work, the model loaded, and
the terminal, the single answer or the page begun. What it is not: any of these themselves.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from m1local.errors import M1Error, SamplingError
from m1local.kv_store import FLOAT
from m1local_app.boundary import usage_error
from m1local_app.chat_options import ChatOptions, EngineOptions
from m1local_app.columns import one_line
from m1local_app.language import tr
from m1local_app.options import Chosen, use_threads
from m1local_app.textfile import decoded, read_text_file
from m1local_app.timings import Timings

if TYPE_CHECKING:
    from m1local.engine import Engine
    from m1local.generate import GenerationSettings
    from m1local.placement import GpuLayers
    from m1local_app.conversation import Conversation
    from m1local_app.history import History, StoredConversation

MANIFEST = "m1local.json"
LOOPBACK = "127.0.0.1"


def check_options(wanted: EngineOptions) -> None:
    """Leave with exit code 2 where an option is wrong."""
    from m1local.json_schema import check_schema
    from m1local.sampling import SamplingParams

    try:
        sampling = {name: value for name, value in wanted.changes().items() if name not in _OWN}
        SamplingParams(**sampling)  # type: ignore[arg-type]  # the names are those of `changes`
        if isinstance(wanted, ChatOptions) and (schema := _schema(wanted)) is not None:
            check_schema(schema)
    except SamplingError as error:
        raise usage_error(str(error)) from error
    gpu_layers(wanted.gpu_layers)
    if wanted.system and wanted.system_file:
        raise usage_error(tr("Give --system-prompt or --system-prompt-file, not both."))
    if (
        isinstance(wanted, ChatOptions)
        and not wanted.keep
        and (wanted.resume or wanted.session is not None)
    ):
        raise usage_error(tr("--no-history forbids what --continue and --session need."))
    if isinstance(wanted, ChatOptions) and wanted.session is not None:
        if wanted.resume:
            raise usage_error(tr("Give --continue or --session, not both."))
        if not wanted.session.strip():
            raise usage_error(tr("--session is empty; give a number or a title."))


_OWN = ("max_new_tokens", "stop", "loop_guard", "lookup")  # of an answer, and not of sampling


@dataclass(frozen=True, slots=True)
class Wish:
    """What a command line asks for, with every mistake already said.

    `asked` is the one question, or None; `found` the conversation to go on with, in `store`.
    """

    options: ChatOptions
    asked: str | None
    store: "History | None"
    found: "StoredConversation | None"


def checked(wanted: ChatOptions) -> Wish:
    """Find what can be wrong before anything is fetched, made or loaded."""
    check_options(wanted)
    asked = question(wanted)
    if not (wanted.resume or wanted.session):
        return Wish(wanted, asked, None, None)
    store = _store()
    found = _named(store, wanted.session) if wanted.session else store.latest()
    if found is None and wanted.resume:
        raise M1Error(tr("No conversation is kept yet; start one without --continue."))
    return Wish(wanted, asked, store, found)


def question(wanted: ChatOptions) -> str | None:
    """The one question asked by option, file or pipe, or None for a conversation."""
    asked = [] if wanted.prompt is None else [wanted.prompt]
    if wanted.prompt_file is not None:
        asked.append(read_text_file(wanted.prompt_file))
    if (piped := _piped_text()) is not None:
        asked.append(piped)
    if not asked:
        return None
    text = "\n\n".join(part for part in asked if part.strip())
    if not text:
        raise usage_error(
            tr("there is no question: neither --prompt, --file nor the pipe holds any text.")
        )
    return text


def _greet(chosen: Chosen, *, raw: bool) -> None:
    """Say what answers, and what quantizing has cost it."""
    from m1local.checkpoint import is_quantized
    from m1local.manifest import CheckpointManifest
    from m1local_app.answer_view import note
    from m1local_app.progress import quality_in_short

    kind = tr("continues your text") if raw else tr("chat")
    note(tr("{label}: {kind}; not medical advice.", label=chosen.label, kind=kind))
    if is_quantized(chosen.folder):
        cost = quality_in_short(CheckpointManifest.read(chosen.folder))
        if cost is not None:
            note(cost)


def converse(chosen: Chosen, wish: Wish, timings: Timings) -> None:
    """Answer the one question, or talk until the user leaves."""
    from m1local_app.answer_view import note
    from m1local_app.line_editor import draws
    from m1local_app.notices import show_medical_notice_once
    from m1local_app.terminal import Terminal

    wanted, asked = wish.options, wish.asked
    engine = load(chosen, wanted, timings)
    raw = wanted.raw or not engine.generation.is_chat
    if raw and asked is not None and (wanted.resume or wanted.session):
        raise M1Error(
            tr(
                "Text that is continued is kept in no conversation: leave --session and --continue "
                "out, or --raw, which a Base model cannot do without."
            )
        )
    # A single question is kept only as part of a conversation that was named.
    kept = wanted.keep and not raw and asked is None
    conversation = _conversation(engine, chosen, wanted, wish.store or (_store() if kept else None))
    show_medical_notice_once()
    unanswered = _resume(conversation, wish)
    timings.done("conversation")
    if wanted.timings:
        note(timings.table())
    if asked is not None:
        _answer(conversation, asked, wanted, raw=raw)
        return
    _greet(chosen, raw=raw)
    Terminal(
        conversation,
        folder=chosen.folder,
        raw=raw,
        stats=sys.stderr.isatty() or wanted.timings if wanted.stats is None else wanted.stats,
        markdown=not raw and (draws() if wanted.markdown is None else wanted.markdown),
    ).run(unanswered)


def _answer(conversation: "Conversation", asked: str, wanted: ChatOptions, *, raw: bool) -> None:
    """Answer one question, and nothing else."""
    from m1local_app.answer_view import StoppedError, note, note_advice, print_answer

    note_advice(asked)
    session = conversation.session
    events = session.engine.complete(asked, session.settings) if raw else conversation.send(asked)
    try:
        print_answer(
            events,
            stats=wanted.timings if wanted.stats is None else wanted.stats,
            markdown=wanted.markdown is True and not raw,
        )
    except StoppedError:
        raise KeyboardInterrupt from None
    finally:
        events.close()  # type: ignore[attr-defined]  # a generator, typed as an iterator
    for said in (conversation.news(), conversation.trouble()):
        if said:
            note(said)


def serve_page(
    chosen: Chosen,
    wanted: EngineOptions,
    *,
    port: int,
    browser: bool,
    host: str = LOOPBACK,
    auth: str | None = None,
) -> None:
    """Open the page and wait until Ctrl-C."""
    from m1local_app.notices import show_medical_notice_once
    from m1local_app.web.desk import Desk
    from m1local_app.web.serving import serve

    engine = load(chosen, wanted, Timings())
    show_medical_notice_once()
    desk = Desk(
        engine,
        chosen.folder,
        chosen.label,
        _settings(engine, wanted),
        _store() if not isinstance(wanted, ChatOptions) or wanted.keep else None,
        system=_system(wanted),
        overflow=wanted.overflow,
        context_tokens=wanted.context_tokens,
        gpu_layers=gpu_layers(wanted.gpu_layers),
        kv_type=wanted.kv_type or FLOAT,
        given=_given(wanted),
    )

    user, _, password = (auth or "").partition(":")
    serve(desk, host=host, port=port, browser=browser, auth=(user, password) if auth else None)


def _given(wanted: EngineOptions) -> frozenset[str]:
    """The page's settings that the command line gives, so that it wins over what was chosen."""
    from m1local_app.web.forms import NAMES

    given = {name for name in wanted.changes() if name in NAMES}
    if wanted.system or wanted.system_file:
        given.add("system")
    if wanted.overflow != EngineOptions().overflow:
        given.add("overflow")
    return frozenset(given)


def check_host(host: str, auth: str | None) -> None:
    """Leave with exit code 2 where others could come in without a password."""
    from m1local_app.web.policy import is_loopback

    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user and password):
        raise usage_error(tr("--auth must be USER:PASSWORD."))
    if ":" in host:
        raise usage_error(
            tr("--host {host}: the page is served at IPv4 addresses and names only.", host=host)
        )
    if auth is None and not is_loopback(host):
        raise usage_error(
            tr("--host {host} lets others reach this page; add --auth USER:PASSWORD.", host=host)
        )


def load(chosen: Chosen, wanted: EngineOptions, timings: Timings) -> "Engine":
    """The model, with the threads and the context that were asked for."""
    from m1local.engine import Engine
    from m1local.native import library
    from m1local_app import idle_card

    use_threads(wanted.threads)
    library.status()  # compiled now, if it never was
    timings.done("library")
    if wanted.gpu_layers == "auto":
        idle_card.tell()
    engine = Engine.load(
        chosen.folder,
        context_tokens=wanted.context_tokens,
        gpu_layers=gpu_layers(wanted.gpu_layers),
        kv_type=wanted.kv_type or FLOAT,
        done=timings.done,
    )
    _tell_where(engine)
    return engine


def _tell_where(engine: "Engine") -> None:
    """Say what went to a card, and how fast."""
    from m1local.placement import why_plain
    from m1local_app.answer_view import note
    from m1local_app.kept import size_text

    placement, moved = engine.placement, engine.loaded
    if placement is None or moved is None:
        return
    layers = engine.model.config.num_hidden_layers
    note(
        tr(
            "{count} of {layers} layers on the card: {size} in {seconds:.1f} s ({speed:.1f} GB/s)",
            count=layers - placement.first,
            layers=layers,
            size=size_text(moved.nbytes),
            seconds=moved.seconds,
            speed=moved.nbytes / 1e9 / max(moved.seconds, 1e-9),
        )
    )
    if reason := why_plain(placement.card):
        note(tr("m1local's kernels do not run on this card, so all is slower: {why}", why=reason))


def gpu_layers(text: str) -> "GpuLayers":
    """What --gpu-layers says; raises UsageError for what is neither auto, all nor a number."""
    if text == "auto":
        return "auto"
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise usage_error(tr("--gpu-layers is {text!r}; it is auto, all or a number.", text=text))
    return int(text)


def _settings(engine: "Engine", wanted: EngineOptions) -> "GenerationSettings":
    schema = _schema(wanted) if isinstance(wanted, ChatOptions) else None
    return engine.settings(**wanted.changes(), json_schema=schema)


def _conversation(
    engine: "Engine", chosen: Chosen, wanted: ChatOptions, store: "History | None"
) -> "Conversation":
    from m1local.chat import ChatSession, Overflow
    from m1local_app.conversation import Conversation

    session = ChatSession(
        engine,
        system=_system(wanted),
        settings=_settings(engine, wanted),
        overflow=Overflow(wanted.overflow),
    )
    return Conversation(session, store, label=chosen.label, checkpoint=checkpoint_id(chosen.folder))


def _store() -> "History":
    from m1local_app.history import History

    return History.open()


def _resume(conversation: "Conversation", wish: Wish) -> str:
    """Open what --continue or --session found; returns its last question if it has no answer."""
    from m1local_app.answer_view import note

    unanswered = ""
    if wish.found is not None:
        unanswered = conversation.open(wish.found.id)
        note(tr("Going on with {id}, {title}.", id=wish.found.id, title=wish.found.title))
        if system := _system(wish.options):
            conversation.set_system(system)
    elif wish.options.session:
        conversation.begin_as(one_line(wish.options.session))
    return unanswered


def _named(store: "History", name: str) -> "StoredConversation | None":
    """The conversation of that number or very title, or None; raises M1Error for several."""
    if name.strip().isdecimal():
        return store.find(name)
    title = one_line(name)
    found = [each for each in store.conversations() if each.title == title]
    return store.find(title) if len(found) > 1 else next(iter(found), None)


def _system(wanted: EngineOptions) -> str:
    return wanted.system if wanted.system_file is None else read_text_file(wanted.system_file)


def _schema(wanted: ChatOptions) -> str | None:
    if wanted.json_schema_file is None:
        return wanted.json_schema
    return read_text_file(wanted.json_schema_file)


def checkpoint_id(folder: Path) -> str:
    """What tells one checkpoint from all others: the SHA-256 of its manifest; "" without one."""
    manifest = folder / MANIFEST
    return hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else ""


def _piped_text() -> str | None:
    """What was piped into the command, or None when a person sits at it."""
    if sys.stdin is None or sys.stdin.isatty():
        return None
    try:
        text = decoded(sys.stdin.buffer.read())
    except OSError as error:
        raise M1Error(tr("The piped text cannot be read: {reason}.", reason=error)) from error
    if text is None:
        raise M1Error(tr("{path} is no text in UTF-8, UTF-16 or GB18030.", path=tr("The input")))
    return text
