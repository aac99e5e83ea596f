"""The model as a benchmark sees it: log-probabilities of continuations, and answers, by the policy as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import torch

from luthier.data.batches.batch import IGNORED, Batch, collate_examples
from luthier.data.examples import TokenExample
from luthier.errors import LuthierError
from luthier.model.attention import packed_attention
from luthier.model.body import Body
from luthier.model.generation.answer_batches import Question, answer_questions
from luthier.model.policy import ModelPolicy

if TYPE_CHECKING:
    from torch import Tensor

UNBOUNDED: Final = 1 << 15  # tokens, of a model whose config names no limit


@attrs.frozen(kw_only=True, eq=False)
class BenchmarkModel:
    """A trained model, its adapter on, quantized or not, as a benchmark asks it.

    `model` and `tokenizer` are those of transformers; a benchmark scores and answers by the methods alone, which count
    prompts of adapters and the packing in. `max_length` is the number of tokens of the longest text, answer included.
    """

    model: Any
    tokenizer: Any
    adapter: Any = None
    max_tokens: int = 8192  # of one pass
    seed: int = 0

    @property
    def max_length(self) -> int:
        """Return the number of tokens that a text may have, its answer included."""
        known = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        positions = known if isinstance(known, int) else UNBOUNDED
        return positions - Body(self.model, self.adapter).virtual_tokens

    def score_tokens(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), the continuation's log-probability and whether it is the likeliest.

        Both are token ids, and a context has at least one. The log-probability is a sum over tokens, in nats; the
        second value is True if each token is the most likely one after those before it.
        """
        scores: dict[int, tuple[float, bool]] = {}
        policy = ModelPolicy(self.model, self.adapter)
        training = self.model.training
        self.model.eval()
        try:
            with packed_attention(self.model), torch.no_grad():
                for members in self._packs(pairs):
                    batch = collate_examples([_example(*pairs[i]) for i in members]).to(self.model.device)
                    scores.update(zip(members, _batch_scores(policy, batch), strict=True))
                    policy.forget()
        finally:
            self.model.train(training)
        return [scores[i] for i in range(len(pairs))]

    def answer_prompts(self, prompts: Sequence[Sequence[int]], *, most: int, until: Sequence[str] = (),
                       temperature: float = 0.0) -> list[str]:  # fmt: skip
        """Return the text that follows each prompt, token ids, up to a stop token or one of the texts `until`.

        It has at most `most` tokens. At temperature 0 they are the likeliest; else drawn, each answer by a seed of its
        own.
        """
        questions = [
            Question(prompt=list(prompt), most=most, seed=self.seed + number, until=tuple(until))
            for number, prompt in enumerate(prompts)
        ]
        return answer_questions(self.model, self.tokenizer, self.adapter, questions, max_tokens=self.max_tokens,
                                temperature=temperature, strip=False)  # fmt: skip

    def _packs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[list[int]]:
        """Yield the numbers of pairs that share a pass: at most `max_tokens` tokens, or one pair."""
        longest, pack, filled = self.max_length, list[int](), 0
        for number, (context, continuation) in enumerate(pairs):
            size = len(context) + len(continuation)
            if not context or not continuation or size > longest:
                problem = f"a context and a continuation have at least one token each, and {longest:,} at most together"
                raise LuthierError("part-invalid", problem, where="BenchmarkModel.score_tokens", found=size)
            if pack and filled + size > self.max_tokens:
                yield pack
                pack, filled = [], 0
            pack.append(number)
            filled += size
        if pack:
            yield pack


def _example(context: Sequence[int], continuation: Sequence[int]) -> TokenExample:
    ids = np.array([*context, *continuation], np.int32)
    labels = np.array([*[IGNORED] * len(context), *continuation], np.int32)
    return TokenExample(input_ids=ids, labels=labels)


def _batch_scores(policy: ModelPolicy, batch: Batch) -> list[tuple[float, bool]]:
    logprobs, also = policy.token_logprobs(batch, want=("top1",))  # [T] each, 0 where there is no label
    labelled = (batch.labels != IGNORED).to(torch.float64)
    missed: Tensor = batch.sum_by_document(labelled - also["top1"].to(torch.float64))
    sums = batch.sum_by_document(logprobs.to(torch.float64))
    return [(total, not misses) for total, misses in zip(sums.tolist(), missed.tolist(), strict=True)]
