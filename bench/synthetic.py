"""A checkpoint with the 14B's dimensions and random weights: `python -m bench.synthetic DIR`.

What it is: something of the real size for measuring time and memory without the real weights;
8 layers make about 8 GB. What it is not: a model; it answers with noise. Its tokenizer is the
demo's, since the real one may not be redistributed.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from m1local.checkpoint import parameter_shapes
from m1local.config import M1Config
from m1local.formats.base import Stored
from m1local.home import DEMO
from m1local.tokenizer import FILES as TOKENIZER_FILES
from m1local_quantize.shard_writer import ShardWriter
from m1local_quantize.target import write_index

DIMENSIONS = {
    "architectures": ["BaichuanM1ForCausalLM"],
    "model_type": "baichuan_m1",
    "vocab_size": 133120,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 20,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 40,
    "num_swa_key_value_heads": 8,
    "sliding_window": 8192,
    "conv_window": 2,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Plausible random values: norms near 1, taps near identity, small normal matrices."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    if "conv_" in name:
        return torch.tensor([0.2, 0.8]).expand(shape).to(torch.bfloat16).contiguous()
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def write_synthetic(folder: Path, layers: int) -> Iterator[str]:
    """Write the checkpoint, one file per tensor group, yielding the names of the tensors."""
    folder.mkdir(parents=True)
    raw = DIMENSIONS | {
        "num_hidden_layers": layers,
        "sliding_window_layers": list(range(1, layers, 2)),
    }
    generator = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, Stored]] = {}
    for name, shape in parameter_shapes(M1Config.from_dict(raw)).items():
        part = name.split(".")[2] if ".layers." in name else "ends"
        groups.setdefault(part, {})[name] = Stored(shape, torch.bfloat16)
    weight_map = {}
    for number, tensors in enumerate(groups.values(), 1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with ShardWriter(folder / file_name, tensors) as writer:
            for name, stored in tensors.items():
                writer.write(name, random_tensor(name, stored.shape, generator))
                weight_map[name] = file_name
                yield name
    total = sum(stored.nbytes for tensors in groups.values() for stored in tensors.values())
    write_index(folder, weight_map, total)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n")


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    for name in write_synthetic(arguments.folder, arguments.layers):
        print(name, flush=True)


if __name__ == "__main__":
    main()
