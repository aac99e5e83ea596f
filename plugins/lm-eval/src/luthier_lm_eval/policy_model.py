"""The model as the harness asks it: texts are tokenised as its own `hf` model does, and Luthier's policy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from luthier import LuthierError

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise LuthierError("dependency-missing", f"the harness cannot be imported: {error}", where="benchmark 'lm_eval'",
                       remedy="Run: pip install luthier-lm-eval lm-eval") from error  # fmt: skip

if TYPE_CHECKING:
    from luthier import BenchmarkModel  # at run time it would import torch before the harness is known to be here

ANSWER: Final = 256  # tokens, where a task does not say; the harness's own number
KNOWN: Final = frozenset(("until", "max_gen_toks", "do_sample", "temperature"))  # of what a task says of generation

Request = tuple[Any, list[int], list[int]]


class PolicyModel(TemplateLM):
    """A model of the harness over a `BenchmarkModel`."""

    def __init__(self, model: BenchmarkModel) -> None:
        super().__init__()
        self.policy = model
        self.tokenizer = model.tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Return the token that stands for an empty context."""
        first = self.tokenizer.bos_token_id
        return int(self.eot_token_id if first is None else first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text of the model's chat template."""
        return str(self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt))  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text, with the tokenizer's special ones unless the text begins with them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        return self.policy.score_tokens([self._fitted(context, continuation) for _, context, continuation in requests])

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return a request of which the beginning is left out where the model's context is shorter."""
        room = self.policy.max_length - len(continuation)
        if room < 1:
            longest = self.policy.max_length
            problem = f"a text to score has {len(continuation):,} tokens, and the model takes {longest:,}"
            raise LuthierError("part-unsupported", problem, where="--tasks", remedy="Choose another task.")
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the model's context."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, context_len=1,
                max_seq_len=self.policy.max_length - 1,
            )  # fmt: skip
            scores = self.policy.score_tokens([utils.make_disjoint_window(window) for window in windows])
            totals.append(sum(score for score, _ in scores))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each prompt, as its task says: how long, up to which texts, drawn or the likeliest."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for members in groups.values():
            settings = generation_settings(requests[members[0]].args[1])
            room = self.policy.max_length - settings["max_gen_toks"]
            if room < 1:
                asked, longest = settings["max_gen_toks"], self.policy.max_length
                problem = f"an answer may have {asked:,} tokens, and the model takes {longest:,}"
                raise LuthierError("part-unsupported", problem, where="--tasks", remedy="Choose another task.")
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in members]
            texts = self._answer(prompts, settings)
            answers.update(zip(members, texts, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _answer(self, prompts: Sequence[Sequence[int]], settings: dict[str, Any]) -> list[str]:
        drawn = settings["temperature"] if settings["do_sample"] else 0.0
        return self.policy.answer_prompts(prompts, most=settings["max_gen_toks"], temperature=drawn,
                                          until=[text for text in settings["until"] if text])  # fmt: skip


def generation_settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a task says of its answers; `part-unsupported` for what Luthier's generation does not have."""
    settings = dict(normalize_gen_kwargs(given, ANSWER))
    unknown = sorted(settings.keys() - KNOWN)
    if unknown:
        raise LuthierError("part-unsupported", f"a task asks for {', '.join(unknown)} of generation", where="--tasks",
                           found={name: settings[name] for name in unknown},
                           remedy="Choose another task, or copy it without these.")  # fmt: skip
    return settings
