"""Data: read, recognise, template, tokenise, pack, order. Reading needs no torch."""
