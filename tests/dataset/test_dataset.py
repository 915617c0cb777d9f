from __future__ import annotations

import dataclasses

import pytest

from dpkd_offline.dataset.dataset import PromptDigest
from dpkd_offline.dataset.schema import Prompt, to_table

PROMPTS = [
    Prompt("a", [{"role": "user", "content": "é"}], "x", [1, 2], []),
    Prompt("b", [], "", [3], ["ref", ""]),
    Prompt("c", [{"role": "system", "content": ""}, {"role": "user", "content": "y"}], "zz", [4, 5, 6], ["r"]),
]
NAMES = ("chat", "template", "tokenizer")


def digest_of(prompts: list[Prompt], *cuts: int) -> PromptDigest:
    digest = PromptDigest()
    for start, end in zip((0, *cuts), (*cuts, len(prompts)), strict=True):
        digest.update(to_table(prompts, Prompt.schema).slice(start, end - start))
    return digest


def test_the_id_of_prompts_does_not_know_how_they_were_cut() -> None:
    whole = digest_of(PROMPTS)
    assert whole.longest == ("c", 3)
    for cuts in ((1,), (2,), (1, 2)):
        cut = digest_of(PROMPTS, *cuts)
        assert (cut.id(*NAMES), cut.longest) == (whole.id(*NAMES), ("c", 3))


CHANGES = {
    "id": {"id": "d"},
    "message": {"messages": [{"role": "user", "content": "e"}]},
    "role": {"messages": [{"role": "system", "content": "é"}]},
    "text": {"prompt": "y"},
    "a token": {"prompt_ids": [1, 3]},
    "fewer tokens": {"prompt_ids": [1]},
    "a reference": {"references": [""]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_of_a_row_changes_the_id(name: str) -> None:
    changed = [dataclasses.replace(PROMPTS[0], **CHANGES[name]), *PROMPTS[1:]]
    assert digest_of(changed).id(*NAMES) != digest_of(PROMPTS).id(*NAMES)


def test_so_does_another_order_template_or_tokenizer_and_a_token_that_moves() -> None:
    id_ = digest_of(PROMPTS).id(*NAMES)
    moved = [
        dataclasses.replace(PROMPTS[0], prompt_ids=[1]),
        dataclasses.replace(PROMPTS[1], prompt_ids=[2, 3]),
        PROMPTS[2],
    ]
    assert id_ not in {
        digest_of(PROMPTS[::-1]).id(*NAMES),
        digest_of(moved).id(*NAMES),
        digest_of(PROMPTS[:2]).id(*NAMES),
    }
    for n in range(3):
        assert id_ != digest_of(PROMPTS).id(*(*NAMES[:n], "other", *NAMES[n + 1 :]))
