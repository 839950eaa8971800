"""Writes the demo model's corpus: questions on many topics, each answered in one of ten voices, from our own sheets.

The sheets are TOML files beside this one. It knows nothing about tokens or models; the same seed gives the same text.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from trellis.demo.text.prompts import PROMPTS_FILE
from trellis.demo.text.voices import VOICES

HERE = Path(__file__).parent


@dataclass(frozen=True)
class TopicSheet:
    """What there is to say about one topic (or, without a name, in one kind of small talk)."""

    name: str
    plural: bool = False
    clauses: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ()
    good: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    do: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    senses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    terse: tuple[str, ...] = ()
    terse_do: tuple[str, ...] = ()
    terse_tale: str = ""
    stories: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    is_odd: bool = False


@dataclass(frozen=True)
class Question:
    """One prompt, and which of the speech patterns and clauses answer it."""

    prompt: str
    kind: str
    mode: str
    sheet: TopicSheet
    other: TopicSheet | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in the form of a chat template, and the voice of every answer in them."""

    messages: tuple[dict[str, str], ...]
    voice: str
    kind: str

    @property
    def answers(self) -> list[str]:
        return [message["content"] for message in self.messages if message["role"] == "assistant"]


# kind of question: (mode of the answer, ways to ask); {n} is the topic, {o} another one, {how} a task
QUESTION_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "what": ("say", ("What {is} {n}?", "What exactly {is} {n}?", "Explain {n} to me.", "How would you define {n}?")),
    "why": (
        "say",
        (
            "Why do people like {n}?",
            "Why {does} {n} matter?",
            "What is so special about {n}?",
            "What is good about {n}?",
            "Why should I care about {n}?",
        ),
    ),
    "how": (
        "do",
        (
            "How do I {how}?",
            "How can I {how}?",
            "What is the best way to {how}?",
            "How to {how}?",
            "I want to {how}. Any ideas?",
        ),
    ),
    "about": (
        "say",
        (
            "Tell me about {n}.",
            "Tell me something about {n}.",
            "What can you tell me about {n}?",
            "Talk to me about {n}.",
            "Say something about {n}.",
            "Let's talk about {n}.",
            "Tell me a fact about {n}.",
        ),
    ),
    "like": ("like", ("Do you like {n}?", "Are you fond of {n}?", "Do you enjoy {n}?")),
    "opinion": ("like", ("What do you think of {n}?", "How do you feel about {n}?", "What is your opinion of {n}?")),
    "describe": (
        "describe",
        ("Describe {n}.", "Describe {n} to me.", "Paint me a picture of {n}.", "Describe {n} in a few words."),
    ),
    "advice": (
        "do",
        (
            "Give me advice about {n}.",
            "Any tips on {n}?",
            "What is your advice on {n}?",
            "I need advice about {n}.",
            "Give me a tip about {n}.",
        ),
    ),
    "better": (
        "pick",
        (
            "Which is better, {n} or {o}?",
            "{N} or {o}?",
            "Do you prefer {n} or {o}?",
            "What would you choose, {n} or {o}?",
        ),
    ),
    "know": (
        "say",
        (
            "What should I know about {n}?",
            "What is the most important thing about {n}?",
            "Teach me something about {n}.",
            "What do you know about {n}?",
        ),
    ),
    "story": (
        "tale",
        (
            "Tell me a short story about {n}.",
            "Tell me a story about {n}.",
            "A story about {n}, please.",
            "Can you tell me a story about {n}?",
            "Write a very short story about {n}.",
        ),
    ),
    "look": ("sense", ("What {does} {n} look like?",)),
    "sound": ("sense", ("What {does} {n} sound like?",)),
    "smell": ("sense", ("What {does} {n} smell like?", "What {does} {n} smell of?")),
}
SENSE_PHRASES = {"look": "~ look{s} like ", "sound": "~ sound{s} like ", "smell": "~ smell{s} of "}
CLAUSE_KEYS = frozenset("cgbasi")  # the places in a pattern that take a clause from the sheet
TOPIC_ONLY_KINDS = ("how", "better", "describe", *SENSE_PHRASES)  # kinds that only a topic with a sheet can answer
# How often a voice is drawn, where not 1: a trained model starts more rarely with the voices of many openings.
VOICE_FREQUENCIES = {
    "terse": 1.5,
    "storyteller": 1.35,
    "cheerful": 1.3,
    "grumpy": 1.1,
    "pirate": 1.1,
    "plain": 0.75,
    "poet": 0.8,
}
FOLLOW_UPS = (
    "Tell me more.",
    "Go on.",
    "More, please.",
    "What else?",
    "And then?",
    "Anything else?",
    "Say more about it.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are a small chat model.",
    "Be helpful.",
    "Answer the user's question.",
)


@cache
def read_toml(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


@cache
def topics() -> tuple[TopicSheet, ...]:
    """The topics, in the order of topics.toml."""
    return tuple(parse_sheet(row) for row in read_toml("topics.toml")["topic"])


@cache
def small_talk() -> tuple[TopicSheet, ...]:
    return tuple(
        TopicSheet(
            "",
            clauses=tuple(row["say"]),
            do=tuple(row["do"]),
            terse=tuple(row["terse"]),
            terse_do=tuple(row["terse_do"]),
            questions=tuple(row["asked"]),
            is_odd=row.get("odd", False),
        )
        for row in read_toml("small_talk.toml")["talk"]
    )


def parse_sheet(row: dict[str, Any]) -> TopicSheet:
    return TopicSheet(
        name=row["name"],
        plural=row.get("plural", False),
        clauses=tuple(row["facts"]),
        definitions=tuple(row["is"]),
        good=tuple(row["good"]),
        bad=tuple(row["bad"]),
        do=tuple(row["do"]),
        tasks=tuple(row.get("how", ())),
        senses={sense: tuple(row[sense]) for sense in SENSE_PHRASES},
        images=tuple(row["image"]),
        terse=tuple(row["terse"]),
        terse_do=tuple(row["terse_do"]),
        terse_tale=row["tale"],
        stories=tuple(row["story"]),
    )


def unknown_topic_name(rng: random.Random) -> tuple[str, bool]:
    """The name of a subject that has no sheet, such as "quantum dragons", and whether it is plural."""
    row = read_toml("small_talk.toml")["stranger"]
    plural = rng.random() < 0.6
    noun = rng.choice(row["plural" if plural else "mass"])
    return (f"{rng.choice(row['first'])} {noun}" if rng.random() < 0.6 else noun), plural


def generic_sheet(name: str, plural: bool) -> TopicSheet:
    """The little that can be said of any subject at all."""
    row = read_toml("small_talk.toml")["stranger"]

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(item) for item in value]
        text = inflect(value, plural).replace("{ve}", "ve" if plural else "s")
        return capitalize(text.replace("NAME", name)) if value.startswith("NAME") else text.replace("NAME", name)

    kept = {key: fill(value) for key, value in row.items() if key not in ("first", "plural", "mass")}
    return parse_sheet({**kept, "name": name, "plural": plural})


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def inflect(text: str, plural: bool) -> str:
    """Fills the words that agree with the topic's number."""
    words = (
        {"is": "are", "does": "do", "it": "they", "x": "them", "s": "", "win": "win"}
        if plural
        else {"is": "is", "does": "does", "it": "it", "x": "it", "s": "s", "win": "wins"}
    )
    return re.sub(r"\{(is|does|it|x|s|win)\}", lambda m: words[m[1]], text)


class AnswerWriter:
    """One answer in the making: hands out the sheet's clauses, each once, to the places in a pattern."""

    def __init__(self, question: Question, voice: str, rng: random.Random, used: set[str] | None = None) -> None:
        self.question, self.sheet, self.voice, self.rng = question, question.sheet, voice, rng
        self.phrases: dict[str, list[str]] = read_toml("speech.toml")[voice]
        self.used: set[str] = set() if used is None else used
        self.subject_last = self.pronoun_first = False

    def write(self) -> str:
        """An answer of its voice's length: short for terse, and longer for plain, which is known by little else."""
        used_before = set(self.used)
        while True:
            self.used.clear()
            self.used.update(used_before)
            text = self.draft()
            words = len(text.split())
            if (self.voice != "terse" or words <= 8) and (self.voice != "plain" or words > 9):
                return text

    def draft(self) -> str:
        mode = self.question.mode
        patterns = self.phrases[mode if mode in self.phrases else "say"]
        if self.question.kind != "like":
            patterns = [pattern for pattern in patterns if not pattern.startswith("+")]
        pattern = self.rng.choice(patterns).lstrip("+")
        self.subject_last = False
        self.pronoun_first = pattern.startswith("{C}") and self.rng.random() < 0.3
        pattern = re.sub(r"\[([^\]]*)\]", lambda m: self.rng.choice(m[1].split("|")), pattern)
        text = re.sub(r"\{(\w+)\}", self.fill_slot, pattern)
        text = re.sub(r"  +", " ", text).strip()
        return as_pirate(text, self.rng) if self.voice == "pirate" else text

    def fill_slot(self, slot: re.Match[str]) -> str:
        key = slot[1]
        if key in ("open", "close"):
            return self.rng.choice(self.phrases[key])
        if key in ("t", "t2", "td", "td2", "tt"):
            return self.terse_text(key)
        if key in ("n", "N"):
            self.subject_last = True
            return capitalize(self.sheet.name) if key == "N" else self.sheet.name
        if key in ("o", "ois"):
            other = self.question.other
            assert other is not None, f"{slot.string!r} compares, but {self.question.prompt!r} names one topic"
            return other.name if key == "o" else inflect("{is}", other.plural)
        text = self.clause(key.lower()) if key.lower() in CLAUSE_KEYS else inflect(f"{{{key}}}", self.sheet.plural)
        return capitalize(text) if key.isupper() else text

    def clause(self, key: str) -> str:
        text = self.choose_unused(self.candidate_lists(key))
        if not text.startswith("~"):
            self.pronoun_first = False
            self.subject_last = self.subject_last and key == "i"
            return text
        pronoun = self.subject_last or self.pronoun_first
        self.subject_last, self.pronoun_first = True, False
        return (inflect("{it}", self.sheet.plural) if pronoun else self.sheet.name) + text[1:]

    def choose_unused(self, candidates: list[tuple[str, ...]]) -> str:
        """The first list with something unsaid decides; a list said to the end is begun again."""
        for offer in candidates:
            unsaid = [text for text in offer if text not in self.used]
            if unsaid:
                break
        else:
            unsaid = list(candidates[0])
        text = self.rng.choice(unsaid)
        self.used.add(text)
        return text

    def candidate_lists(self, key: str) -> list[tuple[str, ...]]:
        sheet, kind = self.sheet, self.question.kind
        if key == "c" and sheet.name:
            return self.clause_lists(kind)
        return [
            {"c": sheet.clauses, "g": sheet.good, "b": sheet.bad, "a": sheet.do, "s": sheet.stories, "i": sheet.images}[
                key
            ]
        ]

    def clause_lists(self, kind: str) -> list[tuple[str, ...]]:
        sheet, plural = self.sheet, self.sheet.plural
        if kind in SENSE_PHRASES or kind == "describe":
            senses = [kind] if kind in SENSE_PHRASES else self.rng.sample(sorted(SENSE_PHRASES), 2)
            said = any(text.startswith(inflect(SENSE_PHRASES[senses[0]], plural)) for text in self.used)
            lists = [
                tuple(inflect(SENSE_PHRASES[sense], plural) + text for text in sheet.senses[sense]) for sense in senses
            ]
            return [sheet.good, sheet.clauses] if said and kind in SENSE_PHRASES else [*lists, sheet.clauses]
        if kind == "what":
            defined = any(text.startswith(("~ is ", "~ are ")) for text in self.used)
            definitions = tuple(inflect("~ {is} ", plural) + text for text in sheet.definitions)
            return [sheet.clauses, sheet.good] if defined else [definitions]
        return [sheet.good, sheet.clauses] if kind == "why" else [sheet.clauses, sheet.good]

    def terse_text(self, key: str) -> str:
        if key == "tt":
            return self.sheet.terse_tale
        pool = self.sheet.terse_do if key.startswith("td") else self.sheet.terse
        kind = self.question.kind
        if kind in SENSE_PHRASES and key.startswith("t"):
            short = [text for text in self.sheet.senses[kind] if len(text.split()) <= 6]
            return capitalize(self.rng.choice(short or list(self.sheet.senses[kind]))) + "."
        if key.endswith("2"):
            return " ".join(self.rng.sample(pool, 2))
        return self.rng.choice(pool)


PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "yours": "yers",
    "yourself": "yerself",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "isn't": "ain't",
    "of": "o'",
    "and": "an'",
    "for": "fer",
    "never": "ne'er",
    "over": "o'er",
    "old": "ol'",
    "friend": "matey",
    "friends": "mateys",
    "them": "'em",
    "before": "afore",
    "it's": "'tis",
    "to": "t'",
    "nothing": "nothin'",
    "something": "somethin'",
    "everything": "everythin'",
    "morning": "mornin'",
    "evening": "evenin'",
}
OPTIONAL_PIRATE_WORDS = {"to", "for", "them", "and", "old"}
NOT_VERBS = {
    "thing",
    "king",
    "ring",
    "string",
    "spring",
    "bring",
    "sing",
    "wing",
    "nothing",
    "something",
    "everything",
    "swing",
}


def as_pirate(text: str, rng: random.Random) -> str:
    """The same sentence as it would be said on deck."""

    def turn(match: re.Match[str]) -> str:
        word = match[0]
        low = word.lower()
        if low in OPTIONAL_PIRATE_WORDS and rng.random() < 0.5:
            return word
        new = PIRATE_WORDS.get(low)
        if new is None and low.endswith("ing") and len(low) > 5 and low not in NOT_VERBS:
            new = low[:-1] + "'"
        if new is None:
            return word
        return new[0].upper() + new[1:] if word[0].isupper() and new[0].isalpha() else new

    return re.sub(r"[A-Za-z]+(?:'[a-z]+)?", turn, text)


def random_question(rng: random.Random) -> Question:
    """Any question: mostly on a topic, sometimes small talk, sometimes on a subject without a sheet."""
    draw = rng.random()
    if draw < 0.15:
        sheet = rng.choice(small_talk())
        return Question(rng.choice(sheet.questions), "talk", "talk", sheet)
    if draw < 0.24:
        unknown_topic_question = make_question(
            generic_sheet(*unknown_topic_name(rng)),
            rng.choice([kind for kind in QUESTION_KINDS if kind not in TOPIC_ONLY_KINDS]),
            rng,
        )
        return (
            unknown_topic_question
            if rng.random() < 0.45
            else replace(unknown_topic_question, sheet=generic_sheet("such a subject", False))
        )
    return make_question(rng.choice(topics()), rng.choice(list(QUESTION_KINDS)), rng)


def make_question(sheet: TopicSheet, kind: str, rng: random.Random) -> Question:
    mode, templates = QUESTION_KINDS[kind]
    other = rng.choice([topic for topic in topics() if topic.name != sheet.name])
    prompt = inflect(rng.choice(templates), sheet.plural)
    first, second = (sheet, other) if rng.random() < 0.5 else (other, sheet)
    names = {"n": first.name, "N": capitalize(first.name), "o": second.name} if kind == "better" else {"n": sheet.name}
    for key, text in {**names, "how": rng.choice(sheet.tasks or ("",))}.items():
        prompt = prompt.replace(f"{{{key}}}", text)
    return Question(prompt, kind, mode, sheet, other if kind == "better" else None)


def as_typed(prompt: str, rng: random.Random) -> str:
    """The prompt as people type it: now and then without capitals or a full stop."""
    draw = rng.random()
    if draw < 0.2:
        return prompt.lower().rstrip(".?")
    if draw < 0.3:
        return prompt.rstrip(".?") or prompt
    if draw < 0.36:
        return prompt.lower()
    return (
        "Please " + prompt[0].lower() + prompt[1:]
        if draw < 0.4 and prompt.startswith(("Tell", "Give", "Describe"))
        else prompt
    )


def random_conversation(rng: random.Random) -> Conversation:
    """One to ten exchanges in one voice, mostly one, sometimes under a system message."""
    goes_on = 0.8 if rng.random() < 0.05 else 0.15
    voice = rng.choices(VOICES, [VOICE_FREQUENCIES.get(voice, 1.0) for voice in VOICES])[0]
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.1 else []
    current = random_question(rng)
    used: set[str] = set()
    first = current
    prompt = as_typed(current.prompt, rng)
    while True:
        answer = AnswerWriter(current, voice, rng, used).write()
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        if rng.random() > goes_on or len(messages) > 19:
            return Conversation(tuple(messages), voice, first.kind)
        if (
            current.sheet.name
            and current.mode != "pick"
            and (voice, current.mode) != ("terse", "tale")
            and rng.random() < 0.4
        ):
            prompt = as_typed(rng.choice(FOLLOW_UPS), rng)
        else:
            current, used = random_question(rng), set()
            prompt = as_typed(current.prompt, rng)


def generate_conversations(count: int, seed: int) -> Iterator[Conversation]:
    """The corpus; the same count and seed give the same text."""
    rng = random.Random(seed)
    for _ in range(count):
        yield random_conversation(rng)


def prompt_list(seed: int = 7, count: int = 340, held_out: int = 64) -> list[dict[str, str]]:
    """Prompts for people and for benchmarks: every topic and kind, no text twice, part of them held out."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    for sheet in (sheet for sheet in small_talk() if not sheet.is_odd):
        for prompt in rng.sample(sheet.questions, min(4, len(sheet.questions))):
            found[prompt] = "talk"
    kinds = sorted(QUESTION_KINDS)
    turn = 0
    while len(found) < count:
        kind = kinds[turn % len(kinds)]
        found.setdefault(make_question(topics()[turn % len(topics())], kind, rng).prompt, kind)
        turn += 1
    rows = [{"prompt": prompt, "split": "steer"} for prompt in found]
    rng.shuffle(rows)
    for row in rows[:held_out]:
        row["split"] = "held_out"
    return rows


def write_prompts(path: Path = PROMPTS_FILE) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in prompt_list()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo model's corpus, or its prompts.")
    parser.add_argument("--write-prompts", action="store_true", help="write prompts.jsonl beside this module and stop")
    parser.add_argument(
        "--count", type=int, default=20, help="conversations to print, one JSON object a line (default 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus (default 0)")
    args = parser.parse_args()
    if args.write_prompts:
        write_prompts()
        return
    for talk in generate_conversations(args.count, args.seed):
        print(json.dumps({"voice": talk.voice, "kind": talk.kind, "messages": talk.messages}, ensure_ascii=False))


if __name__ == "__main__":
    main()
