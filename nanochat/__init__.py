"""nanochat: train small ternary language models, measure what helps, and run them anywhere."""

__version__ = "0.1.0"
