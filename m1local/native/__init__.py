"""The parts of m1local written in C: compiled on the user's machine, at first use.

What it is: a faster way to the same bytes. What it is not: needed; without a compiler torch does
all of it (library.status() says so).
"""
