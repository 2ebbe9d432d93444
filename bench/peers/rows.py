"""Which rows both sides are given: those that every tool keeps whole.

TRL's reward trainer drops a row that is longer than the limit, its others and Pivotal cut it off: one work only where
no row is longer. A response counts with its EOS, tokenised jointly with its prompt (TRL) and apart from it (Pivotal,
transformers_score.py), whichever is more.
"""

import dataclasses
import json
import pathlib

import peer
from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many rows the file had, how many were left out, and why."""

    file: int
    too_long: int
    max_tokens: int
    taken: int
    batch: int

    def sentence(self) -> str:
        rest = self.file - self.too_long
        text = f"{self.taken} of the file's {self.file} rows. Left out as longer than {self.max_tokens} tokens in one "
        text += f"tool or another: {self.too_long}."
        if self.taken < rest:
            text += f" Of the other {rest}, evenly spread, as many as were asked for in whole batches of {self.batch}."
        return text


class Length:
    """The most tokens that any tool makes of a row, from the peers' own tokenizer."""

    def __init__(self, model: pathlib.Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.eos: str = settings["eos_token"]

    def tokens(self, text: str, special: bool) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def __call__(self, row: peer.Row) -> int:
        lengths = []
        for response in (row["chosen"], row["rejected"]):
            ended = response if response.endswith(self.eos) else response + self.eos
            lengths.append(self.tokens(row["prompt"] + ended, special=True))
            lengths.append(self.tokens(row["prompt"], special=False) + self.tokens(response, special=False) + 1)
        return max(lengths)


def choose(rows: list[peer.Row], length: Length, max_tokens: int, batch: int,
           limit: int) -> tuple[list[peer.Row], Choice]:  # fmt: skip
    """`limit` of the rows that fit (0: all of them), evenly spread, in whole batches."""
    whole = [row for row in rows if length(row) <= max_tokens]
    wanted = min(limit, len(whole)) if limit > 0 else len(whole)
    count = wanted - wanted % batch
    if count == 0:
        raise SystemExit(f"{wanted} rows make no batch of {batch}")
    taken = peer.spread(whole, count)
    return taken, Choice(len(rows), len(rows) - len(whole), max_tokens, len(taken), batch)
