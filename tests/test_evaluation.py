from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipn_core import IPN, Example, Picture, hookimpl
from ipn_core.errors import DataError, GenerationOptionError, UserError
from ipn_core.evaluation.choosing import choose_questions
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.evaluation.pictures import PictureCache
from ipn_core.evaluation.scoring import guess, matches, normalise
from ipn_core.evaluation.shuffled import draw_partners
from ipn_core.evaluation.statistics import wilson
from ipn_core.features import VisualFeatures
from ipn_core.stages import PerceiveContext, Request, RequestContext
from ipn_core.testing.checkpoints import register_tiny, tiny_config
from ipn_core.testing.tiny import TinyEncoder, tiny_backbone

torch.set_num_threads(1)


def picture(index: int, width: int = 24) -> Picture:
    pixels = np.random.default_rng(index).integers(0, 255, (24, width, 3), dtype=np.uint8)
    return Picture(f"picture {index}", lambda: Image.fromarray(pixels))


def split(questions: int = 5, pictures: int = 3) -> list[Example]:
    shown = [picture(i, 24 * (1 + i % 2)) for i in range(pictures)]
    return [
        Example(f"Is it {'more ' * q}{q}?", ("yes", "Yep"), (shown[p],), f"type {q % 2}")
        for p in range(pictures)
        for q in range(questions)
    ]


def build(strategy: str = "tiny-look", **more: object) -> IPN:
    register_tiny()
    torch.manual_seed(0)
    return IPN.from_config(tiny_config(strategy, **more), backbone=tiny_backbone(), name="tiny")


@pytest.fixture(scope="module")
def model() -> IPN:
    return build()


class Recorder:
    """What each question asked, and with which result of the requester."""

    def __init__(self) -> None:
        self.asked: list[torch.Tensor] = []

    @hookimpl(wrapper=True, tryfirst=True)
    def interact(
        self, request: Request, features: VisualFeatures
    ) -> Generator[None, object, object]:
        self.asked.extend(request.values)
        return (yield)


# -- scoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dog.", "dog"),
        ("  “Dog!”\n", "dog"),
        ("(two dogs)", "two dogs"),
        ("-5", "-5"),
        ("– 5", "5"),
        ("don't", "don't"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("?", "?"),
        ("", ""),
        ("e\u0301", "\u00e9"),
    ],
)
def test_normalise_folds_case_and_strips_surrounding_punctuation(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_a_match_needs_the_whole_answer() -> None:
    assert matches("Two.", ["2", "two"])
    assert not matches("two dogs", ["two"])
    assert not matches("the dog", ["dog"])
    assert not matches("!", ["?"])
    assert not matches("", ["two"])


def test_the_guess_is_the_answer_that_most_questions_accept() -> None:
    found = guess([("yes",), ("no",), ("No.",), ("maybe", "NO")])
    assert (found.answer, found.accuracy) == ("no", 0.75)


# -- evaluation --------------------------------------------------------------------------------


def test_every_example_is_answered_as_on_its_own_whatever_the_batch(model: IPN) -> None:
    examples = split()
    alone = [
        model.ask([p.load() for p in e.images], e.question, max_new_tokens=8).text for e in examples
    ]
    for batch_size in (1, 4, 64):
        report = evaluate(model, examples, batch_size=batch_size)
        assert [p.text for p in report.predictions] == alone
        assert [p.example for p in report.predictions] == examples


def test_the_report_counts_by_type_and_in_all(model: IPN) -> None:
    examples = split()
    said = evaluate(model, examples, max_new_tokens=8).predictions
    # The answers of the first three become right ones.
    graded = [
        Example(e.question, (f"  {p.text.upper()}. ",) if i < 3 else ("never",), e.images, e.type)
        for i, (e, p) in enumerate(zip(examples, said, strict=True))
    ]
    report = evaluate(model, graded, task="t", split="s", max_new_tokens=8).to_json()
    assert list(report) == ["task", "split", "n", "accuracy", "ci95", "by_type", "seconds"]
    assert (report["task"], report["split"], report["n"]) == ("t", "s", 15)
    assert report["ci95"] == list(wilson(round(report["accuracy"] * 15), 15))
    types = report["by_type"]
    assert {t: row["n"] for t, row in types.items()} == {"type 0": 9, "type 1": 6}
    right = sum(row["accuracy"] * row["n"] for row in types.values())
    assert right == pytest.approx(report["accuracy"] * 15)
    assert right >= 3
    assert json.loads(json.dumps(report)) == report


def test_each_picture_is_perceived_once(model: IPN) -> None:
    assert isinstance(model.encoder, TinyEncoder)
    before = model.encoder.encoded
    report = evaluate(model, split(), batch_size=4)
    assert model.encoder.encoded - before == report.pictures == 3


def test_pictures_that_do_not_fit_into_memory_are_still_perceived_once(
    model: IPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = split()
    expected = [p.text for p in evaluate(model, examples).predictions]
    monkeypatch.setattr("ipn_core.evaluation.pictures.MAX_BYTES", 2000)
    report = evaluate(model, examples, batch_size=4)
    assert report.pictures == 3
    assert [p.text for p in report.predictions] == expected


def test_features_from_the_cache_can_look_again(model: IPN) -> None:
    features = PictureCache(model).features(split(1, 2))
    assert features.look([(1, 0.0, 0.0, 0.5, 1.0)]).images[0].sample == 1


def test_crops_are_encoded_once_and_held_until_there_are_too_many(
    model: IPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = PictureCache(model)
    examples = split(2, 2)
    features = pictures.features(examples)
    boxes = [(image, x / 2, 0.0, (x + 1) / 2, 1.0) for image in range(4) for x in (0, 1)]
    before = model.encoder.encoded
    seen = features.look(boxes)
    assert model.encoder.encoded - before == 4  # of two pictures, each asked about twice
    images = [[p.load() for p in e.images] for e in examples]
    whole = model.encoder(PerceiveContext(images, [""] * 4)).features.look(boxes)
    torch.testing.assert_close(seen.values, whole.values)
    assert seen.images == whole.images
    before = model.encoder.encoded
    assert torch.equal(pictures.features(examples).look(boxes).values, seen.values)
    assert model.encoder.encoded == before
    monkeypatch.setattr("ipn_core.evaluation.pictures.MAX_BYTES", 1000)
    assert torch.equal(pictures.features(examples).look(boxes).values, seen.values)
    assert torch.equal(pictures.features(examples).look(boxes).values, seen.values)
    assert model.encoder.encoded > before


def test_examples_without_and_with_several_pictures(model: IPN) -> None:
    shown = [picture(i) for i in range(3)]
    examples = [
        Example("Say yes.", ("yes",), ()),
        Example("Which one?", ("one",), tuple(shown)),
        Example("Which?", ("one",), tuple(shown[:2])),
    ]
    report = evaluate(model, examples)
    assert report.pictures == 3
    alone = model.ask([p.load() for p in shown], "Which one?", max_new_tokens=8).text
    assert report.predictions[1].text == alone


def test_progress_ends_at_the_number_of_examples(model: IPN) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, split(), batch_size=4, progress=lambda *s: seen.append(s))
    assert seen == [(4, 15), (8, 15), (12, 15), (15, 15)]


def test_options_go_to_generate(model: IPN) -> None:
    # The tiny tokenizer has one token a byte.
    short = evaluate(model, split(), max_new_tokens=1).predictions
    assert max(len(p.text) for p in short) <= 1
    with pytest.raises(GenerationOptionError, match="num_return_sequences must be 1"):
        evaluate(model, split(), num_return_sequences=2, do_sample=True)


def test_nothing_to_evaluate_is_said(model: IPN) -> None:
    with pytest.raises(DataError, match="the split holds no examples"):
        evaluate(model, [])
    with pytest.raises(UserError, match="batch size must be at least 1"):
        evaluate(model, split(), batch_size=0)


# -- shuffled requests -------------------------------------------------------------------------


def test_partners_have_another_question_and_another_picture() -> None:
    examples = split()
    partners = draw_partners(examples, examples, seed=1)
    for example, partner in zip(examples, partners, strict=True):
        assert partner is not None
        assert partner.question != example.question
        assert partner.images[0].name != example.images[0].name
    assert partners == draw_partners(examples, examples, seed=1)
    assert partners != draw_partners(examples, examples, seed=2)


def test_a_rare_partner_is_found_and_a_missing_one_is_refused() -> None:
    common = [Example("same?", ("no",), (picture(0),)) for _ in range(3000)]
    rare = Example("other?", ("no",), (picture(1),))
    assert draw_partners(common[:1], [*common, rare], seed=0) == [rare]
    with pytest.raises(DataError, match="no other example of the split has another question"):
        draw_partners(common[:1], common, seed=0)


def test_an_example_without_a_picture_has_no_partner() -> None:
    blind = Example("Say yes.", ("yes",), ())
    assert draw_partners([blind], [blind, *split()], seed=0) == [None]


@pytest.mark.parametrize("rounds", [1, 2])
def test_each_question_asks_what_its_partner_would(rounds: int) -> None:
    model = build(layout={"dynamic": 2, "rounds": rounds})
    examples = split(4, 2)
    own: dict[tuple[str, str], torch.Tensor] = {}
    for example in examples:
        with torch.no_grad(), model.observing(Recorder()) as recorder:
            evaluate(model, [example], batch_size=1)
        own[example.question, example.images[0].name] = torch.stack(recorder.asked)
    with torch.no_grad(), model.observing(Recorder()) as recorder:
        report = evaluate(model, examples, batch_size=1, shuffled=True, seed=3)
    wanted = {(p.example.question, p.example.images[0].name): p.partner for p in report.predictions}
    asked = torch.stack(recorder.asked[-len(examples) * rounds :])
    order = sorted(examples, key=lambda e: (len(e.question), e.question))
    for index, example in enumerate(order):
        partner = wanted[example.question, example.images[0].name]
        assert partner is not None
        theirs = own[partner.question, partner.images[0].name]
        got = asked[index * rounds : (index + 1) * rounds]
        torch.testing.assert_close(got, theirs, atol=1e-4, rtol=1e-4)


def test_shuffled_requests_change_answers_and_leave_the_model_as_it_was() -> None:
    model = build()
    examples = split()
    plain = [p.text for p in evaluate(model, examples).predictions]
    shuffled = evaluate(model, examples, shuffled=True, batch_size=4)
    assert [p.text for p in shuffled.predictions] != plain
    assert [p.text for p in evaluate(model, examples).predictions] == plain
    assert len(model.pm.get_plugins()) == 4


def test_a_requester_that_ignores_the_question_has_nothing_to_lose() -> None:
    model = build(request="constant")
    examples = split()
    plain = evaluate(model, examples).predictions
    shuffled = evaluate(model, examples, shuffled=True).predictions
    assert [p.text for p in shuffled] == [p.text for p in plain]


def test_a_partner_may_come_from_outside_the_examples(model: IPN) -> None:
    examples = split()
    report = evaluate(model, examples[:1], shuffled=True, pool=examples)
    assert report.predictions[0].partner in examples[6:]


def test_the_control_reports_what_guessing_scores(model: IPN) -> None:
    examples = [
        Example(e.question, ("yes",) if i % 3 else ("no",), e.images, e.type)
        for i, e in enumerate(split())
    ]
    report = evaluate(model, examples, shuffled=True)
    found = report.to_json()
    assert found["shuffled"] is True
    assert found["guess"]["answer"] == "yes"
    assert found["guess"]["accuracy"] == pytest.approx(10 / 15)
    for row in found["by_type"].values():
        assert row["guess"]["accuracy"] >= 0.5
    weighted = sum(r["guess"]["accuracy"] * r["n"] for r in found["by_type"].values()) / 15
    assert found["guess"]["by_type_accuracy"] == pytest.approx(weighted)


def test_a_model_without_requests_cannot_be_shuffled(model: IPN) -> None:
    blind = build(strategy=None, encoder="tiny", layout={"rounds": 0})
    with pytest.raises(UserError, match=r"strategy 'tiny' of model 'tiny' makes no requests"):
        evaluate(blind, split(), shuffled=True)


def test_a_request_context_is_passed_to_the_requester_once(model: IPN) -> None:
    calls: list[RequestContext] = []

    class Spy:
        @hookimpl(wrapper=True)
        def request(self, context: RequestContext) -> Generator[None, Request, Request]:
            calls.append(context)
            return (yield)

    with model.observing(Spy()):
        evaluate(model, split(3, 1), batch_size=3)
    assert [len(c.samples) for c in calls] == [3]


def test_an_answer_may_be_as_long_as_the_tasks_longest(
    model: IPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ipn_core.evaluation.evaluate as module

    asked: list[int] = []
    decode = module.decode

    def noted(*args: Any, **more: Any) -> Any:
        asked.append(args[3]["max_new_tokens"])
        return decode(*args, **more)

    monkeypatch.setattr(module, "decode", noted)
    long = "a long answer of many more tokens than eight, word after word"
    tokens = len(model.backbone.tokenizer(long, add_special_tokens=False)["input_ids"])
    examples = split(questions=1, pictures=1)
    evaluate(model, examples)
    evaluate(model, [replace(e, answers=("yes", long)) for e in examples])
    evaluate(model, examples, max_new_tokens=3)
    assert asked == [8, tokens + 4, 3]


def test_few_questions_about_many_pictures_are_of_all_types() -> None:
    # As generated pictures have them: those of a type next to each other.
    pool = [
        Example(f"{kind} {number}?", ("this",), (shown,), kind)
        for shown in map(picture, range(10))
        for kind in "abcde"
        for number in range(2)
    ]
    asked = choose_questions(pool, 20, 2)
    assert Counter(example.type for example in asked) == dict.fromkeys("abcde", 4)
    assert Counter(example.question for example in asked) == dict.fromkeys(
        {example.question for example in pool}, 2
    )
    of_picture: dict[str, set[str]] = {}
    for example in asked:
        of_picture.setdefault(example.images[0].name, set()).add(example.type)
    assert [len(types) for types in of_picture.values()] == [2] * 10
    assert len({example.images[0].name for example in choose_questions(pool, 10, 1)}) == 10
    assert choose_questions(pool, 7) == pool[:7]
    assert choose_questions(pool, per_picture=11) == pool
    short = [*pool[:10], *pool[10:12]]
    assert choose_questions(short, None, 3) == [pool[0], pool[3], pool[6], *pool[10:12]]
