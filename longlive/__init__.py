"""LongLive: video of any length from a causal Wan transformer, in real time, with prompts that change as it runs."""

__version__ = "0.1.0"
