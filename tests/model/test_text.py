"""The text tokenizer: any UTF-8 round-trips, identity is content, labels cover answers only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upvla.errors import Mismatch
from upvla.model.text import TextTokenizer

TEXTS = ["push the red block to the left", "open the drawer", "is the drawer open?", "yes", "the blue block", "no"]


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 512)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(text: TextTokenizer, value: str) -> None:
    ids = text.encode(value)
    assert text.decode(ids) == value
    assert all(0 <= i < text.vocab_size for i in ids)


def test_special_tokens_are_never_parsed_out_of_text(text: TextTokenizer) -> None:
    ids = text.encode("stop <|endoftext|> now")
    assert text.eot_id not in ids and text.decode(ids) == "stop <|endoftext|> now"
    assert text.decode([*text.encode("yes"), text.eot_id, text.pad_id, text.vocab_size + 50]) == "yes"


def test_identity_does_not_depend_on_order_or_repetition_and_survives_json(text: TextTokenizer) -> None:
    again = TextTokenizer.train([*reversed(TEXTS), *TEXTS], 512)
    assert again.id == text.id == TextTokenizer.from_json(text.to_json()).id
    assert TextTokenizer.train([*TEXTS, "turn on the lamp"], 512).id != text.id
    assert TextTokenizer.from_json(text.to_json()).encode("open the drawer") == text.encode("open the drawer")


def test_learnt_words_are_short(text: TextTokenizer) -> None:
    assert len(text.encode("open the drawer")) <= 4
    assert len(text.encode_question("is the drawer open?")) <= 9


def test_conversation_labels_cover_answers_and_their_end(text: TextTokenizer) -> None:
    turns = [("<image>\nis the drawer open?", "yes"), ("what is left?", "the blue block")]
    ids, labels = text.encode_turns(turns)
    assert len(ids) == len(labels)
    supervised = [label for label in labels if label != -100]
    assert supervised == [*text.encode(" yes"), text.eot_id, *text.encode(" the blue block"), text.eot_id]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    assert text.decode(ids) == "USER: is the drawer open? ASSISTANT: yesUSER: what is left? ASSISTANT: the blue block"
    prompt = text.encode_question("is the drawer open?")
    assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {-100}


def test_a_tokenizer_that_does_not_fit_is_refused(text: TextTokenizer) -> None:
    value = text.to_json().replace('"vocab_size": 512', '"vocab_size": 100')
    with pytest.raises(Mismatch, match=r"the model has room for 100"):
        TextTokenizer.from_json(value)
