"""Tells the demo model's voices apart by rules on the text alone: no model, quick, for simulated people."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

VOICES: tuple[str, ...] = (
    "plain",
    "pirate",
    "poet",
    "terse",
    "formal",
    "cheerful",
    "questioning",
    "grumpy",
    "storyteller",
    "scientist",
)

# What gives a voice away. Each distinct word or phrase found counts once.
MARKS: dict[str, re.Pattern[str]] = {
    "pirate": re.compile(
        r"\b(?:arr+|ahoy|avast|aye|matey?s?|ye|yer|yers|yerself|ain't|ne'er|afore|doubloons?|landlubbers?"
        r"|scallywags?|(?<!could )(?<!would )(?:it|that|they|i|there|what|who) be|yo ho|me (?:hearty|parrot|words)"
        r"|shiver me|crew|plank|rum|raise the flag)\b|\bo'(?= )|\ban'(?= )|'em\b|\w+in'(?= )"
    ),
    "poet": re.compile(
        r"\n|\bo (?:friend|listen)\b|^o,|\bhush(?: now|ed)\b|\bsoftly now\b|\bmy heart (?:has|leans|says)\b"
        r"|\bkeeps the rest\b|\bi see\n"
    ),
    "formal": re.compile(
        r"\b(?:moreover|furthermore|permit me|allow me|one (?:should|cannot|is bound|ought|would be|might)|ought"
        r"|i trust that|i shall|i should be|with regard to|inasmuch|whereas|respectfully|advisable|customary"
        r"|thereafter|notwithstanding|considered (?:opinion|view|reply)|entirely at your disposal"
        r"|reasonable dispute|obliged|with (?:all due )?respect|by no means|it may fairly|i have it upon"
        r"|it is recorded|decidedly|in the (?:first|second) (?:place|instance)|deserves|relate the following"
        r"|well established|highest regard|possess|on balance|in the second|esteem)\b"
    ),
    "cheerful": re.compile(
        r"!|\b(?:hooray|yay|lovely|wonderful(?:ly)?|delight(?:fully)?|sunshine|dear friend|brilliantly|adore"
        r"|makes me smile|treat|(?:what )?a joy|with joy|beaming|a smile|happily|so happy|warm your heart"
        r"|smiled for a week)\b"
    ),
    "grumpy": re.compile(
        r"\b(?:hmph|ugh|bah|sigh\.|fine, (?:fine|then|[a-z]+, then)|^fine\.|if i must|if you (?:really )?must"
        r"|happy now|leave me in peace|listens to me|never say i|don't (?:say|make|come|tell|expect)|my nap"
        r"|nobody ever says|nothing better to do|typical|must we|woke me|of course\.|not this again|i suppose"
        r"|naturally|neither\.|obviously|all right\?|not that you care|silly contest|does anybody ask me"
        r"|a hundred times|like anyone with sense|i'll (?:admit|grant)|put up with|only ignore me)"
    ),
    "storyteller": re.compile(
        r"(?:^|[.!?] )once, |\b(?:once upon a time|once a king|there was once|long ago(?:,| when| in| a| an| i)\b"
        r"|long time ago|my grand(?:mother|father)|by the fire|closer to the fire|back a while|the old people"
        r"|i have believed it|village to this day|nobody there ever|that was how i learned|from that day on"
        r"|and so it was|told to me|came to our door|my hand and said|told me (?:that|to)|old tales"
        r"|and i answered|i was never sorry|the wisest woman)"
    ),
    "scientist": re.compile(
        r"\b(?:evidence|hypothesis|observ(?:ation|ations|e|es)|measure(?:ment|ments)?|data|experiment|protocol"
        r"|mechanism|variable|control(?: group)?|sample|confidence|effect|further study|case report|scientific"
        r"|findings|define our terms|test (?:this|at home)|question to test|repeated (?:many|since)"
        r"|the record shows|record the result|in addition|on average)\b"
    ),
}
# How much one mark of a voice weighs: a single "matey" says more than a single exclamation mark.
WEIGHTS = {
    "pirate": 2.0,
    "poet": 2.0,
    "formal": 1.5,
    "scientist": 1.5,
    "grumpy": 1.5,
    "storyteller": 1.5,
    "cheerful": 0.9,
}
CLEAR = 0.75  # the second voice must stay below this share of the first one's score
LONGEST_TERSE = 9  # words
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the and or but of to in on at by for from with without as it its they them their is are was were be"
        " been has have had do does did not no never that this these those there here i you your my me we us our"
        " who what when where which than then so if because also more most can could would should will may might"
        " some all each every one",
    )
)


@cache
def lexicon() -> frozenset[str]:
    """Every word of the sheets, which is every word the model was taught."""
    texts = (path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.toml"))
    return frozenset(word for text in texts for word in words_of(text)) | FUNCTION_WORDS


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)*'?", text.lower())


def voice_of(answer: str) -> str | None:
    """The voice of an answer, one of VOICES, or None for gibberish and for what could be two of them."""
    text = answer.strip()
    words = words_of(text)
    if not is_language(text, words):
        return None
    low = text.lower().replace("’", "'")
    scores = {voice: WEIGHTS[voice] * len(set(marks.findall(low))) for voice, marks in MARKS.items()}
    if text.endswith("?") or text.count("?") > 1:
        scores["questioning"] = 1.2
    best = sorted(scores, key=lambda voice: scores[voice], reverse=True)
    if scores[best[0]]:
        return best[0] if scores[best[1]] < CLEAR * scores[best[0]] else None
    if len(words) <= LONGEST_TERSE:
        return "terse"
    return "plain" if sum(word in FUNCTION_WORDS for word in words) / len(words) >= 0.08 else None


def is_language(text: str, words: list[str]) -> bool:
    """Whether it has an end, a capital, and words that are mostly known and not one word over and over."""
    if not words or text[-1] not in '.!?"' or not text[0].isupper():
        return False
    plain_letters = sum(len(word) for word in words) / len(re.sub(r"\s", "", text))
    known = sum(word in lexicon() or word.rstrip("'") in lexicon() for word in words) / len(words)
    often = max(Counter(word for word in words if word not in FUNCTION_WORDS).values(), default=0)
    doubled = re.search(r"\b([a-z]+) \1\b", text.lower())
    return plain_letters > 0.7 and known >= 0.75 and often <= max(3, len(words) // 6) and not doubled
