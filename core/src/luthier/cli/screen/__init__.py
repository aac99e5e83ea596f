"""The shared base of commands: arguments, answers, and the look of tables."""
