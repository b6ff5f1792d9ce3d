"""Token shards, the items made of them, and their order."""

import json
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from token_shards import END, write
from torch.utils.data import DataLoader

import tfkern
from tfkern.data import (
    IGNORED,
    Documents,
    Packed,
    Shards,
    Windows,
    cu_seqlens,
    order,
    padded,
    positions,
)
from tfkern.data.packed import best_fit
from tfkern.models import Transformer, TransformerConfig, cross_entropy


def corpus(seed=0, shards=4, documents=9, longest=40, high=500):
    """Documents of unequal lengths, some of the end token alone, and an empty shard."""
    rng = np.random.default_rng(seed)
    found = [
        [[*rng.integers(1, high, rng.integers(0, longest)).tolist(), END] for _ in range(documents)]
        for _ in range(shards)
    ]
    return [*found[:1], [], *found[1:]]


@pytest.fixture
def shards(tmp_path):
    return Shards(write(tmp_path / "shards", corpus()))


DOCUMENTS = [document for shard in corpus() for document in shard]
STREAM = [token for document in DOCUMENTS for token in document]
NUMBERS = [i for i, document in enumerate(DOCUMENTS) for _ in document]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_the_stream_is_what_was_written(tmp_path, dtype):
    found = Shards(write(tmp_path / "s", corpus(high=np.iinfo(dtype).max), dtype))
    documents = [d for shard in corpus(high=np.iinfo(dtype).max) for d in shard]
    stream = sum(documents, [])
    assert (found.tokens, found.documents) == (len(stream), len(documents))
    assert found.read(0, found.tokens).tolist() == stream
    assert found.read(0, 1).dtype == np.int64
    assert [found.document(i).tolist() for i in range(found.documents)] == documents
    assert found.ends().tolist() == np.cumsum([len(d) for d in documents]).tolist()
    assert (found.vocab_size, found.end_token, found.tokenizer) == (100_000, END, "some.json")


def test_every_range(shards):
    rng = np.random.default_rng(1)
    edges = {0, 1, *np.cumsum([sum(map(len, s)) for s in corpus()]).tolist()}
    cuts = sorted({*edges, *(e - 1 for e in edges if e), *rng.integers(0, len(STREAM), 20)})
    for a in cuts:
        for b in (b for b in cuts if b >= a):
            assert shards.read(a, b).tolist() == STREAM[a:b]
            assert shards.numbers(a, b).tolist() == NUMBERS[a:b]
    for a, b in ((-1, 2), (3, 2), (0, len(STREAM) + 1)):
        for read in (shards.read, shards.numbers):
            with pytest.raises(IndexError, match=f"of a stream of {len(STREAM)}"):
                read(a, b)
    for i in (-1, len(DOCUMENTS)):
        with pytest.raises(IndexError, match=f"document {i} of"):
            shards.document(i)


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


def index(folder, *ends):
    (folder / "00000_unshuffled.ds.index").write_bytes(np.array(ends, "<u8").tobytes())


def told(folder, **facts):
    (folder / "tokens.json").write_text(json.dumps(facts))


BROKEN = {
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.ds")], "has no shards"),
    "half a token": (lambda f: cut(f / "00000_unshuffled.ds", 1), "is cut off"),
    "a token less": (lambda f: cut(f / "00000_unshuffled.ds", 2), "has 3 tokens.* ends at 4"),
    "no tokens": (lambda f: cut(f / "00000_unshuffled.ds", 8), "has 0 tokens.* ends at 4"),
    "half an end": (lambda f: cut(f / "00000_unshuffled.ds.index", 3), "is cut off"),
    "an end less": (lambda f: cut(f / "00000_unshuffled.ds.index", 8), "ends at 2"),
    "no ends": (lambda f: index(f), "ends at 0"),
    "ends that fall": (lambda f: index(f, 3, 2, 4), "do not rise"),
    "an empty document": (lambda f: index(f, 0, 4), "do not rise"),
    "an empty document within": (lambda f: index(f, 2, 2, 4), "do not rise"),
    "ends beyond int64": (lambda f: index(f, 2**64 - 1, 4), "do not rise"),
    "no index": (lambda f: (f / "00000_unshuffled.ds.index").unlink(), "No such file"),
    "no metadata": (lambda f: (f / "00000_unshuffled.ds.metadata").unlink(), "No such file"),
    "foreign metadata": (
        lambda f: (f / "00000_unshuffled.ds.metadata").write_text("{}"),
        "must begin with tokenizer",
    ),
    "mixed types": (
        lambda f: (f / "00000_unshuffled.ds.metadata").write_text("some.json|4"),
        "several sizes",
    ),
    "mixed tokenizers": (
        lambda f: (f / "00000_unshuffled.ds.metadata").write_text("other.json|2"),
        "several tokenizers",
    ),
    "another end token": (lambda f: told(f, vocab_size=9, end_token=5), "not with the end token 5"),
    "an end token beyond": (lambda f: told(f, vocab_size=9, end_token=9), "no such number"),
    "no number": (lambda f: told(f, vocab_size="9"), "no such number"),
    "no JSON": (lambda f: (f / "tokens.json").write_text("{"), "not JSON"),
    "a folder": (
        lambda f: ((f / "00000_unshuffled.ds").unlink(), (f / "00000_unshuffled.ds").mkdir()),
        "not a regular file",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(tmp_path, case):
    folder = write(tmp_path / "s", [[[3, END], [4, END]], [[5, END]]])
    Shards(folder)
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Shards(folder)


def test_a_folder_that_is_absent(tmp_path):
    with pytest.raises(ValueError, match="has no shards"):
        Shards(tmp_path / "nothing")


def test_empty_shards_alone(tmp_path):
    found = Shards(write(tmp_path / "s", [[], []], told=False))
    assert (found.tokens, found.documents, found.vocab_size) == (0, 0, None)
    assert found.read(0, 0).tolist() == found.ends().tolist() == []
    for make in (Windows, Packed):
        with pytest.raises(ValueError, match="has 0 tokens|has no documents"):
            make(found, 8)
    assert len(Documents(found, 8)) == 0


def test_copies_open_the_files_again(shards):
    for source in (shards, Windows(shards, 16), Documents(shards, 16)):
        assert len(pickle.dumps(source)) < 500
    copy = pickle.loads(pickle.dumps(Windows(shards, 16, separate=True)))
    assert (
        copy[3]["documents"].tolist() == Windows(shards, 16, separate=True)[3]["documents"].tolist()
    )
    packed = pickle.loads(pickle.dumps(Packed(shards, 16)))
    assert len(packed) == len(Packed(shards, 16))


@pytest.mark.parametrize("length", [1, 2, 7, 64, len(STREAM) - 1])
def test_windows(shards, length):
    plain, apart = Windows(shards, length), Windows(shards, length, separate=True)
    assert len(plain) == (len(STREAM) - 1) // length
    for i, (item, other) in enumerate(zip(plain, apart, strict=True)):
        a = i * length
        assert item.keys() == {"tokens", "targets"}
        assert item["tokens"].tolist() == other["tokens"].tolist() == STREAM[a : a + length]
        assert item["targets"].tolist() == STREAM[a + 1 : a + length + 1]
        assert other["documents"].tolist() == [n - NUMBERS[a] for n in NUMBERS[a : a + length]]
        assert other["targets"].tolist() == [
            IGNORED if STREAM[k] == END else STREAM[k + 1] for k in range(a, a + length)
        ]


def test_windows_need_tokens(shards):
    with pytest.raises(ValueError, match=f"has {len(STREAM)} tokens: a window of {len(STREAM)}"):
        Windows(shards, len(STREAM))
    for make in (Windows, Documents, Packed):
        for length in (0, -3, 8.0, "8", None, True):
            with pytest.raises(ValueError, match="length must be a positive integer"):
                make(shards, length)
        with pytest.raises(IndexError):
            make(shards, 8)[len(make(shards, 8))]
        with pytest.raises(IndexError):
            make(shards, 8)[-1]


def test_documents(shards):
    for length in (1, 5, 40):
        rows = list(Documents(shards, length, pad=7))
        assert len(rows) == len(DOCUMENTS)
        for row, document in zip(rows, DOCUMENTS, strict=True):
            n = min(len(document), length)
            assert row["mask"] == n and row["mask"].shape == ()
            assert row["tokens"].tolist() == document[:n] + [7] * (length - n)
            targets = document[1 : length + 1]
            assert row["targets"].tolist() == targets + [IGNORED] * (length - len(targets))


@pytest.mark.parametrize("length", [1, 3, 16, 41, 200])
def test_packed_rows_lose_nothing(shards, length):
    packed = Packed(shards, length, pad=501)
    parts, counted = Counter(), 0
    for row in packed:
        documents = row["documents"]
        numbers = np.split(np.arange(length), np.flatnonzero(np.diff(documents)) + 1)
        for where in numbers:
            tokens, targets = row["tokens"][where], row["targets"][where]
            if (tokens == 501).all():
                assert (targets == IGNORED).all() and where[-1] == length - 1
                continue
            assert targets[:-1].tolist() == tokens[1:].tolist()
            assert (targets[-1] == IGNORED) == (tokens[-1] == END)
            parts[tuple(tokens)] += 1
            counted += (targets != IGNORED).sum()
    expected = Counter(
        tuple(d[a : a + length]) for d in DOCUMENTS for a in range(0, len(d), length)
    )
    assert parts == expected
    assert counted == len(STREAM) - len(DOCUMENTS)


def first_principles(sizes, length):
    """Best fit decreasing, part by part; ties go to the row that was opened first."""
    rooms, rows = [], np.empty(len(sizes), int)
    for i in np.argsort(-sizes, kind="stable"):
        fits = [r for r, room in enumerate(rooms) if room >= sizes[i]]
        if fits:
            row = min(fits, key=lambda r: (rooms[r], r))
        else:
            row = len(rooms)
            rooms.append(length)
        rooms[row] -= sizes[i]
        rows[i] = row
    return rows, sorted(rooms)


@pytest.mark.parametrize("seed", range(30))
def test_packing_is_best_fit(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 60))
    high = int(rng.integers(1, length + 1))
    sizes = rng.integers(1, high + 1, rng.integers(1, 400))
    rows = best_fit(sizes, length)
    filled = np.bincount(rows, weights=sizes).astype(int)
    _, rooms = first_principles(sizes, length)
    assert sorted(length - filled) == rooms  # no row too full, and as many rows, equally full
    assert filled.min() > 0
    assert best_fit(sizes, length).tolist() == rows.tolist()


def test_padded():
    assert padded(np.array([1, 2]), 4, 9).tolist() == [1, 2, 9, 9]
    with pytest.raises(ValueError, match="a row of 2 does not fit into 1"):
        padded(np.array([1, 2]), 1, 9)


@pytest.mark.parametrize("make", [Packed, lambda s, n: Windows(s, n, separate=True)])
def test_documents_do_not_see_each_other(shards, make):
    """Attention over a batch equals attention over each document by itself."""
    source, T = make(shards, 24), 24
    documents = torch.from_numpy(np.stack([source[i]["documents"] for i in (0, 2, 5)]))
    ends = cu_seqlens(documents)
    assert ends.dtype == torch.int32
    q, k, v = torch.randn(3, 3 * T, 2, 8, dtype=torch.float64)
    o = tfkern.attention_varlen(q, k, v, ends, ends, causal=True)
    places = positions(documents)
    for row in range(3):
        for number in documents[row].unique():
            where = row * T + (documents[row] == number).nonzero().squeeze(1)
            one = (x[where].transpose(0, 1) for x in (q, k, v))
            expected = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)
            torch.testing.assert_close(o[where].transpose(0, 1), expected)
            assert places.flatten()[where].tolist() == list(range(len(where)))


def test_a_model_takes_the_items(shards):
    config = TransformerConfig(
        vocab_size=500, max_length=16, dim=16, layers=1, heads=2, architecture="decoder"
    )
    model = Transformer(config)
    apart = Windows(shards, 16, separate=True)
    for source in (Windows(shards, 16), apart, Documents(shards, 16), Packed(shards, 16)):
        batch = order([source], 4, seed=1)[0]
        targets = batch.pop("targets")
        cross_entropy(model(**batch), targets).backward()


def test_the_example_of_the_docs(shards):
    """Its loss reaches all weights."""
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    config = TransformerConfig(vocab_size=500, max_length=64, dim=16, layers=1, heads=2)
    names = {"shards": shards, "model": Transformer(config), "Packed": Packed, "order": order}
    (example,) = re.findall("```python\n(.+?)```", page, re.S)
    exec(example, names | {"cross_entropy": cross_entropy}, found := {})
    found["loss"].backward()
    assert all(p.grad.any() for p in names["model"].parameters())


class Numbers:
    """Items that are their own number."""

    def __init__(self, count, offset=0):
        self.count, self.offset = count, offset

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"x": np.array(i + self.offset)}


def drawn(batches, steps):
    return [batches[step]["x"].tolist() for step in steps]


grain = pytest.importorskip("grain")


def test_an_epoch_has_each_item_once_in_a_new_order():
    n, batch = 37, 5
    flat = sum(drawn(order([Numbers(n)], batch, 7), range(3 * n)), [])
    epochs = [flat[i : i + n] for i in range(0, len(flat), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)
    assert flat != sum(drawn(order([Numbers(n)], batch, 8), range(3 * n)), [])


def test_ranks_share_the_batches_of_one():
    sources, weights = [Numbers(50), Numbers(31, 100)], [0.7, 0.3]
    for given in (None, weights):
        make = lambda given=given, **ranks: order(sources, 12, 3, weights=given, **ranks)  # noqa: E731
        whole = drawn(make(), range(40))
        for world in (1, 2, 3, 4):
            ranks = [drawn(make(rank=r, world=world), range(40)) for r in range(world)]
            assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("weights", [None, [1, 2]])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_may_have_one_item_each(world, weights):
    make = lambda **ranks: order([Numbers(9), Numbers(4, 50)], world, 3, weights=weights, **ranks)  # noqa: E731
    whole = drawn(make(), range(20))
    ranks = [drawn(make(rank=r, world=world), range(20)) for r in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole


def test_any_step_can_be_resumed():
    make = lambda: order([Numbers(41), Numbers(13, 100)], 8, 11, weights=[3, 1])  # noqa: E731
    whole = drawn(make(), range(300))
    assert drawn(make(), range(137, 300)) == whole[137:]
    assert drawn(make(), reversed(range(300))) == whole[::-1]
    assert drawn(pickle.loads(pickle.dumps(make())), range(20)) == whole[:20]


def test_weights_are_shares():
    flat = sum(
        drawn(order([Numbers(1000), Numbers(50, 5000)], 10, 1, weights=[1, 3]), range(400)), []
    )
    second = [x for x in flat if x >= 5000]
    assert len(second) == 3000
    counts = Counter(second)
    assert set(counts.values()) == {60}  # epochs of its own
    for a in range(0, len(flat), 100):  # in each stretch
        assert sum(x >= 5000 for x in flat[a : a + 100]) in (74, 75, 76)


def test_joined_sources_have_common_epochs():
    flat = sum(drawn(order([Numbers(20), Numbers(5, 100)], 5, 1), range(10)), [])
    for epoch in (flat[:25], flat[25:]):
        assert sorted(epoch) == [*range(20), *range(100, 105)]


def test_sources_of_one_length_have_orders_of_their_own():
    flat = sum(drawn(order([Numbers(64), Numbers(64, 100)], 8, 1, weights=[1, 1]), range(64)), [])
    first, second = ([x % 100 for x in flat if (x >= 100) == side] for side in (False, True))
    epochs = [tuple(x[i : i + 64]) for x in (first, second) for i in range(0, 256, 64)]
    assert len(set(epochs)) == 8


def test_orders_are_uniform():
    """Each place of a batch sees each item equally often, over seeds."""
    n, seeds = 6, 150
    seen = np.zeros((n, n))
    for seed in range(seeds):
        seen[np.arange(n), drawn(order([Numbers(n)], n, seed), [0])[0]] += 1
    expected = seeds / n
    chi = ((seen - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi - freedom) < 6 * (2 * freedom) ** 0.5


def add_seed(item, seed):
    return {"x": item["x"], "seed": np.array(seed)}


def test_items_can_be_changed_by_seeds_of_their_own():
    make = lambda **ranks: order([Numbers(10)], 4, 9, change=add_seed, **ranks)  # noqa: E731
    seeds = [tuple(s) for step in range(20) for s in make()[step]["seed"].tolist()]
    assert seeds == [(9, place) for place in range(80)]
    parts = [make(rank=r, world=2)[7]["seed"] for r in (0, 1)]
    assert torch.cat(parts).tolist() == make()[7]["seed"].tolist()


def several(item, seed):
    return item | {"targets": (np.arange(3) * item["x"], item["x"] + 1)}


def test_several_targets_are_a_tuple():
    batch = order([Numbers(10)], 4, 9, change=several)[2]
    x, (first, second) = batch["x"], batch["targets"]
    assert isinstance(batch["targets"], tuple)
    assert torch.equal(first, torch.arange(3) * x[:, None]) and torch.equal(second, x + 1)


def test_workers_change_nothing(shards):
    batches = order([Windows(shards, 16), Windows(shards, 16)], 4, 5, weights=[1, 2])
    plain = [batches[step] for step in range(7, 20)]
    for workers in (0, 2):
        loader = DataLoader(batches, None, sampler=range(7, 20), num_workers=workers)
        for found, expected in zip(loader, plain, strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_workers_that_are_started_afresh(shards):
    batches = order([Packed(shards, 16)], 4, 5)
    loader = DataLoader(
        batches, None, sampler=range(3), num_workers=1, multiprocessing_context="spawn"
    )
    for step, found in enumerate(loader):
        assert torch.equal(found["tokens"], batches[step]["tokens"])


WRONG = {
    "no sources": ({"sources": []}, "no sources"),
    "an empty source": ({"sources": [Numbers(0)]}, "source 0 must have 1 to"),
    "a vast source": ({"sources": [Numbers(2**32)]}, "source 0 must have 1 to"),
    "vast together": ({"sources": [Numbers(2**31)] * 2}, "2\\*\\*32 items or more together"),
    "other items": ({"sources": [Numbers(3), [{"y": np.array(1)}]]}, "items of source 1 are"),
    "no batch": ({"batch": 0}, "batch must be a multiple"),
    "half a batch": ({"batch": 4.0}, "batch must be an integer"),
    "an uneven batch": ({"batch": 5, "world": 2}, "batch must be a multiple of the 2 ranks"),
    "a negative seed": ({"seed": -1}, "seed must lie in"),
    "a huge seed": ({"seed": 2**32}, "seed must lie in"),
    "no seed": ({"seed": None}, "seed must be an integer"),
    "a rank beyond": ({"rank": 2, "world": 2}, "rank must lie in"),
    "a negative rank": ({"rank": -1}, "rank must lie in"),
    "no ranks": ({"world": 0}, "rank must lie in"),
    "too few weights": ({"weights": []}, "1 sources and 0 weights"),
    "a weight of 0": ({"weights": [0]}, "weights must be positive"),
    "a negative weight": ({"weights": [-1.0]}, "weights must be positive"),
    "no number": ({"weights": [float("nan")]}, "weights must be positive"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_of_order(case):
    given, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        order(**({"sources": [Numbers(3)], "batch": 2, "seed": 1} | given))
    order([Numbers(3)], 2, 2**32 - 1)


def test_example_of_the_package(tmp_path, monkeypatch):
    write(tmp_path / "shards", corpus())
    folder = tmp_path / "shards" / "tokens.json"
    folder.write_text(json.dumps({"vocab_size": 500, "end_token": END}))
    monkeypatch.chdir(tmp_path)
    lines = tfkern.data.__doc__.splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith("    ") or not line)
    names = {}
    exec(code, names)
    assert 4 < names["loss"] < 9 and names["batches"][0]["tokens"].shape == (8, 64)


def test_imports_say_nothing_and_are_late():
    code = (
        "import sys, tfkern.data as data\n"
        "late = {'grain', 'datatrove', 'tokenizers', 'jinja2'} & set(sys.modules)\n"
        "import numpy\n"
        "data.order([[{'x': numpy.array(1)}]], 1, 0)[0]\n"
        "print(late - {'jinja2'})"  # jinja2 comes with torch
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "set()\n", "")
