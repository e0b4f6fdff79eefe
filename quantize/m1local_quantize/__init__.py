"""The quantization pipeline: 16-bit Baichuan-M1 checkpoints in, 4- and 8-bit ones out."""
