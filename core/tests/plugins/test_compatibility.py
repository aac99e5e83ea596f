"""Which parts go together: needs, provides and conflicts, and refusals that name both sides and the tag."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier import LuthierError
from luthier.plugins.compatibility import GIVERS, Chosen, check_compatibility, refusals
from luthier.plugins.records import TAGS
from luthier.testing import expect_error


def part(kind, name, **tags):
    return Chosen(kind=kind, name=name, **{k: frozenset(v.split()) for k, v in tags.items()})


FULL = part("adapter", "full", needs="dense-weights", provides="trainable-weights")
LORA = part("adapter", "lora", provides="reference trainable-weights")
NF4 = part("quantizer", "nf4", provides="quantized-base")
NONE = part("quantizer", "none", provides="dense-weights")
DPO = part("loss", "dpo", needs="reference paired-data")
SFT = part("loss", "sft")
PROMPT = part("adapter", "prompt", conflicts="packing")


def test_sound_combinations_give_no_reason():
    assert refusals([FULL, NONE, SFT], {}) == []
    assert refusals([LORA, NF4, DPO], {"paired-data": "the data"}) == []
    check_compatibility([LORA, NONE, SFT], {"packing": "the run"})


@pytest.mark.parametrize(
    ("chosen", "given_tags", "says"),
    [
        ([FULL, NF4], {}, ("adapter 'full'", "dense-weights", "quantizer 'nf4'")),
        ([FULL, NONE, DPO], {"paired-data": "the data"}, ("loss 'dpo'", "reference", "adapter 'full'")),
        ([LORA, NONE, DPO], {}, ("loss 'dpo'", "paired-data", "data")),
        ([PROMPT, NONE], {"packing": "the run"}, ("adapter 'prompt'", "packing", "run")),
        ([part("loss", "a", conflicts="own:tag"), part("adapter", "b", provides="own:tag")], {}, ("loss 'a'", "own:tag", "adapter 'b'")),
        ([part("loss", "a", needs="own:tag"), LORA], {}, ("loss 'a'", "own:tag", "nothing")),
        ([part("optimizer", "o", needs="cuda"), LORA], {}, ("optimizer 'o'", "cuda", "device")),
        ([part("adapter", "self", needs="own:t", provides="own:t")], {}, ("adapter 'self'", "own:t", "nothing")),
        ([FULL], {}, ("adapter 'full'", "dense-weights", "nothing")),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_refusal_names_both_sides_and_the_tag(chosen, given_tags, says):
    (refusal,) = refusals(chosen, given_tags)
    assert [fact for fact in says if fact not in refusal] == []
    with pytest.raises(LuthierError) as caught:
        check_compatibility(chosen, given_tags)
    assert caught.value.code == "part-incompatible"
    assert refusal in str(caught.value)


def test_a_tag_that_a_setting_provides_is_told_with_every_way_to_write_it():
    with expect_error("part-incompatible", None, "teacher: MODEL", "run's folder", "{model:"):
        check_compatibility([part("loss", "learn", needs="teacher"), FULL], {"dense-weights": "the model"})


def test_full_training_of_a_quantized_base_is_told_both_ways_out():
    with expect_error("part-incompatible", None, "quantizer", "lora"):
        check_compatibility([FULL, NF4], {})


def test_every_reason_is_told():
    with pytest.raises(LuthierError) as caught:
        check_compatibility([FULL, NF4, DPO], {})
    assert str(caught.value).count(" needs ") == 3


def test_a_part_may_provide_what_it_conflicts_with():
    assert refusals([part("quantizer", "q", provides="quantized-base", conflicts="quantized-base")], {}) == []


def test_each_of_the_cores_tags_has_someone_to_look_to():
    assert set(GIVERS) == TAGS


tags = st.frozensets(st.sampled_from(["cuda", "packing", "own:a", "own:b"]), max_size=3)
parts = st.builds(
    Chosen,
    kind=st.sampled_from(["adapter", "loss"]),
    name=st.sampled_from("abc"),
    needs=tags,
    provides=tags,
    conflicts=tags,
)


@settings(max_examples=150, deadline=None)
@given(chosen=st.lists(parts, max_size=4), given_tags=tags)
def test_refusals_are_exactly_the_unmet_needs_and_the_met_conflicts(chosen, given_tags):
    expected = 0
    for index, one in enumerate(chosen):
        others = given_tags.union(*(o.provides for i, o in enumerate(chosen) if i != index))
        expected += len(one.needs - others) + len(one.conflicts & others)
    assert len(refusals(chosen, dict.fromkeys(given_tags, "the run"))) == expected
