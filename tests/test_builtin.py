"""The core's own stages: the paper's requester, two that cannot ask, and the injectors."""

from __future__ import annotations

from dataclasses import replace

import torch

from ipn_core.builtin.injectors import TokenInjector, TokenInjectorConfig
from ipn_core.builtin.requesters import Constant, HiddenState, HiddenStateConfig, Shuffled
from ipn_core.stages import Dims, RequestContext
from ipn_core.testing.contracts import InjectorContract, RequesterContract


class TestHiddenState(RequesterContract):
    name = "hidden-state"


class TestConstant(RequesterContract):
    name = "constant"


class TestShuffled(RequesterContract):
    name = "shuffled"
    borrows = True


class TestTokenInjector(InjectorContract):
    name = "tokens"


class TestTokenInjectorWithoutNorm(InjectorContract):
    name = "tokens"
    options = {"norm": False}  # noqa: RUF012 as declared


class TestPrefixKV(InjectorContract):
    name = "prefix-kv"
    options = {"hidden": 8}  # noqa: RUF012 as declared


class TestCrossLayers(InjectorContract):
    name = "layers"
    options = {"every": 1, "heads": 2, "head_width": 4}  # noqa: RUF012 as declared


class TestTokenInjectorWithAnMLP(InjectorContract):
    name = "tokens"
    options = {"hidden": 8}  # noqa: RUF012 as declared


DIMS = Dims(Dv=4, D_in=6, D_hidden=(6, 6, 6), D_out=6, R=2, K=3)


def context(*questions: int) -> RequestContext:
    """Requests of questions by number, equal numbers the same but for rounding."""
    torch.manual_seed(0)
    known = torch.randn(10, DIMS.R, 6)
    hidden = known[list(questions)]
    return RequestContext(hidden + 1e-7 * torch.randn_like(hidden), range(len(questions)))


def test_hidden_state_passes_on_what_it_reads() -> None:
    given = context(0, 1)
    assert torch.equal(HiddenState(HiddenStateConfig(), DIMS)(given).values, given.hidden)


def test_constant_asks_the_same_whatever_the_question() -> None:
    requester = Constant(HiddenStateConfig(), DIMS)
    request = requester(context(0, 1, 2)).values
    assert torch.equal(request, requester.value.expand(3, -1, -1))


def test_shuffled_borrows_from_the_next_sample_that_asks_something_else() -> None:
    given = context(0, 0, 1, 2, 2, 0)
    request = Shuffled(HiddenStateConfig(), DIMS)(given).values
    assert torch.equal(request, given.hidden[[2, 2, 3, 5, 5, 2]])


def test_shuffled_keeps_the_request_where_all_ask_the_same() -> None:
    given = context(3, 3, 3)
    assert torch.equal(Shuffled(HiddenStateConfig(), DIMS)(given).values, given.hidden)
    alone = context(4)
    assert torch.equal(Shuffled(HiddenStateConfig(), DIMS)(alone).values, alone.hidden)


def test_an_injection_may_start_at_the_words_that_messages_point_at() -> None:
    torch.manual_seed(0)
    words = torch.randn(50, 64) + 3
    dims = replace(DIMS, D_in=64, Dm=64, M=DIMS.K)
    for norm, hidden in ((True, 0), (False, 8)):
        injector = TokenInjector(TokenInjectorConfig(start="words", norm=norm, hidden=hidden), dims)
        injector.begin(words)
        centred = words - words.mean(0)
        found = injector.project(torch.nn.functional.normalize(centred, dim=1))
        like = torch.nn.functional.cosine_similarity(found - words.mean(0), centred)
        assert like.min() > 0.95
        assert 0.7 < (found - words.mean(0)).norm(dim=1).mean() / centred.norm(dim=1).mean() < 1.3
    plain = TokenInjector(TokenInjectorConfig(), dims)
    before = plain.linear.weight.clone()
    plain.begin(words)
    assert torch.equal(plain.linear.weight, before)
    reasons = TokenInjector.not_supported_reasons(
        TokenInjectorConfig(start="words"), replace(dims, Dm=4)
    )
    assert any("its width is 4, not 64" in reason for reason in reasons)
