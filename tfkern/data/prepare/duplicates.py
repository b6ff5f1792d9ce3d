"""Removes documents that others repeat: word by word, nearly, or from texts that must not be seen.

Which of several stays depends on their ids alone, not on the order in which they are read.
"""

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
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

# Texts that differ in numbers only are not the same: tables, laws, results of matches.
_NORMAL = TextNormConfig(norm_numbers=False)
_HASHES = 128  # of a signature
_CONTAMINATED = NGramsDecontConfig(n_grams=13, find_query_ngrams=False, norm_config=_NORMAL)


def content(document: Document) -> str:
    """What equal documents have in common: the words, whatever their case."""
    return " ".join(document.text.split()).lower()


def priority(document: Document) -> int:
    """An order of documents that has nothing to do with where they stand."""
    return 1 + xxhash.xxh64_intdigest(document.id) % 65535


def exact(source: Path, work: Path, target: Path, files: int) -> list[Stage]:
    """Stages that leave one of several documents with the same words."""
    config = ExactDedupConfig(content_getter=content, document_priority=priority)
    signatures, found = str(work / "signatures"), str(work / "found")
    signing = named(ExactDedupSignature(signatures, config), "exact signatures")
    dropping = named(ExactDedupFilter(found, config), "exact duplicates")
    return [
        Stage("exact signatures", [Read(source), signing], files),
        Stage("exact search", [ExactFindDedups(signatures, found, config)], 1),
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


class Keep(PipelineStep):
    """Chooses which documents of the clusters stay, and writes the numbers of the others.

    It takes the documents of a cluster in the order of a hash of their ids, and keeps each that is
    less similar than the threshold to all that it has kept.
    """

    type, name = "dedup", "keep"

    def __init__(
        self, source: Path, clusters: str, files: int, words: str, threshold: float, n: int
    ) -> None:
        super().__init__()
        self.source, self.clusters, self.files = str(source), clusters, files
        self.words, self.threshold, self.n = TOKENIZERS[words](), threshold, n

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self.track_time("run"):
            members = self._members()
            drop: dict[int, list[int]] = defaultdict(list)
            for documents in members.values():
                kept: list[frozenset[int]] = []
                for _, _, file, number, grams in sorted(documents, key=lambda d: d[:4]):
                    if any(_similar(grams, other, self.threshold) for other in kept):
                        drop[file].append(number)
                    else:
                        kept.append(grams)
            Path(self.clusters).mkdir(exist_ok=True)  # without candidates there is none
            for file in range(self.files):
                content = struct.pack(f"<{len(drop[file])}I", *sorted(drop[file]))
                (Path(self.clusters) / f"{file:06d}.remove").write_bytes(content)
        yield from ()

    def _members(self) -> dict[int, list[tuple[int, str, int, int, frozenset[int]]]]:
        """The documents of each cluster: hash of the id, id, file, number, sequences of words."""
        members: dict[int, list[Any]] = defaultdict(list)
        for file in range(self.files):
            path = Path(self.clusters) / f"{file:06d}.clusters"
            if not path.is_file():
                continue
            cluster = dict(struct.iter_unpack("<2I", path.read_bytes()))
            for number, document in enumerate(read(file_of(self.source, file))):
                if number in cluster:
                    name = document.id
                    entry = (xxhash.xxh64_intdigest(name), name, file, number)
                    members[cluster[number]].append((*entry, self._grams(document.text)))
        return members

    def _grams(self, text: str) -> frozenset[int]:
        words = self.words.word_tokenize(simplify_text(text, _NORMAL))
        return frozenset(xxhash.xxh64_intdigest(" ".join(g)) for g in ngrams(words, self.n))


def _similar(a: frozenset[int], b: frozenset[int], threshold: float) -> bool:
    common = len(a & b)
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
