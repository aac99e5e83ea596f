"""The wire format of OpenAI's fine-tuning, which several services speak: `WireTerms` say how one of them speaks it."""
