"""The export's model in transformers: caches, padding, long rows, beams, training, against the GPT alone."""

import importlib
import shutil
import sys

import pytest
import torch
from conftest import REPO
from test_model import build, wake

transformers = pytest.importorskip("transformers")
BOS, T = 299, 16
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": BOS}
CACHE = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An OnedialForCausalLM with random weights and a row length of 16."""
    folder = tmp_path_factory.mktemp("package") / "taken"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for file in (REPO / "model.py", REPO / "export" / "modeling_onedial.py"):
        shutil.copy(file, folder)
    sys.path.insert(0, str(folder.parent))
    try:
        taken = importlib.import_module("taken.modeling_onedial")
    finally:
        sys.path.pop(0)
    gpt = wake(build(max_seq_len=T, n_layer=3))
    config = taken.OnedialConfig(vars(gpt.config), bos_token_id=BOS)
    model = taken.OnedialForCausalLM(config).eval()
    model.gpt.load_state_dict(gpt.state_dict())
    return model


def random_rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(BOS, (length,), generator=generator).tolist() for length in lengths]


def padded(rows, left=True, more=0):
    """Rows of ids -> (input_ids, attention_mask), padded to the longest of them and `more`."""
    width = max(map(len, rows)) + more
    ids, mask = torch.full((len(rows), width), BOS), torch.zeros(len(rows), width, dtype=torch.int64)
    for n, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, place], mask[n, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def ours(model, row, count):
    """The greedy continuation by GPT.generate, which sample.py uses."""
    return [new[0] for new in model.gpt.generate([row], BOS, count, temperature=0)]


def theirs(model, inputs, count, **options):
    width = inputs["input_ids"].size(1)
    return model.generate(**inputs, max_new_tokens=count, **GREEDY, **options)[:, width:].tolist()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_greedy_tokens_are_those_of_sample_py_also_beyond_max_seq_len(model, length):
    rows = random_rows(length, length)
    found = theirs(model, {"input_ids": torch.tensor(rows)}, 30)
    assert found == [ours(model, row, 30) for row in rows]
    assert len(set(found[0])) > 5


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("lengths", [(3, 9, 1), (16, 4, 12), (20, 5, 31, 17)])
def test_padding_changes_no_token(model, lengths, left):
    """Each row is cut when it is too long itself: some are cut here, and each at another token."""
    rows = random_rows(*lengths)
    assert theirs(model, padded(rows, left, more=2), 30) == [ours(model, row, 30) for row in rows]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("left", [True, False])
def test_logits_in_a_padded_batch_are_those_of_each_row(model, left, dtype, tolerance, use_cache):
    if use_cache and not left:
        return  # refused, see below
    rows = random_rows(3, 16, 9)
    try:
        model.to(dtype)
        inputs = padded(rows, left)
        results = model(**inputs, use_cache=use_cache).logits
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
    finally:
        model.float()
    for result, mask, expected in zip(results, inputs["attention_mask"].bool(), alone):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result[mask], expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(alone[1], model.gpt(torch.tensor([rows[1]]))[0], atol=tolerance, rtol=0)


def test_beams_are_the_same_with_and_without_a_cache(model):
    inputs = padded(random_rows(3, 6))
    for options in ({}, {"num_return_sequences": 3}):
        found, expected = (
            theirs(model, inputs, 8, num_beams=3, use_cache=c, **options) for c in (True, False)
        )
        assert found == expected
    assert found != theirs(model, inputs, 8)


def test_a_cache_can_be_handed_in(model):
    """A second turn of a chat, pieces of several tokens, and tokens that are taken back."""
    rows = torch.tensor(random_rows(12, 12))
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        turn = model.generate(rows[:, :3], max_new_tokens=4, **{CACHE: cache}, **GREEDY)
        assert cache.get_seq_length() == 6
        both = torch.cat([turn, rows[:, :3]], dim=1)
        found = model.generate(both, max_new_tokens=20, **{CACHE: cache}, **GREEDY)  # and it gets too long
        assert found.tolist() == model.generate(both, max_new_tokens=20, **GREEDY).tolist()
        assert cache.get_seq_length() == 29
    cache = transformers.DynamicCache()
    pieces = [model(rows[:, a:b], **{CACHE: cache}).logits for a, b in ((0, 5), (5, 6), (6, 10))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(rows[:, :10]).logits, atol=1e-5, rtol=0)
    cache.crop(-3)
    last = model(rows[:, 7:], **{CACHE: cache}, logits_to_keep=1).logits
    torch.testing.assert_close(last, model(rows).logits[:, -1:], atol=1e-5, rtol=0)
    found = model.generate(rows[:1], max_new_tokens=4, prompt_lookup_num_tokens=2, **GREEDY)
    assert found[0, 12:].tolist() == ours(model, rows[0].tolist(), 4)


def test_what_cannot_work_is_refused_with_a_reason(model):
    row = torch.tensor(random_rows(5))
    long = torch.tensor(random_rows(T + 1))
    foreign = transformers.DynamicCache()
    foreign.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    cases = {
        "StaticCache is not supported": lambda: theirs(
            model, {"input_ids": row}, 3, cache_implementation="static"
        ),
        "another model has filled": lambda: model(row, **{CACHE: foreign}),
        "output_attentions is not supported": lambda: model(row, output_attentions=True),
        "position_ids is not supported": lambda: model(row, position_ids=torch.arange(5)[None]),
        "inputs_embeds is not supported": lambda: model.generate(
            inputs_embeds=torch.zeros(1, 3, 32), **GREEDY
        ),
        "4 dimensions": lambda: model(row, attention_mask=torch.ones(1, 1, 5, 5)),
        "17 tokens are more": lambda: model(long),
        "a row has more than 16 tokens": lambda: model(long, use_cache=True),
        "or padding after a token": lambda: model(**padded(random_rows(2, 5), left=False), use_cache=True),
    }
    for message, action in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            action()
        assert str(error.value).count("\n") == 1


def test_the_loss_and_its_gradients(model):
    rows = torch.tensor(random_rows(12, 12))
    labels = rows.clone()
    labels[0, :7] = labels[1, :1] = -100
    loss = model(rows, labels=labels).loss
    targets = labels[:, 1:].masked_fill(labels[:, 1:] < 0, -1)
    loss_sum, count = model.gpt(rows[:, :-1], targets), int((targets >= 0).sum())
    torch.testing.assert_close(loss, loss_sum / count)
    # the Trainer's way to average over several micro-batches
    torch.testing.assert_close(model(rows, labels=labels, num_items_in_batch=40).loss, loss_sum / 40)
    expected = torch.autograd.grad(loss, [*model.parameters()])
    inputs = padded(rows.tolist(), more=2)  # with padding on the left the blocks read through a cache
    loss = model(**inputs, labels=torch.nn.functional.pad(labels, (2, 0), value=-100)).loss
    for found, gradient in zip(torch.autograd.grad(loss, [*model.parameters()]), expected):
        torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-3)
