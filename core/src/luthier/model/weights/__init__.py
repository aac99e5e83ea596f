"""The model's weights: their layers, roles, groups, files and fingerprint."""
