"""What `m1 verify` and `m1 eval ppl` compute and say.

What it is: whole checks of a checkpoint on this machine. What it is not: an exam of its answers.
"""

import math
from pathlib import Path

import torch
from torch.nn import functional

from m1local.checkpoint import CONFIG, check_tensors, expected_tensors, load_model
from m1local.config import M1Config
from m1local.generation_config import GenerationConfig
from m1local.manifest import CheckpointManifest
from m1local.shards import TensorFiles
from m1local.tokenizer import M1Tokenizer
from m1local_app.language import tr
from m1local_app.progress import perplexity
from m1local_quantize.text import SHIPPED, Text


def verify_checkpoint(folder: Path) -> str:
    """Hash every file and compare the tensors with the configuration; raises CheckpointError."""
    manifest = CheckpointManifest.read(folder)
    manifest.check_files(folder)
    manifest.check_hashes(folder)
    config = M1Config.from_file(folder / CONFIG)
    shards = [name for name in manifest.files if name.endswith(".safetensors")]
    check_tensors(
        TensorFiles(folder, shards), expected_tensors(config, manifest.linears), tied=False
    )
    M1Tokenizer.from_folder(folder)
    GenerationConfig.from_folder(folder)
    nbytes = sum(record.nbytes for record in manifest.files.values())
    return tr(
        "{folder} is whole: {count} files, {size:,.1f} MiB, every SHA-256 as in its manifest.",
        folder=folder,
        count=len(manifest.files),
        size=nbytes / 2**20,
    )


@torch.inference_mode()
def perplexity_line(folder: Path, text: Path | None) -> str:
    """Perplexity of any checkpoint that fits in memory."""
    config = M1Config.from_file(folder / CONFIG)
    tokenizer, generation = M1Tokenizer.from_folder(folder), GenerationConfig.from_folder(folder)
    longest = config.max_position_embeddings
    read = Text.read(text or SHIPPED, tokenizer, longest=longest, chat=generation.is_chat)
    model = load_model(folder)
    loss, count = 0.0, 0
    for sample in read.samples:
        ids = torch.tensor([sample.token_ids])
        targets = ids[0, sample.first_judged :]
        logits = model(ids)[0, sample.first_judged - 1 : -1]
        loss += float(functional.cross_entropy(logits, targets, reduction="sum"))
        count += targets.numel()
    return tr(
        "perplexity {value} on {count:,} tokens of {text}",
        value=perplexity(math.exp(loss / count)),
        count=count,
        text=read.name,
    )
