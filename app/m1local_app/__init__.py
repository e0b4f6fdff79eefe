"""The front ends: the command `m1`, the terminal chat and the web page; they consume events."""
