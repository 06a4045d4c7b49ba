"""Reads a Hugging Face config.json into a ModelConfig. Imports no torch."""
