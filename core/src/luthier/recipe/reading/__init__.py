"""The reading of a recipe: files, flags, environment and short forms become one tree."""
