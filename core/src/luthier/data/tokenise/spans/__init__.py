"""Places of supervised texts in what a chat template writes."""
