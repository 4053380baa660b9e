"""Time to the first token with one request round, against the least that it can cost.

The least is: prefill of the prefix, one forward over the dynamic and remaining tokens, and the
interaction alone. All are timed in turn within each repetition, so that a busy machine slows them
alike; ratios are taken within a repetition, and their median is what is checked.

Run `pytest benchmarks/bench_first_token.py`, or `python -m benchmarks.bench_first_token --help`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measuring import (
    GRID,
    INTERACT,
    WIDTH,
    Timed,
    backbone,
    collected,
    in_turn,
    machine,
    ratio,
    spread,
    threads,
    timing,
)
from ipn_core.clock import Clock
from ipn_core.features import VisualFeatures
from ipn_core.generate import decode
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.segments import lay_out
from ipn_core.stages import InjectContext, Percept, Request, RequestContext
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig

PREFIX = 128
"""Tokens up to and with `<img-q>`."""
K = 5
LIMIT = 1.10
"""How much more than its floor a first token may take."""
REPEATS = 30


# -- what is timed ---------------------------------------------------------------------------------


def setup_first_token() -> Case:
    """Build the model, and a prompt whose prefix has `PREFIX` tokens."""
    llm, name = backbone()
    torch.manual_seed(0)
    model = IPN.from_config(
        {
            "strategy": "rvii",
            "backbone": "llama",
            "encoder": "tiny",
            "interact": INTERACT,
            "layout": {"dynamic": K},
        },
        backbone=llm,
        encoder=TinyEncoder(TinyEncoderConfig(width=WIDTH)),
    )
    patches = torch.randn(GRID[0] * GRID[1], WIDTH)
    features = VisualFeatures.pack([patches], [GRID], [0], 1)
    question, rest = "Is there a dog?", 0
    for _ in range(PREFIX):
        prompt = Prompt.ask(question, ["the picture"])
        plan = model.planner.plan(prompt)
        first, last = lay_out([plan], [[0]], 1, K)[0]
        rest = last.length
        if first.length >= PREFIX:
            break
        question += " a"
    percept = model.perceive([], [question], features)
    return Case(model, name, prompt, percept, first.length, rest)


@dataclass
class Case:
    """One prompt with one picture.

    Attributes:
        model: with RVII, new weights.
        llm: what the LLM is.
        prompt: one question.
        percept: of its picture, which every row below is given alike.
        prefix: tokens up to and with `<img-q>`.
        rest: tokens after it, the K dynamic ones included.
    """

    model: IPN
    llm: str
    prompt: Prompt
    percept: Percept
    prefix: int
    rest: int

    @torch.no_grad()
    def round(self) -> int:
        """Return the first token as a caller gets it: planned, asked and decoded."""
        plans = [self.model.planner.plan(self.prompt)]
        clock = Clock(self.model.backbone.device)
        answers, _, _ = decode(self.model, plans, self.percept, {"max_new_tokens": 1}, clock)
        return answers[0].ids[0]

    @torch.no_grad()
    def floor(self) -> tuple[int, Timed]:
        """Return the same token by the least that it can cost, and the seconds of each part."""
        backbone, timed = self.model.backbone, {}
        before, after = self.embeds[:, : self.prefix], self.embeds[:, self.prefix + K :]
        with timing(timed, "prefix"):
            output = backbone.lm.base_model(inputs_embeds=before, use_cache=True)
        request = self._request(output.last_hidden_state[:, -1:])
        with timing(timed, "interaction"):
            message = self.model.interaction(request, self.percept.features)
        filled = torch.cat([self._inject(message), after], dim=1)
        with timing(timed, "rest"):
            output = backbone.lm.base_model(
                inputs_embeds=filled, past_key_values=output.past_key_values, use_cache=True
            )
            scores = backbone.logits(output.last_hidden_state[:, -1])
        return int(scores.argmax()), timed

    @torch.no_grad()
    def two_passes(self) -> int:
        """Return the same token as the published code finds it: the whole LLM twice."""
        backbone = self.model.backbone
        before, after = self.embeds[:, : self.prefix], self.embeds[:, self.prefix + K :]
        first = backbone.lm.base_model(inputs_embeds=before, use_cache=False)
        request = self._request(first.last_hidden_state[:, -1:])
        message = self.model.interaction(request, self.percept.features)
        return self._generate(torch.cat([before, self._inject(message), after], dim=1))

    @torch.no_grad()
    def no_request(self) -> int:
        """Return the first token of the same words without `<img-q>` and `<img-d>`."""
        before, after = self.embeds[:, : self.prefix - 1], self.embeds[:, self.prefix + K :]
        return self._generate(torch.cat([before, after], dim=1))

    @property
    def embeds(self) -> Tensor:
        """(1, prefix + rest, D_in) the prompt's inputs, the `<img-d>` slots not yet filled."""
        if not hasattr(self, "_embeds"):
            model = self.model
            first, last = lay_out([model.planner.plan(self.prompt)], [[0]], 1, K)[0]
            ids = torch.cat([first.ids, last.ids], dim=1)
            embeds = model.backbone.embed(ids).detach()
            embeds[:, self.prefix - 1] = model.slots.request.detach()
            self._embeds = embeds
        return self._embeds

    def _request(self, hidden: Tensor) -> Request:
        request: Request = self.model.requester(RequestContext(hidden, [0]))
        return Request(request.values, return_map=True)

    def _inject(self, message: Any) -> Tensor:
        tokens: Tensor = self.model.injector(
            message, InjectContext(self.model.slots.dynamic)
        ).tokens
        return tokens

    def _generate(self, embeds: Tensor) -> int:
        made = self.model.backbone.lm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )
        return int(made[0, -1])


# -- timing ----------------------------------------------------------------------------------------


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    """Time everything in turn; returns the seconds of each row and the parts of the floor."""
    rows: dict[str, Callable[[], Any]] = {
        "request": case.round,
        "floor": case.floor,
        "no request": case.no_request,
        "two passes": case.two_passes,
    }

    def parted() -> Iterator[tuple[Timed, Any]]:
        for timed, results in in_turn(rows, repeats):
            parts = results["floor"][1]
            yield {**timed, **parts, "floor": sum(parts.values())}, results

    return collected(parted())


def check_results(case: Case) -> None:
    """Refuse to time rows that do not find the same token."""
    tokens = {
        "request": case.round(),
        "floor": case.floor()[0],
        "two passes": case.two_passes(),
    }
    if len(set(tokens.values())) > 1:
        raise AssertionError(f"the rows find different first tokens: {tokens}")


def report(case: Case, found: dict[str, list[float]]) -> str:
    """Say what was measured, on what."""
    lines = [
        f"first token, {case.llm}, {machine()}",
        f"{case.prefix}-token prefix with 1 request, then {K} dynamic and {case.rest - K} more "
        f"tokens; RVII over {GRID[0]}x{GRID[1]} patches; {len(found['request'])} repetitions",
        "",
        f"{'':24}{'median':>10}{'p20':>10}{'p80':>10}",
    ]
    names = {
        "request": "one request round",
        "floor": "its floor",
        "prefix": "  prefill of the prefix",
        "interaction": "  the interaction",
        "rest": "  the rest",
        "no request": "no request",
        "two passes": "two passes",
    }
    for key, name in names.items():
        cells = "".join(f"{1000 * value:7.1f} ms" for value in spread(found[key]))
        lines.append(f"{name:24}{cells}")
    lines.append("")
    for other in ("floor", "no request", "two passes"):
        middle, low, high = ratio(found["request"], found[other])
        lines.append(f"request / {other:14}{middle:10.3f}   ({low:.3f} to {high:.3f})")
    return "\n".join(lines)


def run(repeats: int, count: int | None = None) -> tuple[str, float]:
    """Return the report and the ratio to the floor; by default all cores work on it."""
    with threads(count):
        case = setup_first_token()
        check_results(case)
        found = measure(case, repeats)
        return report(case, found), ratio(found["request"], found["floor"])[0]


def verdict(measured: float) -> str | None:
    """Say what is wrong with a ratio to the floor, None if nothing is."""
    if measured <= LIMIT:
        return None
    return (
        f"a first token takes {measured:.3f} of its floor, more than {LIMIT:.2f}. On a busy "
        "machine, run it again alone or with --no-check."
    )


def test_first_token(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    text, measured = run(REPEATS)
    with capsys.disabled():
        print(f"\n{text}\n")
    fault = verdict(measured)
    if fault and not request.config.getoption("--no-check"):
        pytest.fail(fault, pytrace=False)


def main() -> int:
    """Run from the command line; returns 1 if the ratio to the floor is too large."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, help="fewer than all, on a busy machine")
    parser.add_argument("--no-check", action="store_true", help="print only, whatever it is")
    options = parser.parse_args()
    text, measured = run(options.repeats, options.threads)
    print(text)
    fault = verdict(measured)
    if fault:
        print(fault, file=sys.stderr)
    return 1 if fault and not options.no_check else 0


if __name__ == "__main__":
    sys.exit(main())
