"""Tokenizers and chat templates read from their files, without transformers."""
