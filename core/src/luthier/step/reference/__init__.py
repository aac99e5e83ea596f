"""The reference and other frozen companions, while a step runs."""
