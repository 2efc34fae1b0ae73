"""Weights people have: reading and writing files, naming schemes, LoRA, conversion."""
