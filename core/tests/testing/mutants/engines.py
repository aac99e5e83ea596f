"""Engines: one that is sound, and those that break one rule each."""

from __future__ import annotations

from typing import Any


class Mirror:
    """It says the words of a prompt backwards."""

    def __init__(self, options: Any) -> None:
        self.options = options

    async def check(self):
        return "a mirror"

    async def answer(self, questions, advance):
        answers = []
        for question in questions:
            answers.append(self.say(question))
            advance(1)
        return answers

    def say(self, question):
        words = question.text.split()[::-1][: question.max_tokens]
        return self.options.between.join(words)


class SaysNothing(Mirror):
    async def check(self):
        return ""


class SaysTooMuch(Mirror):
    async def check(self):
        return "a mirror\nof words"


class MixesUp(Mirror):
    async def answer(self, questions, advance):
        return sorted(await super().answer(questions, advance))


class Remembers(Mirror):
    asked = 0

    def say(self, question):
        self.asked += 1
        return f"{self.asked} {super().say(question)}"


class LosesOne(Mirror):
    async def answer(self, questions, advance):
        return (await super().answer(questions, advance))[1:]


class GivesBytes(Mirror):
    def say(self, question):
        return super().say(question).encode()


class IsSilent(Mirror):
    async def answer(self, questions, advance):
        return await super().answer(questions, lambda count: None)


class TellsTwice(Mirror):
    async def answer(self, questions, advance):
        answers = await super().answer(questions, advance)
        advance(len(answers) or 1)
        return answers


class SaysTheSame(Mirror):
    def say(self, question):
        return "yes " * question.max_tokens


class NeverStops(Mirror):
    def say(self, question):
        return " ".join(question.text.split()[::-1])
