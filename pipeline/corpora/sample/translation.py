"""A made-up verb-final language and its translation into a made-up verb-second one.

Source: [time] [adjective] subject [adjective] object verb. Target: the verb comes second: after the time, where there
is one, and then before the subject, else after the subject; adjectives follow their noun. The lexicon is one to one and
no word is in both languages, so that to translate is to know the words and to move them.
"""

from pipeline.corpora.sample.draws import Draws
from pipeline.errors import UserError

TIMES = {"örmi": "today", "zela": "soon", "vüto": "once", "quim": "later"}
ADJECTIVES = {"jarö": "small", "pexu": "old", "wük": "red", "tiöz": "cold", "xamo": "kind"}
SUBJECTS = {"brok": "cat", "völin": "girl", "kazü": "uncle", "femi": "horse", "gorx": "boy", "nüba": "fox",
            "luzak": "cook", "hivö": "queen"}  # fmt: skip
OBJECTS = {"tumi": "bread", "sarö": "house", "qebu": "river", "dwoz": "song", "mixa": "stone", "pülo": "garden",
           "zarn": "letter", "kwem": "bell"}  # fmt: skip
VERBS = {"gultek": "finds", "marwek": "paints", "sibzek": "loves", "toxek": "sells", "vandek": "leaves",
         "jumlek": "wants", "prizek": "sees"}  # fmt: skip
LENGTHS = (20, 50)
SOURCES = 80_096  # that there are, of these lengths


def pair(draws: Draws) -> tuple[str, str]:
    """One sentence and its translation."""
    time = draws.choice(sorted(TIMES)) if draws.chance(0.5) else None
    subject, object_, verb = (draws.choice(sorted(words)) for words in (SUBJECTS, OBJECTS, VERBS))
    subject_is, object_is = (draws.choice(sorted(ADJECTIVES)) if draws.chance(p) else None for p in (0.4, 0.5))
    source = [time, subject_is, subject, object_is, object_, verb]
    actor = [SUBJECTS[subject], ADJECTIVES.get(subject_is or "")]
    patient = [OBJECTS[object_], ADJECTIVES.get(object_is or "")]
    target = [TIMES[time], VERBS[verb], *actor, *patient] if time else [*actor, VERBS[verb], *patient]
    return " ".join(filter(None, source)), " ".join(filter(None, target))


def pairs(count: int, draws: Draws, taken: set[str]) -> list[tuple[str, str]]:
    """Pairs of 20 to 50 source characters, no source twice and none of `taken`, to which they are added.

    Raises:
        UserError: there are not so many.
    """
    if len(taken) + count > SOURCES:
        raise UserError(f"the generated translations: expected at most {SOURCES:,} pairs, got {len(taken) + count:,}")
    made: list[tuple[str, str]] = []
    while len(made) < count:
        source, target = pair(draws)
        if source not in taken and LENGTHS[0] <= len(source) <= LENGTHS[1]:
            taken.add(source)
            made.append((source, target))
    return made
