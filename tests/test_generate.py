"""Generation, against the same model read anew for every token."""

import pytest
import torch
from test_model import build, wake

from model import CachedAttention, sample

BOS = 299


def uncached(model, row, count):
    """The reference: for each token the whole row is read, by the forward pass that trains -> the new ids."""
    T, row, new = model.config.max_seq_len, list(row), []
    for _ in range(count):
        if len(row) > T:
            row = [BOS, *row[-(T // 2) :]]
        new.append(model(torch.tensor([row]))[0, -1].argmax().item())
        row.append(new[-1])
    return new


@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
def test_the_cache_changes_nothing(n_layer, length):
    model = wake(build(max_seq_len=16, n_layer=n_layer))
    rows = torch.randint(300, (3, length), generator=torch.Generator().manual_seed(0)).tolist()
    new = [*model.generate(rows, BOS, 40, temperature=0)]  # over the end of the context several times
    assert [list(row) for row in zip(*new)] == [uncached(model, row, 40) for row in rows]
    assert len(set(map(tuple, new))) > 10


def test_logits_read_token_by_token_are_those_of_the_forward_pass():
    model = wake(build())
    tokens = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0))
    caches = [CachedAttention(model.config, 2, torch.float32, "cpu") for _ in model.blocks]
    found = torch.stack([model.read(tokens[:, :end], caches) for end in (5, *range(6, 33))], dim=1)
    torch.testing.assert_close(found, model(tokens)[:, 4:], atol=1e-5, rtol=1e-5)


def test_the_seed_decides_and_so_do_its_rows():
    model, rows = wake(build()), [[BOS, 5, 6]] * 4
    first, same, other = ([*model.generate(rows, BOS, 20, seed=seed)] for seed in (1, 1, 2))
    assert first == same != other
    assert len(set(zip(*first))) == 4  # of one prompt four texts


def test_what_is_drawn_is_as_likely_as_it_should_be():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    logits, order = p.log()[None].expand(20_000, -1), torch.tensor([3, 0, 4, 1, 2])

    def drawn(temperature=1.0, top_k=0, top_p=1.0):
        generator = torch.Generator().manual_seed(0)
        ids = sample(logits[:, order], temperature, top_k, top_p, generator)
        return torch.bincount(order[ids], minlength=5) / len(ids)

    def share(values):
        return torch.tensor(values) / sum(values)

    for found, expected in (
        (drawn(), p),
        (drawn(temperature=0.5), share([0.16, 0.09, 0.0225, 0.01, 0.0025])),
        (drawn(top_k=3), share([0.4, 0.3, 0.15, 0, 0])),
        (drawn(top_k=99), p),
        (drawn(top_p=0.8), share([0.4, 0.3, 0.15, 0, 0])),  # 0.7 would be too few
        (drawn(top_k=4, top_p=0.7), share([0.4, 0.3, 0, 0, 0])),  # of the 0.95 that are left
        (drawn(top_p=1e-9), share([1.0, 0, 0, 0, 0])),
        (drawn(temperature=0), share([1.0, 0, 0, 0, 0])),
        (drawn(temperature=1e-30), share([1.0, 0, 0, 0, 0])),
    ):
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
        assert (found[expected == 0] == 0).all()
