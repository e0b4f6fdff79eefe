"""The Chinese of every text the front ends say, by its English.

What it is: data, in the order of the files that use it. What it is not: code, or a translation of
what the model answers.
"""

from collections.abc import Mapping

CATALOGUE: Mapping[str, str] = {
    # cli.py, options.py
}
