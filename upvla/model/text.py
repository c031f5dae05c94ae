"""Byte-level BPE over instructions and questions: any UTF-8 string round-trips; the content hash is its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import tokenizers

from upvla.errors import Mismatch

END = "<|endoftext|>"
IGNORED = -100


class TextTokenizer:
    """Text <-> ids below `vocab_size`; `pad_id` = `vocab_size`, the first special id of upvla.md section 1.3.

    Special tokens are never parsed out of text: an instruction that spells `<|endoftext|>` is just those bytes.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int) -> None:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        tokenizer.encode_special_tokens = True
        eot_id = tokenizer.token_to_id(END)
        if eot_id is None:
            raise Mismatch(f"text tokenizer: it has no {END!r} token; it must have one, as end and as begin")
        if tokenizer.get_vocab_size() > vocab_size:
            raise Mismatch(
                f"text tokenizer: it has {tokenizer.get_vocab_size()} ids, the model has room for {vocab_size}: "
                "train it smaller or raise model.text_vocab_size"
            )
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eot_id: int = eot_id
        self.pad_id = vocab_size
        self.id = hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learn merges from `texts`, a set: order and repetition do not change the result. `END` gets id 0."""
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        # A text is met bare (instructions) and inside of the conversation template: learn both.
        unique = sorted(set(texts))
        tokenizer.train_from_iterator([*unique, *(f"USER: {text} ASSISTANT: {text}" for text in unique)], trainer)
        return TextTokenizer(tokenizer.to_str(), vocab_size)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; the end token and ids outside of the text vocabulary are dropped."""
        known = [i for i in map(int, ids) if i < self._tokenizer.get_vocab_size() and i != self.eot_id]
        return str(self._tokenizer.decode(known, skip_special_tokens=False))

    def encode_turns(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """(question, answer) rounds -> ids and labels of `USER: q ASSISTANT: a<eot>USER: ...`.

        Labels are -100 except on each answer and its end token. The blank before an answer belongs to the answer's
        first token, as in the Phi-1.5 template of LLaVA, so that prompts and training rows tokenise alike.
        """
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in turns:
            prompt = self.encode_question(question)
            supervised = [*self.encode(f" {_plain(answer)}"), self.eot_id]
            ids += [*prompt, *supervised]
            labels += [*([IGNORED] * len(prompt)), *supervised]
        return ids, labels

    def encode_question(self, question: str) -> list[int]:
        """What `UPVLA.describe` continues: `USER: q ASSISTANT:`."""
        return self.encode(f"USER: {_plain(question)} ASSISTANT:")

    def to_json(self) -> str:
        """Canonical: equal tokenizers give equal strings."""
        return json.dumps(
            {"vocab_size": self.vocab_size, "tokenizer": json.loads(self._tokenizer.to_str())},
            sort_keys=True,
            ensure_ascii=False,
        )

    @staticmethod
    def from_json(text: str) -> TextTokenizer:
        value = json.loads(text)
        return TextTokenizer(json.dumps(value["tokenizer"], ensure_ascii=False), value["vocab_size"])


def _plain(turn: str) -> str:
    return turn.replace("<image>", "").strip()
