"""Removes documents that others repeat: word by word, nearly, or from texts that must not be seen.

Which of several stays depends on their ids and texts alone, not on the order in which they are
read. The comparisons write for each file of documents the numbers of those that go, in the form
that datatrove's MinhashDedupFilter reads.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import TextNormConfig, ngrams, simplify_text

from tfkern.data.prepare.stage import Stage, named
from tfkern.data.prepare.storage import Read, Write, file_of, read
from tfkern.data.prepare.words import TOKENIZERS
from tfkern.files import write

# Texts that differ in numbers only are not the same: tables, laws, results of matches.
_NORMAL = TextNormConfig(norm_numbers=False)
_HASHES = 128  # of a signature
_CONTAMINATED = NGramsDecontConfig(n_grams=13, find_query_ngrams=False, norm_config=_NORMAL)
_PRECEDENCE = ("text", "id")  # of which the last decides first
_FIELDS = [(name, "<u8") for name in ("id", "text", "file", "number")]  # of a document
_SIGNATURE = np.dtype([("words", "<u8"), *_FIELDS])
_MEMBER = np.dtype([("cluster", "<u8"), *_FIELDS, ("start", "<u8"), ("end", "<u8")])


def exact(source: Path, work: Path, target: Path, files: int) -> list[Stage]:
    """Stages that leave one of several documents with the same words, whatever their case."""
    dropping = named(MinhashDedupFilter(str(work)), "exact duplicates")
    return [
        Stage("exact signatures", [Read(source), Sign(work)], files),
        Stage("exact search", [Search(work, files)], 1),
        Stage("exact removal", [Read(source), dropping, Write(target)], files),
    ]


def near(
    source: Path, work: Path, target: Path, files: int, threshold: float, words: str
) -> list[Stage]:
    """Stages that leave one of several documents that share most sequences of five words.

    Candidates come from MinHash (Broder 1997) in bands, and are then compared exactly: a document
    is dropped only beside one that stays and whose Jaccard similarity is at least the threshold.
    """
    tokenizer = TOKENIZERS[words]()
    rows = rows_of(threshold)
    config = MinhashConfig(num_buckets=_HASHES // rows, hashes_per_bucket=rows, norm_config=_NORMAL)
    signatures, pairs, clusters = (str(work / name) for name in ("signatures", "pairs", "clusters"))
    signing = named(MinhashDedupSignature(signatures, config, tokenizer), "near signatures")  # type: ignore[arg-type]
    keeping = Keep(source, clusters, files, words, threshold, config.n_grams)
    dropping = named(MinhashDedupFilter(clusters), "near duplicates")
    bands = MinhashDedupBuckets(signatures, pairs, config=config)
    joining = MinhashDedupCluster(pairs, clusters, config, save_cluster_id=True)
    return [
        Stage("near signatures", [Read(source), signing], files),
        Stage("near candidates", [bands], config.num_buckets),
        Stage("near clusters", [joining], 1),
        Stage("near comparison", [keeping], 1),
        Stage("near removal", [Read(source), dropping, Write(target)], files),
    ]


def rows_of(threshold: float) -> int:
    """Hashes of a band: as many as still find 19 of 20 pairs at the threshold."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (_HASHES // rows) >= 0.95:
            return rows
    return 1


class Sign(PipelineStep):
    """Writes the signatures of a rank's documents, sorted."""

    type, name = "dedup", "exact signatures"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        found = array("Q")
        for number, document in enumerate(data):
            with self.track_time():
                words = xxhash.xxh64_intdigest(" ".join(document.text.split()).lower())
                found.extend((words, *_fields(document, rank, number)))
            self.stat_update("total")
        signatures = np.array(found, "<u8").view(_SIGNATURE)
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        write(_signatures(self.folder, rank), signatures[signatures["words"].argsort()].tobytes())
        yield from ()


class Search(PipelineStep):
    """Finds the documents with the same words by their signatures, and drops all but the first.

    It has one part of the range of hashes in memory at a time.
    """

    type, name = "dedup", "exact search"

    def __init__(self, folder: Path, files: int) -> None:
        super().__init__()
        self.folder, self.files = str(folder), files

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        paths = [_signatures(self.folder, file) for file in range(self.files)]
        limits = np.array([(i << 64) // self.files for i in range(1, self.files)], "<u8")
        dropped = []
        with self.track_time("run"):
            cuts = [_cuts(path, limits) for path in paths]
            for part in range(self.files):
                rows = np.concatenate([
                    np.fromfile(path, _SIGNATURE, cut[part + 1] - cut[part],
                                offset=cut[part] * _SIGNATURE.itemsize)
                    for path, cut in zip(paths, cuts, strict=True)
                ])  # fmt: skip
                rows = rows[np.lexsort([rows[name] for name in (*_PRECEDENCE, "words")])]
                again = rows[1:][rows["words"][1:] == rows["words"][:-1]]
                dropped.append(np.stack([again["file"], again["number"]], 1))
            _drop(self.folder, self.files, np.concatenate(dropped))
        yield from ()


class Keep(PipelineStep):
    """Chooses which documents of the clusters stay, and writes the numbers of the others.

    It takes the documents of a cluster in the order of a hash of their ids, and keeps each that is
    less similar than the threshold to all that it has kept. The sequences of words of all of them
    are on disk, since memory may not hold them.
    """

    type, name = "dedup", "keep"

    def __init__(
        self, source: Path, clusters: str, files: int, words: str, threshold: float, n: int
    ) -> None:
        super().__init__()
        self.source, self.clusters, self.files = str(source), clusters, files
        self.words, self.threshold, self.n = TOKENIZERS[words](), threshold, n

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        Path(self.clusters).mkdir(exist_ok=True)  # without candidates there is none
        with self.track_time("run"), tempfile.TemporaryFile(dir=self.clusters) as grams:
            members = np.concatenate([self._members(file, grams) for file in range(self.files)])
            _drop(self.clusters, self.files, self._dropped(members, grams))
        yield from ()

    def _members(self, file: int, grams: IO[bytes]) -> np.ndarray:
        """The documents of a file that are in clusters. Their sequences of words go to `grams`."""
        found = array("Q")
        path = Path(self.clusters) / f"{file:06d}.clusters"
        cluster = dict(np.fromfile(path, "<u4").reshape(-1, 2).tolist()) if path.exists() else {}
        for number, document in enumerate(read(file_of(self.source, file)) if cluster else ()):
            if number in cluster:
                start = grams.tell() // 8
                grams.write(self._grams(document.text).tobytes())
                fields = _fields(document, file, number)
                found.extend((cluster[number], *fields, start, grams.tell() // 8))
        return np.array(found, "<u8").view(_MEMBER)

    def _dropped(self, members: np.ndarray, grams: IO[bytes]) -> np.ndarray:
        """Files and numbers (n, 2) of the documents that go."""
        grams.flush()  # nothing cannot be mapped
        all_grams = np.asarray(np.memmap(grams, "<u8", "r")) if len(members) else np.array([])
        dropped = array("Q")
        now, kept = -1, list[np.ndarray]()
        for i in np.lexsort([members[name] for name in (*_PRECEDENCE, "cluster")]):
            cluster, _, _, file, number, start, end = members[i].tolist()
            if cluster != now:
                now, kept = cluster, []
            own = all_grams[start:end]
            if any(_similar(own, other, self.threshold) for other in kept):
                dropped.extend((file, number))
            else:
                kept.append(own)
        return np.array(dropped, "<u8").reshape(-1, 2)

    def _grams(self, text: str) -> np.ndarray:
        """Hashes of the sequences of words, each once, in order."""
        words = self.words.word_tokenize(simplify_text(text, _NORMAL))
        found = {xxhash.xxh64_intdigest(" ".join(g)) for g in ngrams(words, self.n)}
        return np.array(sorted(found), "<u8")


def _fields(document: Document, file: int, number: int) -> tuple[int, int, int, int]:
    """What decides whether a document stays, the smallest does, and where it stands.

    Ids may repeat; documents with the same id and the same text are one and the same.
    """
    name, text = xxhash.xxh64_intdigest(document.id), xxhash.xxh64_intdigest(document.text)
    return name, text, file, number


def _signatures(folder: str, file: int) -> Path:
    return Path(folder) / f"{file:06d}.signatures"


def _cuts(path: Path, limits: np.ndarray) -> list[int]:
    """Where the parts of a sorted file of signatures begin and end."""
    words = np.fromfile(path, _SIGNATURE)["words"]
    return [0, *np.searchsorted(words, limits).tolist(), len(words)]


def _drop(folder: str, files: int, dropped: np.ndarray) -> None:
    """Writes the numbers of those documents of each file that go, given by file and number."""
    for file in range(files):
        numbers = np.sort(dropped[dropped[:, 0] == file, 1]).astype("<u4")
        write(Path(folder) / f"{file:06d}.remove", numbers.tobytes())


def _similar(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common >= threshold * (len(a) + len(b) - common)


def index(texts: Iterable[str], folder: Path, words: str) -> int:
    """Writes the sequences of 13 words that texts have, for `contaminated`, and returns how many.

    Raises:
        ValueError: no text has 13 words.
    """
    hashed = create_hash_func(_CONTAMINATED.hash_config)
    tokenizer = TOKENIZERS[words]()
    found = {
        hashed(" ".join(gram))  # type: ignore[arg-type]
        for text in texts
        for gram in ngrams(
            tokenizer.word_tokenize(simplify_text(text, _NORMAL)), _CONTAMINATED.n_grams
        )
    }
    if not found:
        raise ValueError("decontaminate: no text has 13 words")
    folder.mkdir(parents=True, exist_ok=True)
    np.array(sorted(found), _CONTAMINATED.hash_config.np_descr).tofile(
        folder / "texts.index.hashes"
    )
    return len(found)


def contaminated(folder: Path, words: str) -> Any:
    """The filter that drops documents with one of these sequences (Brown et al. 2020)."""
    tokenizer: Any = TOKENIZERS[words]()
    return named(
        NGramsDecontFilter(str(folder), _CONTAMINATED, language=tokenizer), "decontaminate"
    )
