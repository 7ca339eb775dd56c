"""Perplexity of Python's own documentation for lm-eval; its YAML refers to the function here."""
