"""How the built-in demo model is made: text, tokenizer, training. Not part of the package."""
