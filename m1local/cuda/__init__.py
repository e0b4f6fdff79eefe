"""The CUDA runtime: what a graphics card computes, and how.

What it is: Triton kernels that read the stored formats directly, one file per concept, and the
decode step made of them. Every kernel also runs in Triton's interpreter, on tensors of the CPU;
that is how the tests check it without a card. What it is not: needed. Without Triton or a card,
torch does the same (m1local/model.py, m1local/formats).
"""
