"""The demo's shape and its defaults for decoding: the two .json files beside its weights.

What it is: constants. What it is not: the training; that is tools/demo/train.py.
"""

from typing import Any

CONTEXT = 1024

CONFIG: dict[str, Any] = {
    "architectures": ["BaichuanM1ForCausalLM"],
    "model_type": "baichuan_m1",
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 12,
    "num_swa_key_value_heads": 4,
    "sliding_window": 128,
    "sliding_window_layers": [0, 2],
    "conv_window": 2,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
# Low temperature and a light penalty: a model this small loops easily.
GENERATION = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.85,
    "repetition_penalty": 1.1,
    "max_new_tokens": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "user_token_id": 6,
    "assistant_token_id": 7,
}
