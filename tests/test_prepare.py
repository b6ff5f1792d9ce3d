"""Preparation of data, from files to shards, each step against a plain computation of the same."""

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zstandard

pytest.importorskip("datatrove")

import killing  # noqa: E402
from datatrove.data import Document  # noqa: E402

from tfkern import files, tokenize  # noqa: E402
from tfkern.cli import main  # noqa: E402
from tfkern.data import Shards  # noqa: E402
from tfkern.data.prepare import Recipe, draw, execute, prepare, recipe, steps, tokens  # noqa: E402
from tfkern.data.prepare import run as run_module  # noqa: E402
from tfkern.data.prepare.clean import steps as clean_steps  # noqa: E402
from tfkern.data.prepare.duplicates import Keep, rows_of  # noqa: E402
from tfkern.data.prepare.markup import plain_text  # noqa: E402
from tfkern.data.prepare.private import mask  # noqa: E402
from tfkern.data.prepare.sources import LONGEST, documents  # noqa: E402
from tfkern.data.prepare.stage import Stage  # noqa: E402
from tfkern.data.prepare.storage import Writer, file_of  # noqa: E402
from tfkern.data.prepare.words import Whitespace, Words  # noqa: E402

WORDS = """time year people way day man thing woman life child world school state family student
group country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book eye job
word business issue side kind head house service friend father power hour game line end member law
car city community name president team minute idea kid body information back parent face others
level office door health person art war history party result change morning reason research girl
guy moment air teacher force education""".split()


def sentences(seed, count=8):
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        words = rng.sample(WORDS, rng.randint(6, 12)) + rng.sample(["the", "of", "and", "to"], 2)
        found.append("The " + " ".join(rng.sample(words, len(words))) + ".")
    return " ".join(found)


def parts(folder, name="train"):
    """The documents of all shards, as lists of tokens without the last one, and these last ones."""
    rows, ends = [], []
    for path in sorted((folder / name).glob("*.ds")):
        size = int(path.with_name(path.name + ".metadata").read_text().split("\n")[0].split("|")[1])
        tokens = np.fromfile(path, f"<u{size}").tolist()
        first = 0
        for end in np.fromfile(path.with_name(path.name + ".index"), "<u8").tolist():
            rows.append(tokens[first : end - 1])
            ends.append(tokens[end - 1])
            first = end
        assert first == len(tokens)
    return rows, ends


def texts(folder, name="train"):
    tokenizer = tokenize.load(folder / "tokenizer")
    return [tokenizer.decode(row) for row in parts(folder, name)[0]]


def shards(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.ds*"))}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(tmp_path, rows, **options):
    """The texts that are left of texts by id."""
    source = lines(tmp_path / "in.jsonl", [{"id": k, "text": v} for k, v in rows.items()])
    options = {"tokenizer": "characters", "validation": 0, "files": 3} | options
    done = prepare(Recipe(input=source, output=tmp_path / "out", **options), workers=1)
    return done, texts(done)


def dropped(folder):
    """How many documents were dropped, by step and reason."""
    return {
        (row["step"], reason): n for row in steps(folder) for reason, n in row["dropped"].items()
    }


def test_paragraphs_of_a_text_become_documents(tmp_path):
    rows = [f"Part {i}:\nline of {i}" for i in range(300)]
    (tmp_path / "a.txt").write_text("\n\n".join(rows) + "\n")
    told = Recipe(input=tmp_path / "a.txt", output=tmp_path / "out", tokenizer="characters")
    done = prepare(told)
    train, validation = texts(done), texts(done, "validation")
    assert sorted(train + validation) == sorted(rows) and 3 <= len(validation) <= 33
    assert train == [row for row in rows if row in set(train)]  # in the order of the text
    end = json.loads((done / "train" / "tokens.json").read_text())["end_token"]
    assert {*parts(done)[1], *parts(done, "validation")[1]} == {end}
    assert not any(end in row for row in parts(done)[0])
    manifest = json.loads((done / "manifest.json").read_text())
    counted = sum(s["documents"] for s in manifest["shards"].values())
    size = sum(s["tokens"] for s in manifest["shards"].values())
    assert counted == 300 and size == sum(map(len, rows)) + 300
    assert not (done / "work").exists()
    read = Shards(done / "train")
    assert [read.document(i).tolist()[:-1] for i in range(read.documents)] == parts(done)[0]
    assert (read.end_token, read.tokens) == (end, sum(len(row) + 1 for row in parts(done)[0]))
    again = prepare(told, progress=lambda *_: pytest.fail("it was done"))
    assert again == done


def test_neither_workers_nor_interruptions_change_the_shards(tmp_path):
    rows = {str(i): sentences(i % 40) for i in range(60)}
    source = lines(tmp_path / "in.jsonl", [{"id": k, "text": v} for k, v in rows.items()])
    options = {
        "input": source, "tokenizer": "bpe:300", "near_duplicates": 0.8, "clean": ["gopher_quality"]
    }  # fmt: skip
    one = prepare(Recipe(output=tmp_path / "one", **options), workers=1)
    two = prepare(Recipe(output=tmp_path / "two", **options), workers=2)

    class Stop(Exception):
        pass

    def stopping(stage, done, total):
        if done and (stage, done) not in seen:
            seen.append((stage, done))
            if len(seen) % 4 == 0:
                raise Stop

    seen, stops, three = [], 0, None
    while three is None:
        try:
            told = Recipe(output=tmp_path / "three", **options)
            three = prepare(told, workers=1, progress=stopping)
        except Stop:
            stops += 1
    assert stops > 6
    assert shards(one) == shards(two) == shards(three) and one.name == two.name == three.name
    counts = [[{**row, "seconds": 0} for row in steps(d)] for d in (one, two, three)]
    assert counts[0] == counts[1] == counts[2]
    assert len(texts(one)) + len(texts(one, "validation")) == 40


def test_a_worker_that_is_killed_is_an_error(tmp_path):
    ranks = execute._Local.__new__(execute._Local)
    ranks.folder, ranks.workers = tmp_path, 2
    with pytest.raises(RuntimeError, match="'deadly': a worker was killed, perhaps for want of"):
        ranks(Stage("deadly", [killing.Killed()], 3), lambda *_: None)


def test_shards_that_lost_a_part_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    told = Recipe(input=tmp_path / "a.txt", output=tmp_path / "out", validation=0, files=1)

    def cut(stage, done, total):
        if stage == "tokens" and done:
            path = next(tmp_path.glob("out/*/train/00000.ds"))
            path.write_bytes(path.read_bytes()[:-2])

    with pytest.raises(ValueError, match="00000.ds has [0-9]+ tokens, but its index ends at"):
        prepare(told, progress=cut)


def test_ranks_may_run_in_other_folders(tmp_path, monkeypatch):
    """Paths of a recipe are those of the folder where it was given, as on the machines of Slurm."""
    monkeypatch.chdir(tmp_path)
    rows = [sentences(i) for i in range(6)]
    Path("a.txt").write_text("\n".join(rows))
    Path("seen.txt").write_text(rows[2])
    tokenize.save(tokenize.train("bpe", rows, 300), "tokenizer")
    told = Recipe(
        input="a.txt", output="out", split="line", decontaminate="seen.txt", validation=0,
        tokenizer="tokenizer",
    )  # fmt: skip
    planned = recipe.plan(told)
    todo = run_module.stages(planned)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for stage in todo:
        ranks = execute._Ranks(stage, tmp_path / planned.folder)
        for rank in range(stage.ranks):
            ranks.run_rank(rank)
    assert texts(tmp_path / planned.folder) == rows[:2] + rows[3:]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_what_a_key_depends_on(tmp_path):
    def key(**options):
        told = {"input": str(tmp_path / "a.txt"), "output": str(tmp_path / "o"), **options}
        return recipe.plan(Recipe(**told)).key

    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "list").write_text("bad\n")
    listed = [{"word_list": {"file": str(tmp_path / "list")}}]
    keys = [
        key(), key(split="line"), key(clean=["unicode"]), key(clean=listed), key(files=9),
        key(tokenizer="characters"), key(near_duplicates=0.7), key(validation=0.1),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] == key(output=str(tmp_path / "p"), slurm={"time": 1})
    (tmp_path / "list").write_text("worse\n")
    assert key(clean=listed) not in keys
    (tmp_path / "a.txt").write_text("two")
    assert key() not in keys


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    told = Recipe(input=tmp_path / "a.txt", output=tmp_path / "out")
    folder = recipe.plan(told).folder
    (folder / "train").mkdir(parents=True)
    for name in ("notes.txt", "train/more.ds"):
        (folder / name).touch()
        with pytest.raises(ValueError, match=f"{folder}: holds {name}, which is not"):
            prepare(told)
        (folder / name).unlink()
    assert sorted(texts(prepare(told)) + texts(folder, "validation")) == ["one", "two"]


def test_two_runs_in_one_folder_at_a_time_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    told = Recipe(input=tmp_path / "a.txt", output=tmp_path / "out", validation=0)

    def second(stage, done, total):
        if stage == "read":
            with pytest.raises(ValueError, match="another run is at work in this folder"):
                prepare(told)

    assert texts(prepare(told, progress=second)) == ["one"]


def test_without_locks_there_are_runs_still(tmp_path, monkeypatch):
    """As on file systems of networks, and on Windows."""
    (tmp_path / "a.txt").write_text("one")

    def refuses(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuses)
    told = {"input": tmp_path / "a.txt", "validation": 0}
    assert texts(prepare(Recipe(output=tmp_path / "network", **told))) == ["one"]
    monkeypatch.setattr(files, "fcntl", None)
    assert texts(prepare(Recipe(output=tmp_path / "windows", **told))) == ["one"]


def test_runs_wait_for_jobs_of_slurm(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    told = Recipe(input=tmp_path / "a.txt", output=tmp_path / "out", validation=0)
    folder = recipe.plan(told).folder
    folder.mkdir(parents=True)
    (folder / "jobs").write_text("71\n72\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    squeue = tmp_path / "squeue"
    for script, message in [
        (
            "echo 72; echo 80",
            r"Slurm still has jobs of this run \(72\): wait for them, or end",
        ),
        ("exit 1", "squeue cannot tell .*: remove .*jobs if they have ended"),
    ]:
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)
        with pytest.raises(ValueError, match=message):
            prepare(told)
    squeue.write_text("#!/bin/sh\necho 80\n")
    assert texts(prepare(told)) == ["one"] and not (folder / "jobs").exists()


def test_what_a_run_that_was_killed_left_is_not_foreign(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    told = Recipe(input=tmp_path / "a.txt", output=tmp_path / "out", validation=0)
    folder = recipe.plan(told).folder
    for name in (".tfkern-x", "train/.tfkern-y"):
        (folder / name).mkdir(parents=True)
    assert texts(prepare(told)) == ["one"]
    assert not list(folder.glob("**/.tfkern-*"))


def two_frames(content):
    return b"".join(zstandard.compress(part) for part in (content[:9], content[9:]))


def test_texts_in_every_division_and_compression(tmp_path):
    text = "\ufeffFirst line\r\nsecond\r\n\r\n  \r\nthird\r\n"
    made = {
        "a.txt": bytes, "a.txt.gz": gzip.compress, "a.txt.bz2": bz2.compress,
        "a.txt.xz": lzma.compress, "a.txt.zst": two_frames,
    }  # fmt: skip
    for name, pack in made.items():
        (tmp_path / name).write_bytes(pack(text.encode()))
        found = {
            split: [d if isinstance(d, str) else (d.id, d.text) for d in
                    documents(tmp_path / name, "n", "text", split)]
            for split in ("file", "line", "paragraph")
        }  # fmt: skip
        assert found["file"] == [("n/0", text[1:])]
        assert found["line"] == [
            ("n/0", "First line"), ("n/1", "second"), "empty", "empty", ("n/4", "third")
        ]  # fmt: skip
        assert found["paragraph"] == [("n/0", "First line\nsecond"), ("n/1", "third")]


def test_lines_without_end_are_cut(tmp_path):
    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcde", k=9)) for _ in range(62_500))
    (tmp_path / "a.txt").write_text(text)
    for split in ("line", "paragraph"):
        found = [d.text for d in documents(tmp_path / "a.txt", "n", "text", split)]
        assert "".join(found) == text and len(found) == 3
        assert max(map(len, found)) <= LONGEST and all(p.endswith(" ") for p in found[:-1])


def test_a_bad_line_costs_that_line(tmp_path):
    good = [
        b'{"text": "one", "id": 7}',
        b'\xef\xbb\xbf{"text": "two"}',
        b'{"id": "x", "text": "3"}',
    ]
    bad = {
        b'{"text": "caf\xe9"}': "not_json", b'{"text": ': "not_json", b'[1]': "no_text",
        b'{"text": 5}': "no_text", b'{"txt": "a"}': "no_text", b'{"text": " "}': "empty",
    }  # fmt: skip
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good[0], *bad, b"", *good[1:]]))
    done = prepare(Recipe(input=tmp_path / "in.jsonl", output=tmp_path / "out", validation=0))
    assert texts(done) == ["one", "two", "3"]
    assert dropped(done) == {
        ("input", "not_json"): 2,
        ("input", "no_text"): 3,
        ("input", "empty"): 1,
    }
    ids = [
        d.id for d in documents(tmp_path / "in.jsonl", "n", "json", "") if not isinstance(d, str)
    ]
    assert ids == ["n/7", "n/8", "n/x"]


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<siteinfo><sitename>W</sitename></siteinfo>
<page><title>A</title><ns>0</ns><id>1</id><revision><id>10</id><text>'''A''' is [[b|the b]].</text>
</revision></page>
<page><title>B</title><ns>0</ns><id>2</id><redirect title="A"/><revision><id>11</id>
<text>#REDIRECT [[A]]</text></revision></page>
<page><title>Talk:A</title><ns>1</ns><id>3</id><revision><id>12</id><text>hm</text></revision></page>
<page><title>C</title><ns>0</ns><id>4</id><revision><id>13</id><text>{{only|a template}}</text>
</revision></page>
<page><title>D</title><ns>0</ns><id>5</id><revision><id>14</id><text></text></revision></page>
</mediawiki>"""


def test_dumps_of_mediawiki(tmp_path):
    path = tmp_path / "dump.xml-p1p5.bz2"
    path.write_bytes(bz2.compress(DUMP.encode()))
    done = prepare(Recipe(input=path, output=tmp_path / "out", validation=0))
    assert texts(done) == ["A is the b."]
    assert dropped(done) == {
        ("input", "redirect"): 1, ("input", "namespace"): 1, ("input", "empty"): 1,
        ("plain text", "empty"): 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "wikitext, text",
    [
        ("a '''bold''' and ''italic'' word", "a bold and italic word"),
        ("[[page]] [[page|shown]] [[File:x.jpg|thumb|a [[link]]]] [[Category:C]] [[fr:page]]",
         "page shown"),
        ("[http://a.b shown] http://a.b [http://a.b]", "shown http://a.b"),
        ("x<ref>no</ref> y<ref name=a/> <!-- no --> {{cite|a={{b}}}} z", "x y   z"),
        ("== Head ==\ntext\n{| class=a\n| cell\n|}\nafter", "Head \ntext\n\nafter"),
        ("a&#xD800;b", "ab"),
        ("a &amp; b &nbsp;c &#65; <nowiki>[[x]]</nowiki>", "a & b \xa0c A x"),
        ("* item\n# second\n: third", "item\n second\n third"),
        ("<math>x^2</math> <b>b</b> <gallery>File:a</gallery>", "b"),
        ("unclosed [[link and {{template and '''''", "unclosed link and template and"),
    ],
)  # fmt: skip
def test_markup_is_removed(wikitext, text):
    words = [line.split() for line in plain_text(wikitext).splitlines()]
    assert [w for w in words if w] == [w for w in map(str.split, text.splitlines()) if w]


@pytest.mark.parametrize(
    "text, masked",
    [
        ("mail a.b+c@mail.example.org, now", "mail <email>, now"),
        ("user@localhost @name a@b", "user@localhost @name a@b"),
        ("from 8.8.8.8 or 192.168.0.1.", "from <ip> or 192.168.0.1."),
        ("version 8.8.8.8, v9.9.9.9 and 1.2.3.4.5", "version 8.8.8.8, v9.9.9.9 and 1.2.3.4.5"),
        ("at 2001:4860:4860::8888 not ::1 or 12:30:45", "at <ip> not ::1 or 12:30:45"),
        ("call +44 20 7946 0958 or (212) 555-0123!", "call <phone> or <phone>!"),
        ("in 1999 2000 2001, 12345678901, 3.14159265358979", None),
        ("IBAN GB82 WEST 1234 5698 7654 32 PLEASE", "IBAN <iban> PLEASE"),
        ("DE89370400440532013000 and DE88370400440532013000",
         "<iban> and DE88370400440532013000"),
    ],
)  # fmt: skip
def test_what_points_to_a_person_is_masked(text, masked):
    assert mask(text) == (text if masked is None else masked)
    assert mask(mask(text)) == mask(text)
    assert mask(text, ()) == text


def test_steps_of_cleaning_and_their_counts(tmp_path):
    (tmp_path / "bad").write_text("evil thing\nfoul\n")
    good = sentences(1, 12)
    rows = {
        "good": good,
        "short": "Only a few words of it.",
        "german": "Dies ist ein deutscher Text, der von nichts als sich selbst handelt. " * 9,
        "repeated": "the same line of it and that\n" * 60,
        "listed": good.replace("The", "The evil  Thing", 1),
        "broken": good.replace("The", "schÃ¶n The", 1),
        "mail": good.replace("The", "a@b.com", 1),
    }
    told = [
        "unicode", {"length": {"least": 30}}, {"language": {"languages": ["en"]}},
        {"word_list": {"file": str(tmp_path / "bad")}}, "gopher_repetition", "private",
        {"gopher_quality": {"min_doc_words": 20}},
    ]  # fmt: skip
    done, left = run(tmp_path, rows, clean=told)
    assert left == [good, good.replace("The", "schön The", 1), good.replace("The", "<email>", 1)]
    counts = dropped(done)
    assert (
        counts.pop(("gopher repetition", next(r for s, r in counts if s.startswith("goph")))) == 1
    )
    assert counts == {("length", "short"): 1, ("language", "de"): 1, ("word list", "listed"): 1}
    draw(done, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_words_are_those_between_blanks():
    text = "It's one—two, 3.5 (four)!"
    assert Whitespace().word_tokenize(text) == text.split()
    assert Words().word_tokenize(text) == ["It's", "one", "—", "two", ",", "3.5", "(", "four", ")!"]
    text = "One. Two?  Three!\nFour"
    assert Words().sent_tokenize(text) == ["One.", "Two?", "Three!", "Four"]
    assert [text[a:b].strip() for a, b in Words().span_tokenize(text)] == Words().sent_tokenize(
        text
    )


def grams(text, n=5):
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def similarity(a, b):
    a, b = grams(a), grams(b)
    return len(a & b) / len(a | b) if a | b else 0.0


def changed(text, share, seed):
    """The text with about this share of its words replaced by others."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) if rng.random() < share else w for w in text.split())


def corpus():
    """Documents of which some are alike, in chains, too."""
    rows = {f"a{i}": sentences(i, 15) for i in range(40)}
    for i in range(20):
        rows[f"b{i}"] = changed(rows[f"a{i}"], 0.02, i)
        rows[f"c{i}"] = changed(rows[f"b{i}"], 0.03, 100 + i)
        rows[f"d{i}"] = changed(rows[f"a{i}"], 0.3, 200 + i)
        numbers = random.Random(300 + i)  # tables that differ in numbers only
        rows[f"e{i}"] = " ".join(f"{word} {numbers.random():.3f}" for word in WORDS)
    return rows


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates(tmp_path, threshold):
    """Against all pairs: no two that stay are alike, and whatever went is like one that stays.
    Which ones stay depends neither on the order nor on the number of files."""
    rows = corpus()
    _, left = run(tmp_path, rows, near_duplicates=threshold)
    gone = set(rows.values()) - set(left)
    assert 15 <= len(gone) <= 45
    pairs = [(a, b) for i, a in enumerate(left) for b in left[:i]]
    alike = [pair for pair in pairs if similarity(*pair) >= threshold]
    assert len(alike) <= 0.05 * len(gone)  # MinHash finds 19 of 20 at the threshold itself
    assert all(max(similarity(a, b) for b in left) >= threshold for a in gone)
    for seed in (1, 2):
        order = random.Random(seed).sample(list(rows), len(rows))
        (tmp_path / str(seed)).mkdir()
        again = run(tmp_path / str(seed), {k: rows[k] for k in order}, near_duplicates=threshold,
                    files=2 * seed - 1)[1]  # fmt: skip
        assert set(again) == set(left)


@pytest.mark.parametrize("which", [{"exact_duplicates": True}, {"near_duplicates": 0.7}])
def test_which_one_stays_when_ids_repeat(tmp_path, which):
    """The same one in either order of the documents."""
    rows = [{"id": i % 2, "text": sentences(i // 4)} for i in range(24)]
    for i, row in enumerate(rows):  # four of a kind, of which two have one id
        row["text"] = row["text"].replace(" ", "  " if i % 4 > 1 else " ", 1 + i % 2)
    left = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        source = lines(tmp_path / f"{name}.jsonl", order)
        told = Recipe(input=source, output=tmp_path, tokenizer="characters", validation=0, **which)
        left.append(sorted(texts(prepare(told, workers=1))))
    assert left[0] == left[1] and len(left[0]) == 6


def test_the_comparison_of_near_duplicates_takes_little_memory(tmp_path):
    """Less than the hashes of all sequences of words."""
    clusters = tmp_path / "clusters"
    clusters.mkdir()
    writer = Writer(file_of(tmp_path, 0))
    for i in range(80):
        rng = random.Random(i // 2)
        text = " ".join(rng.choices(WORDS, k=2000))
        writer.write(Document(text=text, id=str(i)))
    writer.close()
    np.array([(i, i // 4) for i in range(80)], "<u4").tofile(clusters / "000000.clusters")
    keep = Keep(tmp_path, str(clusters), 1, "whitespace", 0.7, 5)
    tracemalloc.start()
    list(keep.run())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.fromfile(clusters / "000000.remove", "<u4")) == 40
    assert peak < 80 * 2000 * 8


@pytest.mark.parametrize("share, most, least", [(0.01, 1, 0.95), (0.02, 1, 0.9), (0.2, 0, 0)])
def test_planted_near_duplicates_are_found(tmp_path, share, most, least):
    """Copies with a share of their words replaced, beside others that are like nothing."""
    rows = {f"a{i}": sentences(i, 25) for i in range(80)}
    copies = {f"b{i}": changed(rows[f"a{i}"], share, i) for i in range(40)}
    _, left = run(tmp_path, rows | copies, near_duplicates=0.7)
    alike = [similarity(rows[f"a{i}"], copies[f"b{i}"]) >= 0.7 for i in range(40)]
    gone = [not {rows[f"a{i}"], copies[f"b{i}"]} <= set(left) for i in range(40)]
    assert all(b or not a for a, b in zip(gone, alike, strict=True))  # none goes that is not alike
    assert sum(gone) >= 0.95 * sum(alike)  # four hashes in 32 bands find more than 0.9998 of them
    assert least * 40 <= sum(gone) <= most * 40
    assert {rows[f"a{i}"] for i in range(40, 80)} <= set(left)


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.txt").write_text("two")
    (tmp_path / "in" / "a.txt").write_text("one")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    told = Recipe(input=tmp_path / "in", output=tmp_path / "out", validation=0)
    assert [name for _, name, _ in recipe.plan(told).inputs] == ["a.txt", "link/b.txt"]
    assert sorted(texts(prepare(told))) == ["one", "two"]
    (tmp_path / "far" / "up").symlink_to(tmp_path / "far")
    with pytest.raises(ValueError, match="in/link/up: the link leads to a folder in which it is"):
        prepare(told)


def test_bands_find_most_pairs_at_the_threshold():
    for threshold in np.linspace(0.1, 1, 19):
        rows = rows_of(threshold)
        assert 128 % rows == 0 and (rows == 1 or 1 - (1 - threshold**rows) ** (128 // rows) >= 0.95)
    assert [rows_of(t) for t in (0.5, 0.7, 0.85, 0.95)] == [2, 4, 8, 16]


def test_exact_duplicates(tmp_path):
    rows = {
        "1": "a b",
        "2": "A  b",
        "3": "a b c",
        "4": "a  b\nc",
        "5": "a b!",
        "6": "x 1",
        "7": "x 2",
    }
    done, left = run(tmp_path, rows, exact_duplicates=True)
    assert sorted(" ".join(t.lower().split()) for t in left) == [
        "a b",
        "a b c",
        "a b!",
        "x 1",
        "x 2",
    ]
    assert dropped(done) == {("exact duplicates", "duplicate"): 2}
    (tmp_path / "b").mkdir()
    order = run(tmp_path / "b", dict(reversed(rows.items())), exact_duplicates=True, files=1)[1]
    assert sorted(order) == sorted(left)


def test_decontamination(tmp_path):
    rows = {str(i): sentences(i) for i in range(10)}
    hidden = sentences(77).split()
    rows["13"] = "Some words " + " ".join(hidden[3:16]) + " and more"
    rows["12"] = "Some words " + " ".join(hidden[3:15]) + " and more"
    (tmp_path / "test.txt").write_text(f"{sentences(5)}\n{' '.join(hidden)}\n")
    done, left = run(tmp_path, rows, decontaminate=str(tmp_path / "test.txt"))
    assert set(rows.values()) - set(left) == {rows["5"], rows["13"]}
    assert dropped(done) == {("decontaminate", "contaminated"): 2}


def test_tokens_are_those_of_the_text(tmp_path):
    """Control tokens that a text spells out, truncation and padding of a file, 4 bytes a token."""
    tokenizer = tokenize.train("bpe", ["some text to learn from " * 9], 300)
    tokenizer.backend.enable_truncation(4)
    tokenizer.backend.enable_padding(length=8)
    wide = [f"<{i}>" for i in range(70_000)]
    tokenizer.backend.add_tokens(wide)
    tokenize.save(tokenizer, tmp_path / "tokenizer")
    rows = {"a": "Hello<|endoftext|> world, and more", "b": "some text to learn from"}
    done, left = run(tmp_path, rows, tokenizer=str(tmp_path / "tokenizer"))
    assert left == list(rows.values())
    found, ends = parts(done)
    assert set(ends) == {tokenizer.id("<|endoftext|>")} and not set(ends) & {*found[0], *found[1]}
    plain = tokenize.load(tmp_path / "tokenizer")
    assert found == [plain.encode(text, template=False) for text in rows.values()]
    assert (done / "train" / "00000.ds").stat().st_size == 4 * sum(len(row) + 1 for row in found)


@pytest.mark.parametrize("spec", ["words:60", "wordpiece:120", "unigram:60", "bpe:280"])
def test_tokenizers_that_are_trained(tmp_path, spec):
    rows = {str(i): sentences(i) for i in range(30)}
    done, left = run(tmp_path, rows, tokenizer=spec)
    told = json.loads((done / "tokenizer" / "tokens.json").read_text())
    assert told["vocab_size"] <= int(spec.split(":")[1]) and set(parts(done)[1]) == {
        told["end_token"]
    }
    assert len(left) == 30 and not any(told["end_token"] in row for row in parts(done)[0])


@pytest.mark.parametrize(
    "spec, end", [("bpe:300", "<end>"), ("words:60", "<end>"), ("unigram:60", "</s>")]
)
def test_the_end_token_counts_as_one_of_the_vocabulary(tmp_path, spec, end):
    rows = {str(i): sentences(i) for i in range(30)}
    done, left = run(tmp_path, rows, tokenizer=spec, end_token=end)
    made = tokenize.load(done / "tokenizer")
    assert made.vocab_size == int(spec.split(":")[1]) and left
    assert set(parts(done)[1]) == {made.id(end)}
    assert Shards(done / "train").vocab_size == made.vocab_size


def test_a_tokenizer_is_trained_on_the_beginning_of_long_documents(tmp_path, monkeypatch):
    """Equal shares of all: of 1000 and 9000 characters a fifth, where 2000 are enough."""
    monkeypatch.setattr(tokens, "_SAMPLE", 2000)
    rows = {"a": "ab cd " * 150 + "xy" * 50, "b": "ef gh " * 1400 + "zw" * 300}
    done, _ = run(tmp_path, rows, tokenizer="words:99")
    made = tokenize.load(done / "tokenizer")
    assert {"ab", "cd", "ef", "gh"} <= made.backend.get_vocab().keys()
    assert not any(set(word) & set("xyzw") for word in made.backend.get_vocab() if word.isalpha())


def test_a_folder_with_the_name_of_a_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenize.save(tokenize.train("bpe", ["text"], 300), "characters")
    rows = {"a": "text"}
    assert tokenize.load(run(Path("."), rows)[0] / "tokenizer").vocab_size == 3 + 1
    for told in ("./characters", Path("characters")):
        done, left = run(Path("."), rows, tokenizer=told)
        assert tokenize.load(done / "tokenizer").vocab_size > 256 and left == ["text"]


def bad(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.bin").write_text("text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 999)[:-9])
    packed = zstandard.ZstdCompressor().compress(os.urandom(99_999).hex().encode())
    (tmp_path / "cut.txt.zst").write_bytes(packed[:-99])
    (tmp_path / "noise.txt.bz2").write_bytes(b"no such thing")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "page.xml").write_text("<a><b></a>")
    (tmp_path / "empty").mkdir()
    tokenize.save(tokenize.characters(["a"]), tmp_path / "mute")
    return [
        ({"input": "nowhere"}, "nowhere: no such file"),
        ({"input": "empty"}, "the folder has no files"),
        ({"input": "a.bin"}, "no format is known for this ending: set format"),
        ({"input": "latin.txt"}, "latin.txt: not UTF-8"),
        ({"input": "cut.txt.gz"}, "cut.txt.gz: cannot be decompressed"),
        ({"input": "cut.txt.zst"}, "cut.txt.zst: cannot be decompressed: the last frame is cut"),
        ({"input": "noise.txt.bz2"}, "noise.txt.bz2: cannot be decompressed"),
        ({"clean": [{"web": {"x": 1}}]}, "clean: 'web' takes no options"),
        ({"clean": [["unicode"]]}, r"\['unicode'\] is neither a name nor {name: options}"),
        ({"clean": {"unicode": {}, "c4": {}}}, "clean: {'c4': {}, 'unicode': {}} is neither a"),
        ({"clean": [date(2024, 1, 2)]}, r"clean: datetime.date\(2024, 1, 2\) is neither a name"),
        ({"clean": [{"language": {"languages": "en"}}]}, "languages must be a list of strings or"),
        ({"clean": [{"private": {"kinds": "ip"}}]}, "kinds must be a list of strings or null, got"),
        ({"clean": [{"word_list": {"file": 3}}]}, "word_list: file must be a string, got 3"),
        ({"clean": [{"length": {"least": date(2024, 1, 2)}}]}, "length: least must be a number"),
        ({"clean": [{"gopher_quality": {"min_doc_words": "few"}}]}, "must be a number or null"),
        ({"clean": [{"gopher_repetition": {"top_n_grams": [2, 0.2]}}]}, "top_n_grams must be a li"),
        ({"clean": [{"c4": {"remove_citations": 1}}]}, "remove_citations must be true or false"),
        ({"clean": [{"unicode": {"normalization": "X"}}]}, "must be 'NFC' or 'NFD' or .* or null"),
        ({"clean": [{"fineweb": {"new_line_ratio": float("nan")}}]}, "must be a number, got nan"),
        ({"input": 2024}, "input must be a path or a list of paths, got 2024; it may need quotes"),
        ({"input": [2024]}, "input must be a string, got 2024; it may need quotes"),
        ({"decontaminate": [date(2024, 1, 2)]}, "decontaminate must be a string, got datetime"),
        ({"output": 2024}, "output must be a string, got 2024; it may need quotes"),
        ({"output": ""}, "output must not be empty"),
        ({"input": ""}, "input must not be empty"),
        ({"exact_duplicates": 1}, "exact_duplicates must be true or false, got 1"),
        ({"validation": date(2024, 1, 2)}, "validation must be a number"),
        ({"slurm": "cpu"}, "slurm must be a mapping of options, got 'cpu'"),
        ({"tokenizer": "bpe:10"}, "'bpe:10' needs a vocabulary of 257 to"),
        ({"tokenizer": "bpe:257", "end_token": "<end>"}, "'bpe:257' needs a vocabulary of 258 to"),
        ({"tokenizer": "words:2"}, "'words:2' needs a vocabulary of 3 to"),
        ({"tokenizer": "bpe:99999999999"}, "needs a vocabulary of 257 to 4294967296 tokens"),
        ({"tokenizer": "words"}, "needs the size of a vocabulary, .* a folder of this name is ./w"),
        ({"clean": [{"length": {"least": 5, "most": 2}}]}, "length: least and most must be"),
        ({"tokenizer": "bpe:\u00b2"}, "is not of the form kind:size"),
        ({"input": "blank.txt"}, "input: no documents in"),
        ({"input": "page.xml"}, "page.xml: no dump of MediaWiki"),
        ({"input": []}, "input must be a path or a list of paths, got none"),
        ({"input": ["a.txt", "a.txt"]}, "two files have the name a.txt"),
        ({"split": "word"}, "split must be one of file, line, paragraph, got 'word'"),
        ({"format": "csv"}, "format must be one of text, json, wiki"),
        ({"words": "spacy"}, "words must be one of whitespace, words"),
        ({"clean": ["gopher"]}, "clean: 'gopher' is not one of web, unicode"),
        ({"clean": [{"c4": {"min_sentences": 2}}]}, "c4: option 'min_sentences' is not one of"),
        ({"clean": [{"length": 3}]}, "length: options must be an object, got 3"),
        ({"clean": [{"language": {"languages": ["xx"]}}]}, "language: 'xx' is not one of"),
        ({"clean": [{"word_list": {"file": "none"}}]}, "word_list: .*No such file"),
        ({"clean": [{"private": {"kinds": ["name"]}}]}, "private: 'name' is not one of email"),
        ({"clean": 3}, "clean must be a list of steps, got 3"),
        ({"clean": [{"length": {"least": 99}}]}, "no document is left"),
        ({"near_duplicates": 1.5}, r"near_duplicates must lie in \[0.1, 1\], got 1.5"),
        ({"near_duplicates": True}, "near_duplicates must be a number"),
        ({"validation": 0.9}, r"validation must lie in \[0, 0.5\]"),
        ({"files": 0}, "files must lie in"),
        ({"files": 2.5}, "files must be an integer"),
        ({"decontaminate": "a.txt"}, "decontaminate: no text has 13 words"),
        ({"tokenizer": "bpe"}, "tokenizer: 'bpe' needs the size of a vocabulary"),
        ({"tokenizer": "bpe:x"}, "tokenizer: 'bpe:x' is not of the form kind:size"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"tokenizer": "mute"}, "no token has the role 'eos'"),
        ({"tokenizer": "mute", "end_token": "</s>"}, "'</s>' is no token"),
        ({"end_token": 5}, "end_token must be a string, got 5"),
    ]  # fmt: skip


def test_what_is_wrong_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    cases = bad(tmp_path)
    monkeypatch.chdir(tmp_path)
    for options, message in cases:
        with pytest.raises((ValueError, OSError), match=message) as raised:
            prepare(Recipe(**{"input": "a.txt", "output": "out", **options}))
        assert "\n" not in str(raised.value)
    a = Recipe(input="a.txt", output="out")
    with pytest.raises(ValueError, match="executor must be one of local, ray, slurm, got 'dask'"):
        prepare(a, executor="dask")
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        prepare(a, workers=0)
    for slurm, message in [
        (None, "slurm needs time, as in"),
        ({"time": "1:00:00"}, "slurm needs partition, as in"),
        ({"time": 7200, "partition": "cpu"}, "slurm: time must be a string, got 7200; it may need"),
        ({"workers": 3}, "slurm: option 'workers' is not one of condaenv, cpus_per_task, "),
        ({"depends": 3}, "slurm: option 'depends' is not one of"),
        ({"logging_dir": "x"}, "slurm: option 'logging_dir' is not one of"),
        ({"job_name": "x"}, "slurm: option 'job_name' is not one of"),
        ({"mem": 3}, "slurm: option 'mem' is not one of"),
        ({"sbatch_args": ["x"]}, "slurm: sbatch_args must be an object or null, got"),
        ({"cpus_per_task": "two"}, "slurm: cpus_per_task must be a number, got 'two'"),
    ]:
        told = Recipe(input="a.txt", output="none", slurm=slurm)
        with pytest.raises(ValueError, match=message):
            prepare(told, executor="slurm")
        assert not Path("none").exists()
    with pytest.raises(ValueError, match="no folder of prepared data"):
        steps(tmp_path)
    for options, _ in cases[:4]:
        assert main(["prepare", "out", "--input", options["input"]]) == 2
        error = capsys.readouterr().err
        assert error.startswith("tfkern: ") and error.count("\n") == 1, error


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("\n\n".join(sentences(i) for i in range(20)))
    Path("recipe.yaml").write_text(
        "input: a.txt\noutput: out\nclean: [unicode]\ntokenizer: bpe:300\n"
    )
    assert main(["prepare", "recipe.yaml", "validation=0", "clean=[{length: {most: 550}}]"]) == 0
    shown = capsys.readouterr().out
    folder = Path(shown.split()[-1])
    assert folder.parent == Path("out") and (folder / "report.png").exists()
    left = [sentences(i) for i in range(20) if len(sentences(i)) <= 550]
    assert texts(folder) == left and f"train: {len(left)} documents" in shown
    assert f"{20 - len(left)} long" in shown
    (folder / "report.png").unlink()
    assert main(["prepare", "--report", str(folder)]) == 0
    assert capsys.readouterr().out == shown and not (folder / "report.png").exists()
    (counts,) = folder.glob("logs/*_tokenizer/stats/00000.json")
    counts.write_text(counts.read_text()[:-9])
    for call, message in [
        (["prepare"], "a recipe (.yaml) or a folder to write to is needed"),
        (["prepare", "out", "inputs=a.txt"], "'inputs' is not one of input, output"),
        (["prepare", "out", "files"], "expected name=value, got 'files'"),
        (["prepare", "out"], "a recipe needs input"),
        (["prepare", "out", "clean=[a"], "clean: while parsing"),
        (["prepare", "none.yaml"], "none.yaml: No such file"),
        (["prepare", "--report", "."], ".: no folder of prepared data"),
        (["prepare", "--report", str(folder)], "stats/00000.json: Expecting"),
        (["prepare", "--report", ".", "--input", "a.txt"], "takes nothing beside it"),
        (["prepare", "--report", ".", "--executor", "ray"], "takes nothing beside it"),
        (["prepare", "out", "output=other"], "output is told twice: 'out' and 'other'"),
        (["prepare", "out", "input=b", "--input", "a"], "input is told twice: 'a' and 'b'"),
        (["prepare", "out", "input=2024"], "got 2024; it may need quotes"),
    ]:
        assert main(call) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_a_run_looks_nothing_up(tmp_path):
    """In a process that prints every look-up of a name."""
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(i) for i in range(20)))
    code = """
import sys
def audit(event, args):
    if event.startswith("socket.getaddrinfo") or event == "socket.connect":
        print(f"{event} {args}")
sys.addaudithook(audit)
from tfkern.data.prepare import Recipe, prepare
prepare(Recipe(input="a.txt", output="o", clean="web", near_duplicates=0.8), workers=1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_full_disk_is_one_line(tmp_path):
    rng = random.Random(0)
    noise = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz \n", k=400_000))
    (tmp_path / "a.txt").write_text(noise)
    code = """
import resource, signal, sys
from tfkern.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(["prepare", "out", "files=1", "--input", "a.txt"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 or done.returncode == 1, done.stderr
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path):
    """160 MB of text, one line of 60 MB among it, in 700 MB beyond what the imports take."""
    with open(tmp_path / "a.txt", "w") as file:
        for i in range(100):
            file.write("\n\n".join(sentences(i * 100 + j, 10) for j in range(100)) * 10 + "\n\n")
        file.write("word " * 12_000_000)
    code = """
import resource, sys
from tfkern.data.prepare import Recipe, prepare
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 700_000_000,) * 2)
prepare(Recipe(input="a.txt", output="o", tokenizer="characters", clean=[{"length": {"least": 2}}],
               exact_duplicates=True), workers=1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    """The program and all its workers are killed after ever longer times, until a run is done."""
    text = "\n\n".join(sentences(i % 900) for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    told = ["clean=[unicode, gopher_quality]", "near_duplicates=0.8", "--input", "a.txt"]
    call = [sys.executable, "-m", "tfkern.cli", "prepare"]
    subprocess.run([*call, "whole", *told], cwd=tmp_path, check=True, capture_output=True)
    kills, seconds, finished = 0, 3.0, False
    while not finished:
        program = subprocess.Popen(
            [*call, "killed", *told, "--workers", "2"], cwd=tmp_path, start_new_session=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            finished = program.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
            kills, seconds = kills + 1, seconds + 0.7
    (whole,), (killed,) = (list((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert kills >= 2 and killed.name == whole.name and shards(killed) == shards(whole)
    counts = [[{**row, "seconds": 0} for row in steps(d)] for d in (whole, killed)]
    assert counts[0] == counts[1]


@pytest.mark.slow
def test_slurm_runs_the_same(tmp_path):
    """With an sbatch that runs each job at once."""
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(i) for i in range(20)))
    programs = tmp_path / "bin"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text(
        "#!/bin/bash\nscript=${@: -1}\n"
        "last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $script)\n"
        "for i in $(seq 0 ${last:-0}); do\n"
        "  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here SLURM_JOB_ID=7 RUN_OFFSET=0 bash $script "
        ">> $0.log 2>&1 || exit 1\ndone\necho Submitted batch job 7\n"
    )
    (programs / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == -* || $1 == 1 ]]; do shift; done\n"$@"\n'
    )
    (programs / "scontrol").write_text("#!/bin/bash\necho here\n")
    for name in ("sbatch", "srun", "scontrol"):
        (programs / name).chmod(0o755)
    bins = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    told = {
        "input": str(tmp_path / "a.txt"),
        "files": 2,
        "tokenizer": "bpe:300",
        "clean": ["unicode"],
    }
    code = f"""
from tfkern.data.prepare import Recipe, prepare
told = Recipe(output="slurm", slurm={{"time": "1:00:00", "partition": "cpu"}}, **{told!r})
print(prepare(told, executor="slurm"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": bins},
    )  # fmt: skip
    log = Path(f"{sbatch}.log")
    assert done.returncode == 0, done.stderr[-2000:] + log.read_text()[-2000:]
    local = prepare(Recipe(output=str(tmp_path / "local"), **told), workers=1)
    assert shards(tmp_path / done.stdout.split()[-1]) == shards(local)


@pytest.mark.slow
def test_ray_runs_the_same(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(i) for i in range(40)))
    told = {"input": str(tmp_path / "a.txt"), "near_duplicates": 0.7, "tokenizer": "bpe:300"}
    local = prepare(Recipe(output=str(tmp_path / "local"), **told), workers=1)
    ray = prepare(Recipe(output=str(tmp_path / "ray"), **told), workers=2, executor="ray")
    assert shards(ray) == shards(local)


@pytest.mark.slow
def test_a_rank_that_fails_on_ray_ends_the_others(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    ray.shutdown()  # the workers of a new cluster have the folder of `killing`
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(killing.__file__), prepend=os.pathsep)
    ranks = execute._Ray(SimpleNamespace(folder=tmp_path), 2)
    path = tmp_path / "written"
    with pytest.raises(ValueError, match="^document 7 is wrong$"):
        ranks(Stage("failing", [killing.Fails(path)], 3), lambda *_: None)
    size = path.stat().st_size
    time.sleep(1)
    assert 0 < size == path.stat().st_size
    with pytest.raises(RuntimeError, match="^stage 'deadly': The worker died unexpec"):
        ranks(Stage("deadly", [killing.Killed()], 2), lambda *_: None)
    ray.shutdown()


def test_the_recipe_of_the_docs(tmp_path):
    """Its steps are those of "web", and exist."""
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    (tmp_path / "web.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    told = recipe.load(tmp_path / "web.yaml", files=64)
    assert told.files == 64 and told.near_duplicates == 0.7 and len(told.input) == 2
    named = [step.name for step in clean_steps(told.clean, told.words)]
    assert named == [step.name for step in clean_steps(["web"], told.words)] and len(named) == 7


def test_numbers_of_a_file_may_lack_a_point(tmp_path):
    """YAML 1.1 takes 5e-1 for a text."""
    path = tmp_path / "a.yaml"
    path.write_text("input: a\noutput: b\nnear_duplicates: 5e-1\n")
    assert recipe.load(path).near_duplicates == 0.5


def test_filters_of_a_step_are_made_with_the_words_of_the_recipe():
    made = clean_steps(["gopher_quality"], "words")[0]
    assert made.language == Words() and made.language != Whitespace()
