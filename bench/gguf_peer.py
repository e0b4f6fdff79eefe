"""A LLaMA with an M1's dimensions and random weights as bfloat16 GGUF, for llama.cpp to read.

What it is: the peer's source in bench/quantize_speed.py; the heads are those of the M1's sliding
layers. What it is not: an M1, which llama.cpp does not know, nor a model that can be run; it has
no tokenizer. Needs the package `gguf`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from bench.synthetic import random_tensor
from m1local.config import M1Config


def llama_shapes(config: M1Config) -> dict[str, tuple[int, ...]]:
    """llama.cpp's names of a LLaMA's tensors, with their shapes (rows first)."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head = hidden // config.num_swa_attention_heads
    keys = head * config.num_swa_key_value_heads
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    layers = {
        f"blk.{number}.{name}.weight": shape
        for number in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    ends: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (vocab, hidden),
    }
    return ends | layers


def parameters_in(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many values tensors of `shapes` have together."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def write_llama(config: M1Config, folder: Path) -> tuple[Path, int]:
    """Write the file into `folder` unless it is there; returns its path and its parameters."""
    shapes = llama_shapes(config)
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    path = folder / f"llama-{'-'.join(map(str, (*sizes, config.vocab_size)))}.gguf"
    if not path.is_file():
        partial = path.with_suffix(".part")
        write_gguf(config, shapes, partial)
        os.replace(partial, path)
    return path, parameters_in(shapes.values())


def write_gguf(config: M1Config, shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """Write tensors of `shapes` one by one: norms in float32 as llama.cpp wants, all else bf16."""
    try:
        import gguf
    except ImportError:
        raise SystemExit("The peer's source needs the package gguf: pip install gguf") from None
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_swa_attention_heads)
    writer.add_head_count_kv(config.num_swa_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    types = gguf.GGMLQuantizationType
    generator = torch.Generator().manual_seed(0)
    kinds = {name: torch.float32 if "norm" in name else torch.bfloat16 for name in shapes}
    for name, shape in shapes.items():
        kind = types.F32 if kinds[name] == torch.float32 else types.BF16
        nbytes = torch.Size(shape).numel() * kinds[name].itemsize
        # The array's own type does not matter where the stored one is given.
        array_type = torch.empty(0, dtype=torch.int16).numpy().dtype
        writer.add_tensor_info(name, shape, array_type, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        tensor = random_tensor(name, shape, generator).to(kinds[name])
        writer.write_tensor_data(tensor.view(torch.int16).numpy())
    writer.close()
