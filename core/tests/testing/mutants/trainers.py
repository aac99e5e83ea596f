"""Trainers: one that is sound, and those that break one rule each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class Likelihood:
    """It makes the words of each prompt likelier, a row a step."""

    first = 1

    def __init__(self, options: Any) -> None:
        self.options = options

    def check(self, recipe): ...

    def state(self):
        return {}

    def taken(self, session):
        return session.run.step

    def check_rows(self, recipe, rows, validation): ...

    def train(self, session):
        steps = self.count(session)
        session.begin(steps)
        for step in range(self.first + self.taken(session), steps + self.first):
            session.step_started(step)
            loss = self.differentiate(session, session.rows[step % len(session.rows)])
            self.step(session)
            session.optimizer.zero_grad()
            session.step_ended(loss, float(step), samples=1)
            if self.ends(session):
                break

    def count(self, session):
        return session.recipe.max_steps

    def differentiate(self, session, row):
        ids = torch.tensor([session.tokenizer(row.prompt)["input_ids"]])
        loss = self.options.scale * session.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return float(loss.detach())

    def step(self, session):
        session.gradients_ready()
        session.optimizer.step()

    def ends(self, session):
        return session.run.stop_reason is not None


class ForgetsGradients(Likelihood):
    def step(self, session):
        session.optimizer.step()


class StepsTwice(Likelihood):
    def step(self, session):
        super().step(session)
        session.optimizer.step()


class CountsFromNought(Likelihood):
    first = 0


class HasItsOwnLength(Likelihood):
    def count(self, session):
        return 1


class LosesGradients(Likelihood):
    def step(self, session):
        for group in session.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.zero_()
        super().step(session)


class EndsAtNaN(Likelihood):
    def differentiate(self, session, row):
        super().differentiate(session, row)
        return float("nan")


class NeverEnds(Likelihood):
    def ends(self, session):
        return False


class DrawsByChance(Likelihood):
    def differentiate(self, session, row):
        return super().differentiate(session, session.rows[0]) + int.from_bytes(os.urandom(4), "big")


class BeginsAgain(Likelihood):
    def taken(self, session):
        return 0


class AddsACallback(Likelihood):
    def check(self, recipe):
        recipe.callbacks.append("plot")


class ShortensRows(Likelihood):
    def check_rows(self, recipe, rows, validation):
        rows.pop()


class WritesAFile(Likelihood):
    def check(self, recipe):
        Path("notes.txt").write_text("seen")
