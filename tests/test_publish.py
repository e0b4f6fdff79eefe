"""Publishing to a hub that cuts and refuses, and the way back; all on loopback."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from m1local.errors import HubError
from m1local_app import boundary
from m1local_app.cli import cli
from m1local_quantize import transfer
from m1local_quantize.hub import RECORD, Record
from m1local_quantize.pipeline import quantize_checkpoint
from m1local_quantize.publish import Publication, Published, Sending, publish
from m1local_quantize.recipe import Recipe
from tests.damage import change_json, overwrite, refused
from tests.hub_server import hurry
from tests.hub_upload_server import UploadHub
from tests.test_pipeline import bytes_of

NAME = "me/tiny-int4"
ASK = ("-p", "hello", "-n", "4", "--temp", "0")
M1 = Callable[..., Result]
# huggingface_hub sends a file in a way that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with several files of weights; not to be written to."""
    folder = tmp_path_factory.mktemp("made") / "tiny-int4"
    source = Path(shutil.copytree(tiny_checkpoint, folder.parent / "tiny-m1"))
    (source / "My licence.txt").write_text("Ask the vendor.")
    list(quantize_checkpoint(source, folder, Recipe.find("int4"), shard_bytes=40_000))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    from huggingface_hub import constants

    server = UploadHub(tmp_path / "hub", NAME)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet storage is not on loopback
    hurry(monkeypatch)
    yield server
    server.close()


@pytest.fixture
def m1(hub: UploadHub, m1_home: Path) -> M1:
    return lambda *arguments, typed=None: CliRunner().invoke(
        cli, [str(argument) for argument in arguments], input=typed
    )


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


def test_what_was_published_comes_back_with_the_same_bytes(
    m1: M1, hub: UploadHub, made: Path, m1_home: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    before = bytes_of(made)
    pushed = m1("push", made, NAME, "--yes")
    assert pushed.exit_code == 0, pushed.stderr
    assert f"Published {NAME}" in said(pushed)
    assert bytes_of(made) == before
    assert bytes_of(hub.folder).keys() == before.keys() | {"README.md", ".gitattributes"}
    assert hub.private
    monkeypatch.setenv("M1_HOME", str(tmp_path / "fresh"))
    ran = m1("run", NAME, *ASK)
    assert ran.exit_code == 0, ran.stderr
    assert not (tmp_path / "fresh" / "models").exists()
    found = bytes_of(tmp_path / "fresh" / "sources" / "me--tiny-int4")
    del found[RECORD]
    assert found == before
    verified = m1("verify", NAME)
    assert "every SHA-256 as in its manifest" in verified.stdout
    assert m1("run", NAME, "--offline", *ASK).stdout == ran.stdout
    assert m1("chat", made, *ASK).stdout == ran.stdout


def test_pull_fetches_a_published_checkpoint(m1: M1, hub: UploadHub, made: Path) -> None:
    assert m1("push", made, NAME, "--yes").exit_code == 0
    pulled = m1("pull", NAME)
    assert pulled.exit_code == 0, pulled.stderr
    assert "recipe" in m1("show", NAME).stdout
    again = m1("quantize", NAME, made.parent / "no")
    assert again.exit_code == 1
    assert "is quantized already" in said(again)


def test_a_quantized_checkpoint_is_refused_as_a_source_before_its_weights_come(
    m1: M1, made: Path, m1_home: Path, tmp_path: Path
) -> None:
    assert m1("push", made, NAME, "--yes").exit_code == 0
    assert "is quantized already" in said(m1("quantize", NAME, tmp_path / "no"))
    wrong = m1("run", NAME, "-r", "int8", *ASK)
    assert "quantized by the recipe int4" in said(wrong)
    offline = m1("run", NAME, "--offline", *ASK)
    assert "--offline forbids to fetch them" in said(offline)
    assert not list((m1_home / "sources").rglob("*.safetensors"))


def test_the_manifest_goes_last_and_weights_first(hub: UploadHub, made: Path) -> None:
    events = list(publish(Publication.prepare(made, NAME)))
    assert hub.commits[:-2] == [[name] for name in weights(made)]
    assert len(weights(made)) > 2
    assert hub.commits[-1] == ["README.md", "m1local.json"]
    assert isinstance(events[-1], Published)
    done = [event.done_bytes for event in events if isinstance(event, Sending)]
    assert done == sorted(done)
    sizes = {path.name: path.stat().st_size for path in hub.folder.iterdir()}
    del sizes[".gitattributes"]
    assert done[-1] == sum(sizes.values())


def test_a_published_checkpoint_that_was_changed_on_the_hub_is_noticed(
    m1: M1, hub: UploadHub, made: Path, m1_home: Path
) -> None:
    assert m1("push", made, NAME, "--yes").exit_code == 0
    overwrite(hub.folder / weights(made)[0], 200, b"\xff\x00\xff")
    for _ in range(3):
        ran = m1("run", NAME, *ASK)
        assert ran.exit_code == 1
        assert "is no whole checkpoint there" in said(ran)
    record = Record.read(m1_home / "sources" / "me--tiny-int4")
    assert record is not None
    assert not record.complete


def test_after_a_cut_the_same_command_goes_on_without_sending_anything_twice(
    m1: M1, hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 2)
    hub.upload_faults = ["", *["cut"] * 99]
    cut = m1("push", made, NAME, "--yes")
    assert cut.exit_code == 1
    assert "The connection failed" in said(cut)
    assert "What was sent is kept; the same command goes on from there." in said(cut)
    assert not (hub.folder / "m1local.json").exists()
    hub.upload_faults = []
    whole = m1("push", made, NAME, "--yes")
    assert whole.exit_code == 0, whole.stderr
    assert f"{weights(made)[0]} (there already)" in said(whole)
    assert sorted(hub.received) == [*weights(made), "tokenizer.model"]
    again = m1("push", made, NAME, "--yes")
    assert "nothing was sent" in said(again)
    assert sorted(hub.received) == [*weights(made), "tokenizer.model"]


@pytest.mark.parametrize("fault", ["cut", "503"])
def test_a_fault_is_survived(hub: UploadHub, made: Path, fault: str) -> None:
    hub.upload_faults = [fault, "", fault]
    assert isinstance(list(publish(Publication.prepare(made, NAME)))[-1], Published)
    assert (hub.folder / "m1local.json").read_bytes() == (made / "m1local.json").read_bytes()


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("create", 401, "The hub does not know you"),
        ("create", 403, "You may not write to me/tiny-int4"),
        ("preupload", 403, "You may not write to me/tiny-int4"),
        ("batch", 401, "The hub does not know you"),
        ("commit", 403, "You may not write to me/tiny-int4"),
        ("commit", 413, "The hub refuses me/tiny-int4"),
        ("commit", 500, "could not be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    hub: UploadHub, made: Path, path: str, status: int, expected: str
) -> None:
    hub.refused = {path: status}
    publication = Publication.prepare(made, NAME)
    with refused(HubError, expected):
        list(publish(publication))
    assert not (hub.folder / "m1local.json").exists()


def test_a_hub_that_cannot_be_reached_is_named(hub: UploadHub, made: Path) -> None:
    with refused(HubError, f"{NAME} could not be reached"):
        Publication.prepare(made, NAME, endpoint="http://127.0.0.1:9")
    hub.status = 401
    with refused(HubError, "The hub does not know you"):
        list(publish(Publication.prepare(made, NAME)))


def test_without_a_login_nothing_is_asked_of_the_hub(
    m1: M1, hub: UploadHub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    result = m1("push", made, NAME, "--yes")
    assert result.exit_code == 1
    assert "You are not logged in to the model hub; log in with `hf auth login`" in said(result)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["mine", "a/b/c", "a b/c", "./here", "/x", "me/-x-", ""])
def test_a_name_that_is_none_is_refused(m1: M1, hub: UploadHub, made: Path, name: str) -> None:
    result = m1("push", made, name, "--yes")
    assert result.exit_code == 1
    assert "cannot be a repository's name; give OWNER/NAME" in said(result)
    assert hub.requests == []


def test_an_original_is_not_ours_to_publish(m1: M1, hub: UploadHub, tiny_checkpoint: Path) -> None:
    for source in (tiny_checkpoint, "m1-tiny"):
        result = m1("push", source, NAME, "--yes")
        assert result.exit_code == 1
        assert "its weights are their maker's to publish" in said(result)
    assert hub.requests == []


def test_a_damaged_or_unfinished_checkpoint_is_refused(
    m1: M1, hub: UploadHub, made: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(made, tmp_path / "damaged"))
    overwrite(damaged / weights(made)[1], 500, b"\xff\x00\xff")
    result = m1("push", damaged, NAME, "--yes")
    assert result.exit_code == 1
    assert "is damaged" in said(result)
    (damaged / "m1local.json").unlink()
    result = m1("push", damaged, NAME, "--yes")
    assert result.exit_code == 1
    assert "it is unfinished" in said(result)
    assert hub.requests == []


def test_it_says_what_it_publishes_and_asks(
    m1: M1, hub: UploadHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = m1("push", made, NAME)
    assert silent.exit_code == 2
    assert "add --yes" in said(silent)
    monkeypatch.setattr(boundary, "is_terminal", lambda: True)
    no = m1("push", made, NAME, typed="n\n")
    assert no.exit_code == 1
    assert f"{NAME} (new; private: others do not see it; --public makes it public)" in said(no)
    for name in (*weights(made), "NOTICE", "README.md", "m1local.json"):
        assert f"KiB {name}" in said(no)
    assert "licence The weights remain under the licence of their source" in said(no)
    assert hub.writes == []
    assert m1("push", made, NAME, typed="y\n").exit_code == 0
    assert hub.private


def test_only_public_makes_it_public(m1: M1, hub: UploadHub, made: Path) -> None:
    assert "public: everybody sees it" in said(m1("push", made, NAME, "--public", "--yes"))
    assert not hub.private
    (hub.folder / "README.md").write_text("mine")
    private = m1("push", made, NAME, "--yes")
    assert private.exit_code == 1
    assert "exists and is public" in said(private)
    assert (hub.folder / "README.md").read_text() == "mine"
    assert "README.md (replaced)" in said(m1("push", made, NAME, "--public", "--yes"))
    hub.private = True
    (hub.folder / "README.md").write_text("mine")
    kept = said(m1("push", made, NAME, "--public", "--yes"))
    assert "private: others do not see it, and it stays so" in kept


def test_a_repository_with_anything_else_in_it_is_left_alone(
    m1: M1, hub: UploadHub, made: Path
) -> None:
    hub.exists = hub.private = True
    (hub.folder / "pytorch_model.bin").write_bytes(b"x")
    result = m1("push", made, NAME, "--yes")
    assert result.exit_code == 1
    assert "holds other files ('pytorch_model.bin')" in said(result)
    (hub.folder / "pytorch_model.bin").unlink()
    (hub.folder / "m1local.json").write_text("{}")
    assert "already holds another checkpoint" in said(m1("push", made, NAME, "--yes"))
    assert hub.writes == []


def test_a_derivative_without_the_agreement_is_told_so(
    m1: M1, hub: UploadHub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "is_terminal", lambda: True)
    folder = Path(shutil.copytree(made, tmp_path / "q"))
    name = "baichuan-inc/Baichuan-M1-14B-Base"
    change_json(folder / "m1local.json", lambda raw: raw.update(source=name))
    assert "no copy lies in the checkpoint" not in said(m1("push", folder, NAME, typed="n\n"))
    change_json(folder / "m1local.json", lambda raw: raw["files"].pop("My licence.txt"))
    assert "no copy lies in the checkpoint" in said(m1("push", folder, NAME, typed="n\n"))
