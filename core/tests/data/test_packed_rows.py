"""Packed rows: what was appended comes back equal, whatever a row holds, in a fraction of the memory."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luthier.data.formats.forms import Conversation, Document
from luthier.data.read.packed_rows import BLOCK, PackedBlock, PackedRows
from luthier.data.read.row import Row, broken_row, faulty_row

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.builds(Row, st.dictionaries(st.text(max_size=4), JSON, max_size=3), st.text(max_size=8),
                 mapped=st.frozensets(st.sampled_from(["prompt", "weight"])))  # fmt: skip
DOCUMENTS = st.builds(Document, text=st.text(max_size=8), where=st.text(max_size=4), weight=st.floats(0, 1))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(items=st.lists(ROWS | DOCUMENTS, max_size=8), count=st.integers(0, 2 * BLOCK + 3), cut=st.slices(2 * BLOCK))
def test_rows_come_back_equal_in_order_by_number_and_by_slice(items, count, cut):
    rows = list(itertools.islice(itertools.cycle(items), count)) if items else []
    packed = PackedRows(rows)
    assert (list(packed), len(packed), packed[cut]) == (rows, len(rows), rows[cut])
    assert [packed[i] for i in range(-len(rows), len(rows))] == rows + rows


def test_rows_with_objects_come_back_as_they_were_given():
    rows = [Row({"image": np.arange(3), "n": i}, f"data:{i}") for i in range(BLOCK)]
    rows += [faulty_row(broken_row("not JSON", "{", "file:1"))] * BLOCK
    assert all(one is other for one, other in zip(PackedRows(rows), rows, strict=True))


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [nested(5000), 10**5000], ids=["deep", "long"])
def test_what_json_cannot_write_is_kept_as_it_is(value):
    rows = [Row({"extra": value}, "rows:1"), *(Row({"n": i}, f"rows:{i}") for i in range(BLOCK))]
    packed = PackedRows(rows)
    assert next(iter(packed)) is rows[0] and len(packed) == len(rows)


class Word(str):
    """A text of another type, which a copy would have to be too."""


@pytest.mark.parametrize("value", [Word("a"), np.float32(1), len, Word], ids=["text", "number", "function", "class"])
def test_a_value_of_another_type_is_never_copied(value):
    rows = [Row({"value": [value]}, "rows:1")] * BLOCK
    assert next(iter(PackedRows(rows))) is rows[0]


def test_a_full_block_stays_packed_on_its_way_to_another_process():
    rows = list(conversations(BLOCK + 3))
    first, rest = PackedRows(rows).blocks()
    assert isinstance(first, PackedBlock) and len(first.octets) < 50 * BLOCK
    assert [*first, *rest] == rows
    assert (first[0], first[-1], len(first)) == (rows[0], rows[BLOCK - 1], BLOCK)


def conversations(count):
    for i in range(count):
        said = [
            {"role": role, "content": f"{role} says {i} of the words that are said"} for role in ("user", "assistant")
        ]
        yield Conversation(messages=tuple(said), trained=(False, True), where=f"rows.jsonl:{i}")


def test_packed_rows_take_a_fifth_of_the_memory_of_their_objects():
    taken = []
    for hold in (list, PackedRows):
        tracemalloc.start()
        held = hold(conversations(10 * BLOCK))
        taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(held) == 10 * BLOCK
    assert 5 * taken[1] < taken[0]
