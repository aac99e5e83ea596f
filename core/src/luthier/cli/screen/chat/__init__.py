"""The screen of a chat: the talk (`session`), its commands, and what shows an answer (`answer_views`)."""
