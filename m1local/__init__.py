"""m1local: the runtime that executes Baichuan-M1 on one desktop. Importing it loads no torch."""

__version__ = "0.1.0"
