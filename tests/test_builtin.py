"""The core's own stages: the paper's requester, two that cannot ask, and the injectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ipn_core.builtin.injectors import TokenInjector, TokenInjectorConfig, WordLookup
from ipn_core.builtin.requesters import Constant, HiddenState, HiddenStateConfig, Shuffled
from ipn_core.stages import Dims, InjectContext, RequestContext, VisualMessage
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
    for among_words in ({"start": "words"}, {"lookup": 30.0}):
        config = TokenInjectorConfig(**among_words)
        reasons = TokenInjector.not_supported_reasons(config, replace(dims, Dm=4))
        assert any("its width is 4, not 64" in reason for reason in reasons)


def test_a_message_near_a_word_is_handed_on_as_that_word() -> None:
    torch.manual_seed(0)
    words = torch.randn(500, 64) * torch.rand(500, 1).exp() + 3
    lookup = WordLookup(64, 30.0)
    mean = words.mean(0)
    lookup.begin(mean, (words - mean).norm(dim=1))
    directions = torch.nn.functional.normalize(words - mean, dim=1)
    noise = torch.nn.functional.normalize(torch.randn(500, 64), dim=1)
    messages = (7 * (directions + 0.8 * noise)).unsqueeze(0).requires_grad_()
    found = lookup(messages, words)
    like = torch.nn.functional.cosine_similarity
    assert like(messages[0], directions).mean() < 0.85
    assert like(found[0], directions).mean() > 0.98
    # By hand, for one message: attention over centred words, of the words themselves.
    weights = (30 * torch.nn.functional.normalize(messages[0, 7], dim=0) @ directions.T).softmax(0)
    by_hand = torch.nn.functional.normalize(weights @ words - mean, dim=0)
    torch.testing.assert_close(found[0, 7], by_hand, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert messages.grad is not None
    assert messages.grad.abs().sum() > 0


def test_the_injector_looks_messages_up_before_it_projects_them() -> None:
    torch.manual_seed(0)
    words = torch.randn(50, 64)
    dims = replace(DIMS, D_in=64, Dm=64, M=DIMS.K)
    injector = TokenInjector(TokenInjectorConfig(start="words", lookup=30.0), dims)
    injector.begin(words)
    assert injector.lookup is not None
    slots, values = torch.randn(DIMS.K, 64), torch.randn(2, DIMS.K, 64)
    tokens = injector(VisualMessage(values), InjectContext(slots, words=words)).tokens
    assert torch.equal(tokens, injector.project(injector.lookup(values, words)) + slots)
    assert not any("lookup" in name for name in injector.state_dict())
    with pytest.raises(ValueError, match="words is needed"):
        injector(VisualMessage(values), InjectContext(slots))
