"""Prompts become token plans: the tokenizer's own ids, slots in place, text that stays text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FAMILIES

from ipn_core.config import Layout, PromptConfig
from ipn_core.errors import PromptError
from ipn_core.plan import DynamicSlot, ImageSlot, Plan, Planner, RequestSlot, Tokens
from ipn_core.prompt import Prompt, Text, Turn
from ipn_core.segments import lay_out
from ipn_core.testing.tiny import tiny_backbone

PICTURE = object()
TYPED = "a <|im_end|> b <img> c <img-q><img-d> </s> <pad>"


def planner(family: Any = "llama", layout: Layout | None = None, **options: Any) -> Planner:
    backbone = tiny_backbone(family)
    return Planner(backbone.tokenizer, backbone.template, layout or Layout(), **options)


def ids(plan: Plan) -> list[int]:
    return [i for p in plan.pieces if isinstance(p, Tokens) for i in p.ids]


def kinds(plan: Plan) -> str:
    letters = {Tokens: "t", ImageSlot: "I", RequestSlot: "q", DynamicSlot: "d"}
    return "".join(letters[type(p)] for p in plan.pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_without_slots_gets_exactly_the_tokenizers_ids(family: str) -> None:
    mine = planner(family)
    prompt = Prompt.user("What is it?").then_assistant("A dog.").then_user("  Où ça, 犬? ")
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "  Où ça, 犬? "},
    ]
    tokenizer = tiny_backbone(family).tokenizer
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=mine.template, tokenize=False, add_generation_prompt=True
    )
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids(mine.plan(prompt)) == expected
    assert kinds(mine.plan(prompt)) == "t"


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_that_a_user_types_stay_text(family: str) -> None:
    mine = planner(family)
    tokenizer = tiny_backbone(family).tokenizer
    typed = ids(mine.plan(Prompt.user(TYPED)))
    plain = ids(mine.plan(Prompt.user("x")))
    special = set(tokenizer.all_special_ids)
    assert [i for i in typed if i in special] == [i for i in plain if i in special]
    assert TYPED in tokenizer.decode(typed)


def test_the_users_tokenizer_is_left_as_it_was() -> None:
    tokenizer = tiny_backbone().tokenizer
    before = len(tokenizer)
    planner()
    assert len(tokenizer) == before


@pytest.mark.parametrize(
    ("layout", "content", "expected"),
    [
        ({}, (PICTURE, "What?"), "tItqdt"),
        ({}, ("What?", PICTURE), "tIqdt"),
        ({}, ("a", PICTURE, "b", PICTURE), "tItIqdt"),
        ({}, ("What?",), "t"),
        ({"rounds": 0}, (PICTURE, "What?"), "tIt"),
        ({"rounds": 2}, (PICTURE, "What?"), "tItqdqdt"),
        ({"order": ("images", "look", "text")}, ("What?", PICTURE), "tIqdt"),
        ({"order": ("look", "images", "text")}, (PICTURE, "What?"), "tIqdt"),
    ],
)
def test_slots_stand_where_the_layout_and_the_user_put_them(
    layout: Any, content: Any, expected: str
) -> None:
    assert kinds(planner(layout=Layout(**layout)).plan(Prompt.user(*content))) == expected


def test_a_later_turn_looks_at_all_the_pictures_so_far() -> None:
    prompt = Prompt.user(PICTURE, "a").then_assistant("b").then_user(PICTURE, "c")
    plan = planner().plan(prompt)
    assert kinds(plan) == "tItqdtItqdt"
    assert [p.images for p in plan.pieces if isinstance(p, RequestSlot)] == [1, 2]
    assert plan.images == (PICTURE, PICTURE)
    assert plan.question == "c"


def test_a_turn_before_any_picture_does_not_look() -> None:
    prompt = Prompt.user("a").then_assistant("b").then_user(PICTURE, "c")
    assert kinds(planner().plan(prompt)) == "tItqdt"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_given_as_ids_is_not_tokenised_again(family: str) -> None:
    made = (70, 71, 72)
    plan = planner(family).plan(Prompt.user("a").then_assistant(made).then_user("b"))
    text = ",".join(map(str, ids(plan)))
    assert ",70,71,72," in text


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_to_learn_ends_with_the_end_token_and_is_all_that_is_learned(family: str) -> None:
    tokenizer = tiny_backbone(family).tokenizer
    plan = planner(family).plan(Prompt.ask("What?", [PICTURE], answer="dog"))
    *before, answer = plan.pieces
    assert answer.learn
    assert answer.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer.ids[:-1]).strip() == "dog"
    assert not any(isinstance(p, Tokens) and p.learn for p in before)
    asked = planner(family).plan(Prompt.ask("What?", [PICTURE]))
    assert tuple(before) == asked.pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_message_of_the_config_stands_first(family: str) -> None:
    found = tiny_backbone(family).tokenizer.decode(
        ids(planner(family, prompt=PromptConfig(system="Be brief.")).plan(Prompt.user("What?")))
    )
    assert found.index("Be brief.") < found.index("What?")


@pytest.mark.parametrize("question", ["", "  \n "])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(
        PromptError, match=r"the question is empty. Ask something about the picture"
    ):
        Prompt.ask(question, [PICTURE])
    with pytest.raises(PromptError, match=r"needs some text. Ask something"):
        Prompt.user(PICTURE, question)


@pytest.mark.parametrize("given", ["What?", None, b"x"])
def test_what_is_no_prompt_is_refused_with_what_makes_one(given: Any) -> None:
    with pytest.raises(PromptError, match=r"got \w+. Make one: Prompt.ask\(question, \[image\]\)"):
        planner().plan(given)


def test_half_of_a_character_is_no_text() -> None:
    with pytest.raises(PromptError, match=r"'a.ud83d' is no text: .ud83d is half of a character"):
        planner().plan(Prompt.ask("a\ud83d", [PICTURE]))


def test_a_prompt_without_a_users_turn_is_refused() -> None:
    with pytest.raises(PromptError, match="needs a user's turn"):
        planner().plan(Prompt((Turn("system", (Text("a"),)),)))


def test_a_picture_outside_a_users_turn_is_refused() -> None:
    from ipn_core.prompt import Shown

    turns = (Turn("user", (Text("a"),)), Turn("assistant", (Shown(PICTURE),)))
    with pytest.raises(PromptError, match="a picture stands in the assistant's turn"):
        planner().plan(Prompt((*turns, Turn("user", (Text("b"),)))))


def test_a_template_that_refuses_says_so() -> None:
    tokenizer = tiny_backbone().tokenizer
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
    template += "{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(
        PromptError, match=r"the chat template refuses these turns: no. Set 'prompt.templ"
    ):
        Planner(tokenizer, template, Layout(), PromptConfig(system="system")).plan(Prompt.user("a"))


def test_a_template_that_asks_too_much_of_its_sandbox_is_refused() -> None:
    tokenizer = tiny_backbone().tokenizer
    template = "{% for a in range(10**9) %}x{% endfor %}{{ messages[0]['content'] }}"
    with pytest.raises(PromptError, match=r"refuses these turns: Range too big"):
        Planner(tokenizer, template, Layout(), PromptConfig()).plan(Prompt.user("a"))


def test_what_is_left_after_a_fed_prefix() -> None:
    plan = planner().plan(Prompt.user(PICTURE, "What?"))
    for cut in range(len(plan.entries) + 1):
        rest = plan.after(plan.entries[:cut])
        assert rest is not None
        assert rest.entries == plan.entries[cut:]
    assert plan.after([*plan.entries[:3], -1]) is None


words = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1, max_size=12)
contents = st.lists(st.one_of(words, st.just(PICTURE), st.just("<|im_end|>")), max_size=6)
PLANNERS = {f: planner(f, Layout(dynamic=3)) for f in ("llama", "vicuna", "opt")}


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(contents, min_size=1, max_size=3),
    family=st.sampled_from(sorted(PLANNERS)),
    statics=st.integers(0, 4),
)
def test_any_interleaving_plans_as_many_tokens_as_go_in(
    turns: list[list[Any]], family: str, statics: int
) -> None:
    prompt, pictures, looks = Prompt(()), 0, 0
    for index, content in enumerate(turns):
        if index:
            prompt = prompt.then_assistant("yes")
        prompt = prompt.then_user("Q", *content)
        pictures += sum(c is PICTURE for c in content)
        looks += pictures > 0
    plan = PLANNERS[family].plan(prompt)
    segments, counts, places = lay_out([plan], [[statics] * pictures], 1, 3)
    text = [Prompt(tuple(Turn(t.role, (Text(t.text),)) for t in prompt.turns))]
    assert kinds(plan).count("I") == pictures
    assert kinds(plan).count("q") == kinds(plan).count("d") == looks
    assert len(segments) == looks + 1
    assert counts[0].total() == sum(int(s.mask.sum()) for s in segments)
    assert counts[0].static == statics * pictures
    assert len(places[0]) == pictures
    # One token a byte, so that pictures between the words change nothing about the text's ids.
    assert ids(plan) == ids(PLANNERS[family].plan(text[0]))


def test_text_around_pictures_depends_on_what_stands_before_them() -> None:
    template = (
        "{% for m in messages %}{{ 'P' if m['image_first'] else 'T' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    around = {"template": template, "before_image": "<", "after_image": ">"}
    tokenizer = tiny_backbone("llama").tokenizer

    def text(prompt: Prompt, **more: Any) -> str:
        plan = planner(layout=Layout(rounds=0), prompt=PromptConfig(**around, **more)).plan(prompt)
        return tokenizer.decode(ids(plan))

    adjacent = Prompt.user(PICTURE, PICTURE, "a", PICTURE, PICTURE)
    assert text(adjacent) == "P<><>a<><>:"
    assert text(adjacent, before_next_image="") == "P<>>a<>>:"
    assert text(adjacent, before_next_image="+") == "P<>+>a<>+>:"
    assert text(Prompt.user("a", PICTURE)) == "Ta<>:"
    assert text(Prompt.user("a").then_assistant("b").then_user(PICTURE, "c")) == "TaTbP<>c:"
