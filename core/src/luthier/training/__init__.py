"""Training: from a recipe to a finished run. `continual` trains several tasks one after the other."""
