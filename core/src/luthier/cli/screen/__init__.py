"""What commands share: arguments, answers, and the look of tables."""
