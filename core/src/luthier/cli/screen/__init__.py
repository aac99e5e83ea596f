"""What commands share: arguments, answers, and how tables look."""
