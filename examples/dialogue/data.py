"""Conversations with a shop, simulated: long ones, whose questions are about what was said hundreds of tokens ago.

    mmctx data build emoji data/emoji
    python examples/dialogue/data.py data/emoji data/dialogue

A customer shows pictures of what was bought and names order numbers, the shop says when orders arrive and how long things may be
returned, and between that there is small talk. Every fact is drawn anew for every conversation, so that nothing but the conversation
holds the answer. `notes/` are short documents for pretraining, in which facts are said again and again: of these, what had to be
remembered is learned. Of chats, answers to questions are learned, and nothing else.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmctx.datasets.build.members import Members, Rendered, encode_json
from mmctx.datasets.build.shards import read_shard, replace_folder
from mmctx.datasets.build.stream import Item
from mmctx.datasets.build.writer import BuildOptions, Source, build_shards
from mmctx.errors import DataError

SIZES = {"notes": (64, 4000), "short": (256, 2400), "long": (1500, 300), "heldout": (1500, 400)}
"""Tokens of a document, about, and how many there are."""
ORDERS = [f"{letter}{number}" for letter in "ABCDEFGHKM" for number in range(10, 20)]
GROUPS = ("animals", "food", "objects", "activities")
NUM_PRODUCTS = 40
SMALL_TALK = (
    ("Hello there!", "Good to see you again."),
    ("It has been raining all week.", "Then it is a good week to stay in."),
    ("Your shop is lovely.", "Thank you, we try hard."),
    ("My neighbour told me about you.", "Please give your neighbour our thanks."),
    ("I am looking for a present.", "Take your time and look around."),
    ("The last parcel came quickly.", "That is good to hear."),
    ("Do you have a shop in town?", "Not yet, but perhaps next year."),
    ("One moment please.", "Of course, no hurry."),
)
QUESTIONS = {
    "arrival": "When does order {order} arrive?",
    "product": "What is order {order}?",
    "order": "Which order is my {product}?",
    "return": "How long may I return {kind}?",
}
ANSWERS = {
    "arrival": "Order {order} arrives on {day} May.",
    "product": "Order {order} is your {product}.",
    "order": "Your {product} is order {order}.",
    "return": "You may return {kind} for {days} days.",
}
SLOTS = {"arrival": "day", "product": "product", "order": "order", "return": "days"}
"""What of an answer has to be right."""
KINDS = ("shoes", "books", "lamps", "chairs", "bags", "coats", "pens", "cups", "plates", "toys", "hats", "rugs")


def read_products(emoji: Path) -> dict[str, bytes]:
    """Names of one word and PNG pictures of things, from the shards of the demo.

    Raises:
        DataError: there are too few.
    """
    found: dict[str, bytes] = {}
    for path in sorted((emoji / "train").glob("*.tar")):
        for sample in read_shard(path):
            name, about = sample["txt"].decode(), json.loads(sample["json"])
            if name.isascii() and name.isalpha() and about["group"] in GROUPS and name not in KINDS:
                found.setdefault(name.lower(), sample["png"])
    if len(found) < NUM_PRODUCTS:
        raise DataError(f"{emoji}/train: found {len(found)} pictures of things, {NUM_PRODUCTS} are needed; build them by "
                        "`mmctx data build emoji`")  # fmt: skip
    chosen = sorted(found, key=lambda name: hashlib.blake2b(name.encode()).digest())[:NUM_PRODUCTS]
    return {name: found[name] for name in sorted(chosen)}


class Shop:
    """The facts of one conversation, and the sentences about them.

    A sentence is a list of texts and of products, `("picture", name)`, that are shown.
    """

    def __init__(self, rng: np.random.Generator, products: Sequence[str]) -> None:
        self.rng = rng
        self.orders = rng.permutation(ORDERS).tolist()
        self.products = rng.permutation(list(products)).tolist()
        self.kinds = rng.permutation(KINDS).tolist()
        self.facts: list[dict[str, str]] = []

    def new_fact(self) -> dict[str, str] | None:
        """An order of a product, when an order arrives, or how long something may be returned; None if there are no more."""
        kind = ("product", "arrival", "return")[int(self.rng.choice(3, p=[0.4, 0.4, 0.2]))]
        if not (
            self.kinds if kind == "return" else self.orders if kind == "arrival" else self.products and self.orders
        ):
            return None
        if kind == "return":
            fact = {"about": "return", "kind": self.kinds.pop(), "days": str(self.rng.integers(1, 29))}
        elif kind == "arrival":
            fact = {"about": "arrival", "order": self.orders.pop(), "day": str(self.rng.integers(1, 29))}
        else:
            fact = {"about": "product", "order": self.orders.pop(), "product": self.products.pop()}
        self.facts.append(fact)
        return fact

    def question(self, fact: dict[str, str]) -> tuple[str, list[Any], str]:
        """(what is asked, question, answer); a product is asked for by its picture or its name."""
        asked = fact["about"] if fact["about"] != "product" or self.rng.random() < 0.5 else "order"
        parts: list[Any] = [QUESTIONS[asked].format(**fact)]
        if asked == "order" and self.rng.random() < 0.5:
            before, after = QUESTIONS[asked].split("{product}")
            parts = [before, ("picture", fact["product"]), after]
        return asked, parts, ANSWERS[asked].format(**fact)


def stated(fact: dict[str, str]) -> tuple[str, list[Any]]:
    """(who says it, a sentence)."""
    if fact["about"] == "product":
        return "user", ["My ", ("picture", fact["product"]), f" is order {fact['order']}."]
    return "assistant", [ANSWERS[fact["about"]].format(**fact)]


def write_chat(rng: np.random.Generator, products: Sequence[str], size: int, ends: bool) -> dict[str, Any]:
    """Messages of about `size` tokens, the last third full of questions, each about another fact; with `ends` a single one."""
    shop, messages, tokens = Shop(rng, products), [], 0

    def say(role: str, parts: list[Any], learned: bool = False) -> None:
        nonlocal tokens
        tokens += 4 + sum(2 if isinstance(part, tuple) else len(part.split()) + 1 for part in parts)
        messages.append(
            {"role": role, "content": parts} | ({"loss": False} if role == "assistant" and not learned else {})
        )

    while tokens < size * (0.9 if ends else 0.6):
        fact = shop.new_fact() if not shop.facts or rng.random() < (0.5 if size < 500 else 0.3) else None
        if fact is None:
            ask, reply = SMALL_TALK[rng.integers(len(SMALL_TALK))]
            say("user", [ask])
            say("assistant", [reply])
            continue
        role, parts = stated(fact)
        say("user", parts if role == "user" else ["Thank you."])
        say("assistant", parts if role == "assistant" else ["I see it here."])
    for number in rng.permutation(len(shop.facts)):
        asked, question, answer = shop.question(shop.facts[number])
        say("user", question)
        say("assistant", [answer], learned=True)
        if ends or tokens > size:
            break
    return {"messages": messages, "asked": asked}


def write_notes(rng: np.random.Generator, products: Sequence[str], size: int) -> dict[str, Any]:
    """A few facts that are said again and again, in any order. What is learned is the slot, from the second time on."""
    shop = Shop(rng, products)
    facts = [fact for _ in range(rng.integers(2, 5)) if (fact := shop.new_fact())]
    segments: list[dict[str, Any]] = []

    def say(part: Any, learned: bool = False) -> int:
        shown = isinstance(part, tuple)
        segments.append({"image": part[1]} if shown else {"text": part + " "} | ({} if learned else {"loss": False}))
        return 1 if shown else len(part.split())

    tokens = sum(say(part) for fact in facts for part in stated(fact)[1])
    while tokens < size:
        fact = facts[rng.integers(len(facts))]
        about = fact["about"] if fact["about"] != "product" else ("product", "order")[rng.integers(2)]
        before, after = ANSWERS[about].split("{" + SLOTS[about] + "}")
        tokens += say(before.format(**fact)) + say(fact[SLOTS[about]], learned=True) + say(after)
    return {"segments": segments}


def build(emoji: Path, out: Path, sizes: dict[str, tuple[int, int]] = SIZES, seed: int = 0) -> dict[str, int]:
    """Writes `notes/`, `short/`, `long/`, `heldout/` and `tokenizer/`; returns how many samples there are."""
    products = read_products(emoji)
    source = Source(
        kind="shop",
        origin=f"seed {seed}",
        recipe=[2, seed, sizes, sorted(products)],
        items=functools.partial(_items, sizes),
        render=functools.partial(_render, products=products, sizes=sizes, seed=seed),
        total=max(count for _, count in sizes.values()),
        splits=tuple(sizes),
    )
    answer = build_shards(source, out, BuildOptions())
    replace_folder(out / "tokenizer", functools.partial(save_tokenizer, names=list(products)))
    return answer["counts"]


def _items(sizes: dict[str, tuple[int, int]], split: str, start: int) -> Iterator[Item]:
    for number in range(start, sizes[split][1]):
        yield Item(f"{split}-{number:06d}", split=split)


def _render(item: Item, products: dict[str, bytes], sizes: dict[str, tuple[int, int]], seed: int) -> Rendered:
    digest = hashlib.blake2b(f"{seed}\0{item.key}".encode(), digest_size=8).digest()
    rng, size = np.random.default_rng(int.from_bytes(digest, "big")), sizes[item.split][0]
    members: Members = {"__key__": item.key}

    def member(name: str) -> str:
        members[f"{name}.png"] = products[name]
        return f"{name}.png"

    if item.split == "notes":
        document = write_notes(rng, list(products), size)
        document["segments"] = [{"image": member(s["image"])} if "image" in s else s for s in document["segments"]]
    else:
        document = write_chat(rng, list(products), size, ends=item.split == "heldout")
        for message in document["messages"]:
            message["content"] = [
                {"type": "image", "image": member(part[1])}
                if isinstance(part, tuple)
                else {"type": "text", "text": part}
                for part in message["content"]
            ]
    return Rendered({**members, "json": encode_json(document)})


def save_tokenizer(folder: Path, names: Sequence[str]) -> None:
    """A tokenizer that makes one token of each word, number and order number that can occur."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    spoken = [*QUESTIONS.values(), *ANSWERS.values(), "My is order. Thank you. I see it here. User: Assistant:"]
    spoken += [text for pair in SMALL_TALK for text in pair]
    words = [word for text in spoken for word, _ in splitter.pre_tokenize_str(text)]
    words = ["<|endoftext|>", "<|unknown|>", *map(str, range(1, 29)), *ORDERS, *KINDS, *names, *words]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<|unknown|>"))
    tokenizer.pre_tokenizer = splitter  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece(prefix="##")  # type: ignore[assignment]  # puts spaces between words
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        unk_token="<|unknown|>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("emoji", type=Path, help="what `mmctx data build emoji` wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(build(arguments.emoji, arguments.out))
