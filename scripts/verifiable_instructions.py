#!/usr/bin/env python3
"""Writes instructions whose obedience a program can check, for `pivotal reject`, `ppo` and `grpo`.

    scripts/verifiable_instructions.py fixtures/verifiable            # train.jsonl and held_out.jsonl
    scripts/verifiable_instructions.py fixtures/verifiable --check    # exit status 1 if they are not what would be written

Eight kinds of instruction in plain sentences of our own. Train and held-out share no topic, phrase, word or pair of operands, and half
of the held-out rows use a wording that no training row has: what is tested is the behaviour, not the rows. Wherever an answer has a
topic, it must name it, so that a response cannot pass by saying nothing. Columns beside docs/on_policy.md's: `kind`, and `wording`
(seen or new), for `scripts/on_policy_curve.py`. Standard library only; the same seed gives the same bytes.
"""

import argparse
import json
import pathlib
import random
import sys

TOPICS = {
    "train": "tea bread chess rain music winter honey gold sleep football coffee glass paper soap wood salt milk history "
             "space poetry fishing cotton wind silver summer rice dancing photography leather fire cheese money traffic "
             "cycling chocolate ice painting steel running farming sugar thunder swimming gardening".split(),
    "held_out": "snow mathematics butter copper spring pottery tennis wool fog jazz sailing cinema clay hiking soup "
                "lightning".split(),
}

PHRASES = {
    "train": ["That is all.", "Thank you for reading.", "Have a nice day.", "I hope this helps.", "Now you know.",
              "The end.", "See you soon.", "Good luck.", "Is that clear?", "Enjoy it.", "And so it goes.",
              "Ask me again.", "Nothing more to say.", "What do you think?", "Take care.", "This is my answer."],
    "held_out": ["Goodbye for now.", "Any other questions?", "Stay safe.", "Done.", "Best wishes.", "It is that simple.",
                 "Over and out.", "You are welcome."],
}

REQUIRED = {
    "train": "bright quiet simple warm strange gentle useful ancient rapid golden heavy famous fresh narrow clever "
             "peaceful round careful bitter proud".split(),
    "held_out": "silent curious smooth brave distant humble sharp cheerful".split(),
}

FORBIDDEN = {
    "train": ["the", "and", "is", "in", "to", "with"],
    "held_out": ["of", "a", "for", "that"],
}

# Each wording is used with `.format`; those of "new" appear in held-out rows alone.
WORDINGS = {
    "lower_case": {
        "seen": ["Name three things that go with {topic}. Write in lower case only, with commas between.",
                 "what is {topic}? answer in lower case, as i do.",
                 "Name three words about {topic}, all in lower case.",
                 "say something about {topic}, without any capital letter please."],
        "new": ["tell me what people like about {topic}. lower case only!",
                "List three things one can do with {topic}. No upper case letters."],
    },
    "question": {
        "seen": ["Ask one question about {topic}. Say nothing else.",
                 "What would a child ask about {topic}? Write the question alone.",
                 "Write a single question on {topic}.",
                 "Give me a quiz question about {topic}, without its answer."],
        "new": ["I am an expert on {topic}. Ask me something.",
                "Put one short question about {topic} to the class."],
    },
    "bullets": {
        "seen": ["Give exactly {count} bullet points about {topic}. Begin each line with \"- \".",
                 "List {count} short facts about {topic} as bullet points that begin with \"-\".",
                 "- Write {count} bullet points on {topic}\n- Use lines like these\n- A few words each",
                 "I need {count} very short bullet points about {topic}."],
        "new": ["Sum up {topic} in {count} brief bullet points.",
                "A list of {count} bullets about {topic}, please. Keep each one short."],
    },
    "ends_with": {
        "seen": ["Write one short sentence about {topic}. End your answer with: {phrase}",
                 "Say something brief about {topic} and finish with the words \"{phrase}\"",
                 "In one short sentence, describe {topic}. Your last words must be: {phrase}",
                 "What is {topic}? Answer briefly and close with \"{phrase}\""],
        "new": ["Name one good thing about {topic}. The answer has to end in \"{phrase}\"",
                "Tell me a fact about {topic}, then stop after saying: {phrase}"],
    },
    "contains": {
        "seen": ["Write one short sentence about {topic} that uses the word \"{word}\".",
                 "Describe {topic} in one short sentence with the word {word} in it.",
                 "Say something brief about {topic}. Include the word \"{word}\".",
                 "What is {topic}? Answer briefly and use the word {word}."],
        "new": ["Name one good thing about {topic}; the word \"{word}\" must appear.",
                "Put the word {word} into a short sentence on {topic}."],
    },
    "omits": {
        "seen": ["Write one short sentence about {topic} without the word \"{word}\".",
                 "Describe {topic} in one short sentence. Do not use the word \"{word}\".",
                 "Say something brief about {topic}. Avoid the word \"{word}\".",
                 "What is {topic}? Answer briefly and never use the word \"{word}\"."],
        "new": ["Name one good thing about {topic}; the word \"{word}\" is forbidden.",
                "Talk about {topic} in one short sentence, leaving out the word \"{word}\"."],
    },
    "max_words": {
        "seen": ["Describe {topic} in at most {count} words.",
                 "What is {topic}? Use no more than {count} words.",
                 "Write about {topic}. Your answer must not be longer than {count} words.",
                 "In {count} words or fewer, say something about {topic}."],
        "new": ["Explain {topic}, but stay within {count} words.",
                "Why do people care about {topic}? {count} words at the most."],
    },
    "arithmetic": {
        "seen": ["What is {a} {sign} {b}?",
                 "Compute {a} {sign} {b}. Answer with the number.",
                 "{story}",
                 "Calculate: {a} {sign} {b} ="],
        "new": ["Tell me the result of {a} {sign} {b}.",
                "How much is {a} {sign} {b}? Give the number alone."],
    },
}

NAMES = {"train": ["Anna", "Ben", "Carla", "David", "Emma"], "held_out": ["Mara", "Noah", "Olga"]}
THINGS = {"train": ["apples", "books", "coins", "stamps"], "held_out": ["pencils", "shells"]}
STORIES = {"+": "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
           "-": "{name} has {a} {things} and gives away {b}. How many {things} are left?"}


def user(text):
    """A message, so that the model's chat template applies: a string would be completed as it stands."""
    return [{"role": "user", "content": text}]


def words(count):
    """The check that a response has so many words at least."""
    return {"kind": "regex", "pattern": f"^\\s*(\\S+\\s+){{{count - 1},}}\\S"}


class Side:
    """What one of the two files may draw from. Every list is dealt out like a pack of cards before anything comes again."""

    def __init__(self, name, pairs, seed):
        self.name, self.random, self.packs = name, random.Random(f"{seed} {name}"), {}
        self.pairs = pairs

    def draw(self, key, items):
        pack = self.packs.setdefault(key, [])
        if not pack:
            pack.extend(items)
            self.random.shuffle(pack)
        return pack.pop()

    def row(self, kind, wording):
        topic = self.draw((kind, "topic"), TOPICS[self.name])
        fields, checks = {"topic": topic}, []
        if kind == "lower_case":
            checks = [{"kind": "lower_case"}, words(3)]
        elif kind == "question":
            checks = [{"kind": "ends_with", "phrase": "?"}, words(4)]
        elif kind == "bullets":
            fields["count"] = self.draw("bullets", [2, 3, 4])
            checks = [{"kind": "bullets", "count": fields["count"]}, words(3 * fields["count"])]
        elif kind == "ends_with":
            fields["phrase"] = self.draw("phrase", PHRASES[self.name])
            checks = [{"kind": "ends_with", "phrase": fields["phrase"]}, words(5)]
        elif kind == "contains":
            fields["word"] = self.draw("required", REQUIRED[self.name])
            checks = [{"kind": "contains", "word": fields["word"]}, words(5)]
        elif kind == "omits":
            fields["word"] = self.draw("forbidden", FORBIDDEN[self.name])
            checks = [{"kind": "omits", "word": fields["word"]}, words(5)]
        elif kind == "max_words":
            fields["count"] = self.draw("max_words", [6, 7, 8, 9, 10])
            checks = [{"kind": "max_words", "count": fields["count"]}, words(4)]
        row = {"kind": kind, "wording": wording}
        template = self.draw((kind, wording), WORDINGS[kind][wording])
        if kind == "arithmetic":
            (a, b), sign = self.draw("pair", self.pairs), self.draw("sign", ["+", "-"])
            a, b = max(a, b), min(a, b)
            names = {"name": self.draw("name", NAMES[self.name]), "things": self.draw("things", THINGS[self.name])}
            story = STORIES[sign].format(a=a, b=b, **names)
            text = template.format(a=a, b=b, sign=sign, story=story)
            return {**row, "prompt": user(text), "answer": a + b if sign == "+" else a - b}
        return {**row, "prompt": user(template.format(**fields)), "checks": [*checks, {"kind": "contains", "word": topic}]}


def rows(seed, train_a_kind, held_out_a_kind):
    """Both files' rows. An unordered pair of operands belongs to one side, whatever is done with it."""
    pairs = [(a, b) for a in range(2, 13) for b in range(2, a + 1)]
    random.Random(f"{seed} pairs").shuffle(pairs)
    cut = len(pairs) * 4 // 5
    train, held_out = Side("train", pairs[:cut], seed), Side("held_out", pairs[cut:], seed)
    files = {"train.jsonl": [train.row(kind, "seen") for _ in range(train_a_kind) for kind in WORDINGS]}
    wording = ["seen", "new"]
    files["held_out.jsonl"] = [held_out.row(kind, wording[index % 2]) for index in range(held_out_a_kind) for kind in WORDINGS]
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", type=int, default=40, help="training rows of each kind")
    parser.add_argument("--held-out", type=int, default=12, help="held-out rows of each kind")
    parser.add_argument("--check", action="store_true", help="compare with what is there, and write nothing")
    arguments = parser.parse_args()
    different = []
    for name, lines in rows(arguments.seed, arguments.train, arguments.held_out).items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path = arguments.directory / name
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            different.append(str(path))
    if different:
        sys.exit(f"not what this script writes: {', '.join(different)}")


if __name__ == "__main__":
    main()
