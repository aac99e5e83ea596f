"""What a chat template writes for a shape of conversation, found once and then filled in for each row."""
