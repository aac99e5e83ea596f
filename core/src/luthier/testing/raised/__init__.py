"""What a test raises, and the errors that it expects."""
