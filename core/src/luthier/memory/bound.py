"""A bound from the config's numbers alone: most runs are so small that nothing needs to be rehearsed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from luthier.errors import LuthierError
from luthier.model.model_config import config_of, experts_of

if TYPE_CHECKING:
    from luthier.recipe import Recipe

SAFETY: Final = 4  # the multiple of the bound that must fit
WIDTH: Final = 8  # bytes of the widest number
# names in configs of the width between two products
INNER: Final = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
WIDEST: Final = 8  # multiple of the hidden size, if a config has none of these names


def surely_fits(recipe: Recipe, model: Any, tokens: int, longest: int, free: int) -> bool:
    """Return True if a generous bound is far below `free` bytes; False where the config does not say enough.

    A micro-batch has `tokens` tokens at most, or `longest` where that is more.
    """
    if recipe.teacher is not None or not isinstance(recipe.reference, str):
        return False  # another model is in memory at the same time
    if recipe.reference_cache:
        return False  # only a rehearsal shows what the loss asks of such a model
    try:
        config = (config_of(recipe.model) if model is None else model.config).get_text_config()
        return SAFETY * bound(config, max(longest, tokens), longest) < free
    except (AttributeError, TypeError, LuthierError):
        return False


def bound(config: Any, tokens: int, longest: int) -> int:
    """Return the bytes: every weight in float64 with gradient and three states, every activation kept, scores of
    attention too.
    """
    wide, layers = config.hidden_size, config.num_hidden_layers
    inner = next(filter(None, (getattr(config, name, None) for name in INNER)), WIDEST * wide)
    heads = config.num_attention_heads
    across = max(wide, heads * (getattr(config, "head_dim", None) or wide // heads))
    weights = layers * (4 * wide * across + 3 * wide * inner * experts_of(config)) + 2 * config.vocab_size * wide
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    saved = layers * (20 * across + 8 * inner * chosen) + 4 * wide
    scores = 3 * heads * longest * min(longest, tokens) * layers
    head = 4 * config.vocab_size * min(tokens, 4096)
    return WIDTH * (5 * weights + tokens * saved + scores + head)
