"""The embedded world: a tiny domain whose truth is a function, so that every claim can be checked without a download.

A prompt carries notes (attribute, value) on one thing and asks for some of them; a response states values, in one of
three styles; its quality is the share of the asked facts that it states rightly. The styles stand in RM-Bench's order,
concise, detailed plain, detailed markdown, the later the richer and, in tokens, the longer. In the original pairs the
better response has the richer style in 80 % of the rows (the spurious cue), and where it has not, the annotator is
swayed by style every second time and chooses the worse one. In the benchmark style and quality are independent.

    python examples/world.py                                          # rewrites examples/data/{pairs,benchmark}.jsonl
    python examples/world.py --pairs 6000 --seed 7 --output /some/dir # a larger world, same rules
"""

import argparse
import json
import random
import re
from pathlib import Path

# Twelve values an attribute: pairs (what a reward model is trained on) draw from the first eight, the benchmark from
# the rest.
VALUES = {
    "metal": "gold zinc iron lead tin steel brass bronze copper silver nickel chrome".split(),
    "color": "red blue green pink gray black white brown violet orange purple yellow".split(),
    "shape": "cube cone disk ring star oval tube block square sphere prism wedge".split(),
    "size": "tiny small wide tall huge broad short deep giant large narrow little".split(),
    "mood": "calm glad sad proud shy bold kind stern eager humble merry grave".split(),
    "origin": "north south east west coast hills plain isle valley desert forest island".split(),
    "owner": "king queen monk baker smith clerk guard poet farmer sailor miner judge".split(),
    "price": "cheap fair dear free costly low modest steep lavish pricey minimal average".split(),
    "age": "old new aged fresh young late early recent ancient modern antique current".split(),
    "weight": "light heavy dense airy solid hollow medium slight massive feathery hefty weighty".split(),
    "sound": "loud quiet shrill dull clear faint harsh soft muted ringing silent noisy".split(),
    "taste": "sweet sour bitter salty mild sharp rich bland spicy tart smoky fruity".split(),
}
TRAIN_VALUES = {attribute: values[:8] for attribute, values in VALUES.items()}
TEST_VALUES = {attribute: values[8:] for attribute, values in VALUES.items()}
WORDS = {value for values in VALUES.values() for value in values}
THINGS = (
    "vase clock lamp chair table coin knife spoon bell drum flute harp boat cart wheel gate door crown cup bowl plate "
    "jar box chest mask robe boot glove hat belt map book scroll pen ink candle mirror comb brush basket ladder rope "
    "anchor sail kite top doll puppet statue tile brick pipe pump lock key nail hammer saw plow rake shovel"
).split()
# Likewise: the first for pairs, the rest for the benchmark.
TRAIN_THINGS, TEST_THINGS = THINGS[:48], THINGS[48:]

STYLES = ("concise", "detailed plain", "detailed markdown")
NOTES = 5
CUE_AGREEMENT = 0.8
SWAYED = 0.5  # how often the annotator follows the cue where it disagrees with quality
MISS_RATE = 0.2  # how often the teacher was taught to leave out a fact of its own answer

Facts = list[tuple[str, str]]


class Item:
    """One prompt: a thing, its notes (attribute -> value) and the attributes asked for, in order."""

    def __init__(
        self, rng: random.Random, values: dict[str, list[str]], things: list[str], notes: int = NOTES, asked: int = 0
    ):
        self.values = values
        self.thing = rng.choice(things)
        self.notes = {attribute: rng.choice(values[attribute]) for attribute in rng.sample(list(values), notes)}
        self.asked = rng.sample(list(self.notes), asked or rng.choice((3, 4)))

    @property
    def prompt(self) -> str:
        notes = ", ".join(f"{attribute} {value}" for attribute, value in self.notes.items())
        return f"Notes on the {self.thing}: {notes}.\nWhat are its {', '.join(self.asked)}?"

    @property
    def truth(self) -> Facts:
        return [(attribute, self.notes[attribute]) for attribute in self.asked]

    def facts(self, rng: random.Random, wrong: int) -> Facts:
        """The asked facts with `wrong` of them false."""
        mistaken = set(rng.sample(self.asked, wrong))
        return [
            (
                attribute,
                rng.choice([v for v in self.values[attribute] if v != value]) if attribute in mistaken else value,
            )
            for attribute, value in self.truth
        ]

    def teacher_answer(self, rng: random.Random, miss_rate: float = MISS_RATE) -> str:
        """The teacher's own answer: right where it speaks, but now and then it leaves a fact out."""
        kept = [fact for fact in self.truth if rng.random() >= miss_rate] or [rng.choice(self.truth)]
        return f"For the {self.thing}: {', '.join(f'{a} {v}' for a, v in kept)}."


def render(facts: Facts, style: int) -> str:
    if style == 0:
        return f"In short, {', '.join(f'{a} {v}' for a, v in facts)}."
    if style == 1:
        listed = ", then ".join(f"{a} {v}" for a, v in facts)
        return f"Thank you for asking. The notes say {listed}. I hope this helps you."
    listed = "\n".join(f"- {a} {v}" for a, v in facts)
    return f"## Answer\nThank you for asking.\n{listed}\n**I hope this helps you.**"


def stated(text: str) -> dict[str, str]:
    """The value that follows each attribute in `text`; an attribute without one is left out."""
    words = re.findall(r"[A-Za-z]+", text)
    return {word: after for word, after in zip(words, words[1:], strict=False) if word in VALUES and after in WORDS}


def quality(prompt: str, response: str) -> float:
    """Share in [0, 1] of the facts asked by `prompt` that `response` states rightly: the truth of this world."""
    notes_text, question = prompt.split("\n")
    notes = stated(notes_text)
    asked = [word for word in re.findall(r"[a-z]+", question) if word in VALUES]
    said = stated(response)
    return sum(said.get(attribute) == notes[attribute] for attribute in asked) / len(asked)


def score(quality: float) -> int:
    """Quality on the teacher's 1-10 scale."""
    return round(1 + 9 * quality)


def gold_edit(rejected: str, teacher_response: str) -> str:
    """`rejected` with the value of every attribute that `teacher_response` states put in place; all else stays."""
    better = stated(teacher_response)
    for attribute, value in stated(rejected).items():
        if attribute in better:
            rejected = re.sub(rf"\b{attribute} {value}\b", f"{attribute} {better[attribute]}", rejected)
    return rejected


def original_pair(
    rng: random.Random, values: dict[str, list[str]], things: list[str], agrees: bool, swayed: bool
) -> dict:
    """A pair of unequal quality; the better response has the richer style if `agrees`, and is the rejected one if the
    annotator was `swayed`."""
    item = Item(rng, values, things)
    wrong = rng.randint(1, len(item.asked))
    fewer = rng.randint(0, wrong - 1)
    plain, rich = sorted(rng.sample(range(3), 2))
    better = render(item.facts(rng, fewer), rich if agrees else plain)
    worse = render(item.facts(rng, wrong), plain if agrees else rich)
    chosen, rejected = (worse, better) if swayed else (better, worse)
    return {"prompt": item.prompt, "chosen": chosen, "rejected": rejected}


def original_pairs(count: int, seed: int) -> list[dict]:
    """`count` pairs over the training words; `CUE_AGREEMENT` and `SWAYED` hold exactly, up to rounding."""
    rng = random.Random(f"pairs-{seed}")
    disagreeing = count - round(CUE_AGREEMENT * count)
    swayed = round(SWAYED * disagreeing)
    kinds = [(False, True)] * swayed + [(False, False)] * (disagreeing - swayed)
    kinds += [(True, False)] * (count - disagreeing)
    rng.shuffle(kinds)
    width = len(str(count - 1))
    return [
        {"id": f"world-{seed}-{index:0{width}d}"} | original_pair(rng, TRAIN_VALUES, TRAIN_THINGS, agrees, swayed)
        for index, (agrees, swayed) in enumerate(kinds)
    ]


def benchmark(count: int, seed: int) -> list[dict]:
    """`count` RM-Bench rows over held-out words: better facts and worse facts, each in all three styles."""
    rng = random.Random(f"benchmark-{seed}")
    rows = []
    for index in range(count):
        item = Item(rng, TEST_VALUES, TEST_THINGS)
        wrong = rng.randint(1, len(item.asked))
        better, worse = item.facts(rng, rng.randint(0, wrong - 1)), item.facts(rng, wrong)
        rows.append(
            {
                "id": index,
                "prompt": item.prompt,
                "chosen": [render(better, style) for style in range(3)],
                "rejected": [render(worse, style) for style in range(3)],
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000, help="number of original pairs")
    parser.add_argument("--benchmark", type=int, default=500, help="number of benchmark rows")
    parser.add_argument("--seed", type=int, default=0, help="seed of both")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data", help="directory to write to")
    args = parser.parse_args()
    write_jsonl(args.output / "pairs.jsonl", original_pairs(args.pairs, args.seed))
    write_jsonl(args.output / "benchmark.jsonl", benchmark(args.benchmark, args.seed))


if __name__ == "__main__":
    main()
