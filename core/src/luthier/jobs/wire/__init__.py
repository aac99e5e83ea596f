"""The wire format of OpenAI's fine-tuning, which several services use; `WireTerms` describes one service's use."""
