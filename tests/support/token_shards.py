"""Token shards as datatrove writes them."""

import json

import numpy as np

END = 0


def write(folder, shards, dtype="<u2", tokenizer="some.json", told=True):
    """Shards of lists of documents, byte for byte as datatrove writes them."""
    folder.mkdir(exist_ok=True)
    for i, documents in enumerate(shards):
        path = folder / f"{i:05d}_unshuffled.ds"
        flat = [token for document in documents for token in document]
        path.write_bytes(np.array(flat, dtype).tobytes())
        ends = np.cumsum([len(d) for d in documents]).astype("<u8")
        (folder / f"{path.name}.index").write_bytes(ends.tobytes())
        size = np.dtype(dtype).itemsize
        (folder / f"{path.name}.metadata").write_text(f"{tokenizer}|{size}\n{len(flat)}\n1 KT")
    if told:
        facts = {"vocab_size": 100_000, "end_token": END, "tokenizer": tokenizer}
        (folder / "tokens.json").write_text(json.dumps(facts))
    return folder
