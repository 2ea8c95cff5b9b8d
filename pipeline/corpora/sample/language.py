"""Sentences with long-distance agreement, made by a grammar whose entropy a token is known exactly.

What a model has to carry over a distance: the number of the subject past relative clauses to its verb, also when they
are nested; the domain, set by the place at the start, to every noun, verb and adjective of the sentence; the closing
word that answers the opening one ("ask ... please"); the second half of "if ... then" and "either ... or".
"""

import functools

from pipeline.corpora.sample.draws import Draws
from pipeline.corpora.sample.grammar import Grammar, Production, zipf

PLACES = {
    "sea": ("ashore", "afloat", "seaward"),
    "farm": ("afield", "uphill", "upstream"),
    "town": ("downtown", "indoors", "uptown"),
    "sky": ("aloft", "overhead", "skyward"),
}
NOUNS = {
    "sea": "sailor boat gull whale anchor lobster pilot crab diver net captain island",
    "farm": "farmer cow goat orchard plough hen shepherd barn lamb mill gardener fence",
    "town": "baker clerk tram porter judge tailor lamp painter market mayor cellar teacher",
    "sky": "kite swallow comet cloud rocket eagle star balloon glider moon falcon rainbow",
}
INTRANSITIVE = {
    "sea": "drift sink float swim dive row surface capsize",
    "farm": "graze ripen rest bleat dig sprout wander plod",
    "town": "hurry queue gossip nap argue stroll bargain retire",
    "sky": "glow soar hover fade spin shimmer descend vanish",
}
TRANSITIVE = {
    "sea": "haul tow sight steer moor chase hook salvage",
    "farm": "feed herd milk plant shear guard mend prune",
    "town": "greet hire bill praise sketch envy tutor scold",
    "sky": "circle pursue outshine eclipse track mirror pass lift",
}
ADJECTIVES = {
    "sea": "salty weathered drowsy barnacled sleek tattered grey stormy",
    "farm": "muddy woolly sturdy hungry thorny golden gentle stubborn",
    "town": "polite crowded stern dapper sooty clever busy wealthy",
    "sky": "pale distant weightless silver swift radiant lonely icy",
}
ADVERBS = ("slowly", "often", "rarely", "quietly", "always", "gladly", "never", "boldly", "seldom", "calmly")
BRACKETS = {"ask": "please", "tell": "over", "warn": "beware", "thank": "amen"}
SINGULAR, PLURAL = ("one", "this", "each"), ("some", "these", "many")
END = "."


@functools.cache
def grammar() -> Grammar:
    symbols: dict[str, list[Production]] = {
        "sentence": [
            *[p for d in PLACES for p in zipf(PLACES[d], 0.15, (f"clause.{d}", END))],
            *[Production(0.1, opening, ("place", closing)) for opening, closing in BRACKETS.items()],
        ],
        "place": [p for d in PLACES for p in zipf(PLACES[d], 1.0, (f"clause.{d}",))],
    }
    for domain in PLACES:
        symbols |= _domain(domain)
    return Grammar("sentence", symbols)


def _domain(d: str) -> dict[str, list[Production]]:
    """The symbols of one domain; suffix s: singular, p: plural."""
    nouns, adjectives = NOUNS[d].split(), ADJECTIVES[d].split()
    forms = {"s": nouns, "p": [f"{noun}s" for noun in nouns]}
    symbols: dict[str, list[Production]] = {
        f"clause.{d}": [
            *_determined(f"subject.{d}", 0.85),
            Production(0.09, "if", (f"clause.{d}", "then", f"clause.{d}")),
            Production(0.06, "either", (f"clause.{d}", "or", f"clause.{d}")),
        ],
        f"object.{d}": _determined(f"bare.{d}", 1.0),
    }
    for n in "sp":
        intransitive, transitive = _verbs(INTRANSITIVE[d], n), _verbs(TRANSITIVE[d], n)
        predicate = [
            *zipf(intransitive, 0.3),
            *zipf(transitive, 0.4, (f"object.{d}",)),
        ]
        symbols[f"verb.{d}.{n}"] = [*predicate, *zipf(ADVERBS, 0.2, (f"plain.{d}.{n}",))]
        symbols[f"plain.{d}.{n}"] = predicate
        symbols[f"predicate.{d}.{n}"] = [
            *symbols[f"verb.{d}.{n}"],
            Production(0.45, "that", (f"relative.{d}.{n}", f"verb.{d}.{n}")),
        ]
        symbols[f"relative.{d}.{n}"] = [
            *zipf(transitive, 0.5, (f"object.{d}",)),
            *_determined(f"inner.{d}", 0.5),
        ]
        symbols[f"inner-verb.{d}.{n}"] = [
            *zipf(transitive, 0.8),
            Production(0.2, "that", (f"relative.{d}.{n}", f"inner-plain.{d}.{n}")),
        ]
        symbols[f"inner-plain.{d}.{n}"] = zipf(transitive, 1.0)
    for role, after in (("subject", "predicate"), ("inner", "inner-verb"), ("bare", None)):
        nouns_of = {n: zipf(forms[n], 0.4, (f"{after}.{d}.{n}",) if after else ()) for n in "sp"}
        both = [*nouns_of["s"], *nouns_of["p"]]
        for key, choices in (("s", nouns_of["s"]), ("p", nouns_of["p"]), ("the", both)):
            symbols[f"{role}.{d}.{key}"] = [*choices, *zipf(adjectives, 0.2, (f"{role}.{d}.{key}.noun",))]
            symbols[f"{role}.{d}.{key}.noun"] = list(choices)
    return symbols


def _determined(noun: str, share: float) -> list[Production]:
    """A determiner and the noun it calls for; "the" leaves the number open."""
    return [
        Production(0.4 * share, "the", (f"{noun}.the",)),
        *zipf(SINGULAR, 0.3 * share, (f"{noun}.s",)),
        *zipf(PLURAL, 0.3 * share, (f"{noun}.p",)),
    ]


def _verbs(stems: str, number: str) -> list[str]:
    return [_third_person(stem) if number == "s" else stem for stem in stems.split()]


def _third_person(stem: str) -> str:
    if stem.endswith(("s", "sh", "ch", "x")):
        return f"{stem}es"
    return f"{stem[:-1]}ies" if stem[-1] == "y" and stem[-2] not in "aeou" else f"{stem}s"


def sentences(count: int, draws: Draws) -> tuple[list[list[str]], float]:
    """Sentences as lists of words, and the sum of their log probabilities in nats."""
    drawn = [grammar().sample(draws) for _ in range(count)]
    return [words for words, _ in drawn], sum(log_probability for _, log_probability in drawn)
