"""The token store. Oracle: the plain Python lists of Tokens that went in."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tunery.data.store import Chunk, TokenStore, pack_store
from tunery.errors import DataError
from tunery.types import Tokens


def tokens(length: int, seed: int, **extra) -> Tokens:
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 2, length).astype(np.float32)
    return Tokens(rng.integers(0, 1000, length).astype(np.int32), weights, extra)


EXAMPLES = [[tokens(5, 0)], [tokens(3, 1), tokens(1, 2), tokens(4, 3)], [tokens(2, 4)], [tokens(7, 5), tokens(7, 6)]]
ORIGINS = [(0, 0, 1), (0, 0, 3), (1, 1, 1), (1, 1, 2)]
FILES = ["a.jsonl", "b.jsonl"]


def store(examples=EXAMPLES, origins=ORIGINS) -> TokenStore:
    """Packed from chunks of several sizes, one of them empty, each pickled as a process would."""
    cuts = [(0, 1), (1, 1), (1, len(examples))]
    chunks = [Chunk(examples[a:b], origins[a:b]) for a, b in cuts]
    return pack_store([pickle.loads(pickle.dumps(chunk)) for chunk in chunks], FILES)


def same(left: Tokens, right: Tokens) -> bool:
    return np.array_equal(left.ids, right.ids) and np.array_equal(left.weights, right.weights)


def test_what_went_in_comes_out():
    made = store()
    assert len(made) == 4
    for i, example in enumerate(EXAMPLES):
        out = made.sequences(i)
        assert len(out) == len(example) and all(map(same, out, example))
        assert all(t.ids.dtype == np.int32 and t.weights.dtype == np.float32 for t in out)
        assert made.sequence_lengths(i).tolist() == [len(t) for t in example]
    assert made.lengths.tolist() == [5, 8, 2, 14] and made.lengths.dtype == np.int64
    assert made.labelled.tolist() == [sum(t.labelled for t in example) for example in EXAMPLES]
    assert made.sequence_counts.tolist() == [1, 3, 1, 2]
    assert [made.origin(i) for i in range(4)] == [("a.jsonl", 1), ("a.jsonl", 3), ("b.jsonl", 1), ("b.jsonl", 2)]
    assert made.source.tolist() == [0, 0, 1, 1]
    assert [len(example) for example in made] == [1, 3, 1, 2]


def test_a_first_token_is_no_target_even_with_a_weight():
    one = Tokens(np.array([7], np.int32), np.ones(1, np.float32))
    two = Tokens(np.array([7, 8], np.int32), np.ones(2, np.float32))
    assert store([[one], [two, one]], ORIGINS[:2]).labelled.tolist() == [0, 1]


def test_weights_of_0_and_1_take_a_byte_and_others_stay_exact():
    assert store().weights.dtype == np.uint8
    odd = Tokens(np.arange(3, dtype=np.int32), np.array([0, 0.1, 2.5], np.float32))
    mixed = store([*EXAMPLES[:3], [odd]])
    assert mixed.weights.dtype == np.float32
    assert same(mixed.sequences(3)[0], odd) and same(mixed.sequences(0)[0], EXAMPLES[0][0])


def test_extras_are_carried_token_by_token_and_sequence_by_sequence():
    plain = tokens(2, 0)
    logps = np.array([-0.5, -1.5, -2.5])
    rich = tokens(3, 1, logps=logps, truncated=True, chosen=1)
    made = store([[plain], [rich], [plain, rich]], ORIGINS[:3])
    out = made.sequences(2)[1].extra
    assert out["logps"].tolist() == logps.tolist() and out["truncated"] is True and out["chosen"] == 1
    assert made.sequences(0)[0].extra["logps"].tolist() == [0, 0]
    assert made.truncated.tolist() == [False, True, True]
    assert store().truncated.tolist() == [False] * 4


@pytest.mark.parametrize("value", [np.zeros(2), "text", [1, 2, 3]])
def test_an_extra_that_cannot_be_carried_is_an_error(value):
    with pytest.raises(ValueError, match=r"Tokens\.extra\['bad'\]"):
        Chunk([[tokens(3, 0, bad=value)]], ORIGINS[:1])


def test_select_is_a_view_with_repetition_and_selects_again():
    made = store()
    view = made.select([3, 1, 1])
    assert len(view) == 3 and view.lengths.tolist() == [14, 8, 8]
    assert view.labelled.tolist() == made.labelled[[3, 1, 1]].tolist()
    assert view.origin(0) == ("b.jsonl", 2) and view.sequence_counts.tolist() == [2, 3, 3]
    assert view.select([2, 0]).lengths.tolist() == [8, 14]
    assert np.shares_memory(view.sequences(1)[0].ids, made.ids)
    with pytest.raises(IndexError):
        view.sequences(3)


@pytest.mark.parametrize("mmap", [True, False])
def test_save_and_load(tmp_path, mmap):
    made = store([[tokens(3, 1, logps=np.ones(3), truncated=True)], *EXAMPLES[1:]])
    made.save(tmp_path / "s")
    back = TokenStore.load(tmp_path / "s", mmap=mmap)
    for i in range(len(made)):
        assert all(map(same, back.sequences(i), made.sequences(i))) and back.origin(i) == made.origin(i)
    assert back.sequences(0)[0].extra["truncated"] is True
    assert type(back.ids) is np.ndarray and isinstance(back.ids.base, np.memmap) is mmap


def test_a_saved_view_is_what_it_shows(tmp_path):
    store().select([2, 0, 2]).save(tmp_path / "s")
    back = TokenStore.load(tmp_path / "s")
    assert back.lengths.tolist() == [2, 5, 2] and back.origin(2) == ("b.jsonl", 1)


def test_an_empty_store_is_a_store(tmp_path):
    empty = pack_store([], [])
    assert len(empty) == 0 and empty.lengths.tolist() == []
    empty.save(tmp_path / "s")
    assert len(TokenStore.load(tmp_path / "s")) == 0


def test_damage_is_found(tmp_path):
    made = store()
    for number, damage in enumerate(("cut", "flip", "gone", "meta")):
        folder = tmp_path / str(number)
        made.save(folder)
        path = folder / "ids.npy"
        data = bytearray(path.read_bytes())
        if damage == "cut":
            path.write_bytes(data[:-4])
        elif damage == "flip":
            data[-1] ^= 1
            path.write_bytes(data)
        elif damage == "gone":
            path.unlink()
        else:
            (folder / "store.json").write_text("{")
        with pytest.raises(DataError, match="the token store cannot be read"):
            TokenStore.load(folder)


def test_the_fingerprint_does_not_depend_on_where_the_rows_came_from(tmp_path):
    made = store()
    elsewhere = pack_store([Chunk([example], [(5, 0, 9)]) for example in EXAMPLES], ["c.jsonl"])
    floats = store()
    floats.weights = floats.weights.astype(np.float32)
    made.save(tmp_path / "s")
    same = [elsewhere, floats, TokenStore.load(tmp_path / "s"), made.select(range(4)), made.select([3, 2, 1, 0])]
    same[-1] = same[-1].select([3, 2, 1, 0])
    assert {one.fingerprint() for one in same} == {made.fingerprint()}
    made.select([2, 0, 2]).save(tmp_path / "v")
    assert TokenStore.load(tmp_path / "v").fingerprint() == made.select([2, 0, 2]).fingerprint()


def test_the_fingerprint_changes_with_each_token_weight_boundary_and_extra(monkeypatch):
    def one(length: int, ids: int = 1, weight: float = 1.0, **extra) -> Tokens:
        return Tokens(np.full(length, ids, np.int32), np.full(length, weight, np.float32), extra)

    sets = [
        [[one(4)]],
        [[one(4, ids=2)]],
        [[one(4, weight=0.5)]],
        [[one(1), one(3)]],
        [[one(3), one(1)]],
        [[one(1)], [one(3)]],
        [[one(4)], [one(4)]],
        [],
        [[one(4, label=True)]],
        [[one(4, label=False)]],
        [[one(4, other=True)]],
        [[one(4, margin=0.5)]],
        [[one(4, teacher=np.array([0, 0, 1, 0]))]],
        [[one(4, teacher=np.array([0, 0, 0, 1]))]],
    ]
    prints = [pack_store([Chunk(rows, [(0, 0, 1)] * len(rows))], FILES).fingerprint() for rows in sets]
    assert len(set(prints)) == len(sets)
    assert store().select([0, 1]).fingerprint() != store().select([1, 0]).fingerprint()
    whole = store().fingerprint()
    monkeypatch.setattr("tunery.data.store._HASHED", 1)
    assert store().fingerprint() == whole
