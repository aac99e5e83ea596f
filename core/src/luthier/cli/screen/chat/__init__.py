"""The screen of a chat: the conversation (`session`), its commands, and the views of answers (`answer_views`)."""
