"""Run: what training gives back, with the numbers, the model, and what one does with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from luthier.step.setup import Setup


@attrs.define(kw_only=True, eq=False)
class Run:
    """A finished run. `loss_history` has one number for each step; `eval_loss` is None without validation rows."""

    run_id: str
    steps: int
    final_loss: float
    loss_history: list[float] = attrs.field(repr=False)
    eval_loss: float | None
    eval_metrics: dict[str, float]
    duration_seconds: float
    samples_seen: int
    tokens_seen: int
    output_path: Path
    artifact: Path
    merged: Path | None
    best_checkpoint: Path | None
    stop_reason: str | None
    parts: list[dict[str, Any]] = attrs.field(repr=False)
    _setup: Setup | None = attrs.field(default=None, repr=False, alias="setup")
    _given: Any = attrs.field(default=None, repr=False, alias="given")
    _opened: Any = attrs.field(default=None, repr=False, init=False)

    @property
    def is_live(self) -> bool:
        """Return True if this process has the trained model in memory."""
        return self._setup is not None

    @property
    def model(self) -> Any:
        """Return the trained model, its adapter attached; read from the run's folder where this process did not train
        it.
        """
        return self._live().model

    @property
    def tokenizer(self) -> Any:
        return self._live().tokenizer

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Return the model's answer to a text or to messages, prompted as it was trained; greedy at temperature 0."""
        from luthier.artifacts.note import of_run
        from luthier.model.generation.generate import PromptForm, Sampling, generate_text, prompt_messages

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        form, live = PromptForm.of_note(of_run(self.output_path)), self._live()
        asked = prompt_messages(prompt, system)
        return generate_text(live.model, live.tokenizer, asked, adapter=live.adapter, form=form, sampling=sampling)

    def evaluate(self, data: Any = None) -> dict[str, float]:
        """Return `eval_loss` and the loss's other numbers, over the run's validation rows or over `data`."""
        from luthier.training.reopen import evaluate_again

        return evaluate_again(self._trained(), data)

    def save(self, path: str | Path, merged: bool = False) -> Path:
        """Write the adapter (or a full model), or the merged model, to a folder; verified by loading it again."""
        from luthier.artifacts.note import of_run
        from luthier.artifacts.save import save_adapter, save_merged

        live, note = self._live(), of_run(self.output_path)
        if merged:
            return save_merged(live.model, live.tokenizer, live.adapter, live.quantizer, Path(path), note)
        return save_adapter(live.model, live.tokenizer, live.adapter, Path(path), note, live.quantizer)

    def merge(self, path: str | Path | None = None) -> Path:
        """Return the merged model's folder: `path`, or `merged` in the run's folder."""
        return self.save(path or self.output_path / "merged", merged=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        hidden = ("_setup", "_given", "_opened")
        values = {f.name: getattr(self, f.name) for f in attrs.fields(type(self)) if f.name not in hidden}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def _live(self) -> Any:
        if self._setup is not None:
            return self._setup
        if self._given is not None and self._given[1].model is not None:
            return self._trained()  # the base model is the caller's object
        if self._opened is None:
            from luthier.step.opened import open_artifact

            self._opened = open_artifact(self.output_path)
        return self._opened

    def _trained(self) -> Setup:
        if self._setup is None:
            from luthier.training.reopen import reopen_run

            self._setup = reopen_run(self.output_path, self._given)
        return self._setup
