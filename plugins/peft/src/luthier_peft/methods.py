"""The table of PEFT's methods, found by trying each. `tests/test_table.py` compares it with PEFT."""

from __future__ import annotations

from typing import Final

import attrs

from luthier_peft.listing import config_names


@attrs.frozen
class Method:
    """One method.

    `tolerance` is the largest relative change of the output when a fresh adapter with PEFT's defaults is attached.
    `packing` and `merging` say why the method cannot do that; they are empty if it can.
    """

    summary: str
    tolerance: float = 0.0
    packing: str = ""
    merging: str = ""
    folds_into_bias: bool = False  # it can be merged if every adapted layer has a bias
    rank: str = ""  # the option that is the rank of a product of two matrices, which no layer can have above its size
    trains_modules: bool = False  # it trains weights of the targets themselves, so that the head alone makes sense

    @property
    def mergeable(self) -> bool:
        return not self.merging


ROUNDING: Final = 1e-5  # the method computes the unchanged weight again, in float32
LILY: Final = "its router averages over all tokens of a row"
BIAS: Final = "its bias needs layers that have one, and q and v of most models have none"

METHODS: Final[dict[str, Method]] = {
    "adalora": Method("AdaLoRA: low-rank updates whose rank budget moves to the layers that need it.", rank="init_r"),
    "beft": Method("BEFT: one trained bias for each layer.", merging=BIAS, folds_into_bias=True),
    "boft": Method("BOFT: weights rotated by products of butterfly factors."),
    "c3a": Method("C3A: block-circular convolutions added to the weights; starts at random.", tolerance=0.3),
    "deft": Method("DEFT: a low-rank part of each weight projected out and replaced.", tolerance=ROUNDING, rank="r"),
    "delora": Method("DeLoRA: low-rank updates whose angle and strength train separately.", rank="r"),
    "fourierft": Method("FourierFT: updates given by a few Fourier coefficients; starts at random.", tolerance=3.0),
    "frod": Method("FRoD: weights in a joint basis of their layer kind, sparsely perturbed.", tolerance=ROUNDING),
    "glora": Method("GLoRA: weights and biases scaled and shifted by low-rank, vector or constant terms."),
    "gralora": Method("GraLoRA: low-rank updates for each block of a weight."),
    "hira": Method("HiRA: weights multiplied, entry by entry, by a low-rank matrix.", rank="r"),
    "hra": Method("HRA: weights rotated by a chain of Householder reflections.", tolerance=ROUNDING),
    "ia3": Method("IA3: one trained factor for each key, value and feed-forward channel."),
    "lily": Method(f"Lily: low-rank parts shared over layers. Unsupported: packing ({LILY}).", packing=LILY,
                   merging="its update depends on the input"),
    "ln_tuning": Method("LN tuning: only the norms train.", trains_modules=True),
    "loha": Method("LoHa: updates as entry-wise products of two low-rank matrices.", rank="r"),
    "lokr": Method("LoKr: updates as Kronecker products of small matrices."),
    "lora": Method("LoRA as PEFT computes it, with DoRA, rsLoRA, biases and parameters of experts.", rank="r"),
    "miss": Method("MiSS: one small matrix, shared by the shards of each weight."),
    "oft": Method("OFT: weights rotated block by block."),
    "osf": Method("OSF: training kept in the least important singular directions.", tolerance=ROUNDING,
                  rank="effective_rank"),
    "peanut": Method("PEANuT: updates that small networks compute from the weights."),
    "psoft": Method("PSOFT: a rotation inside the principal subspace of each weight."),
    "pvera": Method("PVeRA: VeRA whose scaling vectors are sampled while training."),
    "randlora": Method("RandLoRA: full-rank updates as weighted sums of fixed random low-rank matrices."),
    "road": Method("RoAd: outputs rotated in two dimensions at a time."),
    "shira": Method("SHiRA: a sparse set of each weight's entries."),
    "supertuning": Method("Super-Tuning: the entries of largest magnitude, optionally with LoRA."),
    "tinylora": Method("TinyLoRA: a tiny vector, spread over the singular directions of each weight."),
    "trainable_tokens": Method("Trainable tokens: chosen rows of the embedding (token_indices).", trains_modules=True),
    "unilora": Method("Uni-LoRA: all low-rank entries drawn from one vector; starts at random.", tolerance=0.01),
    "vblora": Method("VB-LoRA: low-rank parts composed from a shared vector bank; starts at random.", tolerance=0.02),
    "vera": Method("VeRA: fixed random low-rank matrices, scaled by trained vectors."),
    "waveft": Method("WaveFT: updates given by a few wavelet coefficients."),
}  # fmt: skip

# Methods that change layers but are not offered, with the reason.
REFUSED: Final[dict[str, str]] = {
    "adamss": "needs scikit-learn to cluster its subspaces",
    "adaption_prompt": "is a prompt method, for the attention of a few model classes",
    "poly": "needs the argument task_ids in every forward pass",
    "xlora": "mixes trained adapters, and trains none itself",
}

UNTRIED: Final = Method(
    "", tolerance=1.0, merging="luthier-peft has not been tested with this method of another PEFT version"
)


def offered() -> dict[str, Method]:
    """Return every offered method. One that is not in the table promises neither its start nor a merge."""
    names = [name for name in config_names() if name not in REFUSED]
    return {name: METHODS.get(name) or attrs.evolve(UNTRIED, summary=f"PEFT's {name}, untested.") for name in names}
