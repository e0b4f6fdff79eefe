"""What every test may use: a tiny model, a tiny checkpoint, a tiny tokenizer, and no network."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from m1local.config import M1Config
from m1local.engine import Engine
from m1local.model import M1Model
from m1local.native import library
from m1local.tokenizer import M1Tokenizer
from m1local_app import language

if not torch.cuda.is_available():  # before Triton is imported: its kernels are then interpreted
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite("tests.web_page")
pytest_plugins = ("tests.web_fixtures",)
torch.set_num_threads(1)  # matrices this small are slower with more

ROOT = Path(__file__).parent.parent
# Where kernels are checked; with its number, as tensors say it.
CARD = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# Material that may not be redistributed (see docs/architecture.md); tests skip where it is absent.
REFERENCE = ROOT.parent / "shared"
LOOPBACK = ("127.", "localhost", "::1")
Process = Callable[..., "subprocess.Popen[str]"]

# Sliding and global layers have different head counts on purpose: mixing them up must fail.
TINY: dict[str, Any] = {
    "architectures": ["BaichuanM1ForCausalLM"],
    "model_type": "baichuan_m1",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 8,
    "num_swa_key_value_heads": 4,
    "sliding_window": 8,
    "sliding_window_layers": [1, 3],
    "conv_window": 2,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GENERATION = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "max_new_tokens": 32,
    "eos_token_id": 2,
    "assistant_token_id": 7,
}
OVERLAY = ["<pad>", "<s>", "</s>", "<unk>", "<B_SYS>", "<B_USYS>", "<C_Q>", "<C_A>"]
SENTENCES = (
    "The heart pumps blood through the body.",
    "What is glaucoma? It is a disease of the eye.",
    "高血压是一种常见的慢性病。",
)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def tiny_config() -> M1Config:
    """Four layers, two of them sliding with a window of 8."""
    return M1Config.from_dict(TINY)


def random_model(config: M1Config, seed: int = 0) -> M1Model:
    """A model with seeded weights large enough for every part to matter, head rows normalized."""
    generator = torch.Generator().manual_seed(seed)
    model = M1Model(config)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.2 * noise
        elif "conv_" in name:
            parameter.data = 0.5 + 0.3 * noise
        else:
            parameter.data = noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    model.lm_head.weight.data = torch.nn.functional.normalize(model.lm_head.weight.data, dim=-1)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny_model(tiny_config: M1Config) -> M1Model:
    """A float32 model of `tiny_config`."""
    return random_model(tiny_config)


def make_endless(model: M1Model) -> None:
    """Let `model` never draw one of the first ids, the markers that end an answer.

    Column 0 of the residual stream stays at a constant that only those ids' head rows look at.
    """
    backbone = model.model
    backbone.embed_tokens.weight.data[:, 0] = 5
    for layer in backbone.layers:
        layer.get_parameter("self_attn.o_proj.weight").data[0] = 0
        layer.get_parameter("mlp.down_proj.weight").data[0] = 0
    backbone.norm.weight.data[0] = 20
    model.lm_head.weight.data[:, 0] = 0
    model.lm_head.weight.data[: len(OVERLAY)] = 0
    model.lm_head.weight.data[: len(OVERLAY), 0] = -1


def write_tokenizer(folder: Path) -> None:
    """A SentencePiece model of the real kind, with byte fallback and overlaid reserved pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<SEP>", *(f"<reserved_{i}>" for i in range(6))],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {str(i): {"content": text, "special": i != 7} for i, text in enumerate(OVERLAY)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))


def write_checkpoint(
    folder: Path, raw: dict[str, Any] | None = None, *, seed: int = 0, endless: bool = False
) -> None:
    """An original bf16 checkpoint in two shards with an index, and lm_head not normalized."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = TINY if raw is None else raw
    model = random_model(M1Config.from_dict(raw), seed)
    if endless:
        make_endless(model)
    model.lm_head.weight.data *= 3
    tensors = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    names = sorted(tensors)
    shards = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in shard}, folder / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    write_tokenizer(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny original checkpoint; not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-m1"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its answers end only where they are cut off, so there always is one."""
    folder = tmp_path_factory.mktemp("endless")
    write_checkpoint(folder, endless=True)
    return Engine.load(folder)


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> M1Tokenizer:
    """The tokenizer of the tiny checkpoint."""
    return M1Tokenizer.from_folder(tiny_checkpoint)


@pytest.fixture
def process() -> Iterator[Process]:
    """Starts a source text with arguments; what still runs when the test ends is killed."""
    folders = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "quantize", ROOT / "app"))
    with contextlib.ExitStack() as started:

        def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
            one = started.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code, *arguments],
                    env=os.environ | {"PYTHONPATH": folders},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            started.callback(one.kill)
            return one

        yield start


@pytest.fixture(autouse=True, scope="session")
def _no_home_of_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a module's fixtures keep is not shared with another process that runs tests, either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M1_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def _no_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test does not look at out of the home of whoever runs it."""
    monkeypatch.setenv("M1_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def _english(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Speak English whatever the locale of whoever runs the tests."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.setenv(name, "C.UTF-8")
    language.choose("en")
    yield
    language.choose("en")


def lend_library(home: Path) -> None:
    """Put the library that these tests use into `home`: a process begun there compiles none."""
    found = library.library()
    if found is not None:
        made = Path(found._name)
        (home / "native").mkdir(parents=True, exist_ok=True)
        for path in (made.with_suffix(".sha256"), made):
            if not (home / "native" / path.name).exists():  # a process may have it open
                shutil.copy(path, home / "native")


@pytest.fixture
def m1_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty M1_HOME of this test's own."""
    home = tmp_path / "home"
    monkeypatch.setenv("M1_HOME", str(home))
    return home
