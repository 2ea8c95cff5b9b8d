"""Reviews whose label turns on negation and on a reversal, so that no bag of words gives it away.

A statement is good or bad: praise or blame, either of them possibly negated ("not exactly a bad story" is good). A
review makes statements of either kind at random and ends in a verdict of two, one good and one bad, of which the main
clause counts: "its main weakness is the plot, but ..." is overruled by what follows, "..., although ..." by what
precedes. Both statements of the verdict are drawn in the same way and independently of which is the main clause; so the
words of a review, as a bag, are distributed alike in both classes, and so is its length.
"""

from dataclasses import dataclass

from pipeline.corpora.sample.draws import Draws


@dataclass(frozen=True)
class Words:
    """Praise or blame, by the frame it stands in."""

    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]
    nouns: tuple[str, ...]


GOOD = Words(
    ("good", "lovely", "clever", "moving", "splendid", "graceful", "witty", "honest"),
    ("recommend", "enjoy", "admire", "praise"),
    ("strength", "joy", "triumph", "virtue"),
)
BAD = Words(
    ("bad", "dull", "clumsy", "tedious", "dreadful", "shallow", "stale", "false"),
    ("avoid", "regret", "dislike", "mock"),
    ("weakness", "bore", "failure", "flaw"),
)
PARTS = ("story", "plot", "cast", "music", "ending", "script", "pace", "camera", "dialogue", "setting")
DEGREES = ("exactly", "really", "quite", "entirely", "truly", "simply")
GENRES = ("comedy", "western", "mystery", "romance", "thriller", "fable")
ROLES = ("lighthouse keeper", "retired judge", "young baker", "lost pilot", "shy clerk", "travelling singer",
         "village doctor", "stubborn gardener")  # fmt: skip
TITLES = ("The Silver Harbour", "Nine Lanterns", "A Winter Orchard", "Paper Bridges", "The Last Ferry", "Quiet Engines")
REMARKS = (
    "We saw it on a rainy evening with two friends.",
    "It runs for almost two hours.",
    "My sister had read the book before.",
    "The theatre was half empty that night.",
    "Most of it was shot in a small town by the sea.",
    "There is a long scene on a train in the middle.",
    "The same people made a film about a circus last year.",
    "It starts with a letter, and it ends with another one.",
)
LEADS = ("All in all, ", "In the end, ", "Overall, ", "To sum up, ")
NEGATED = 0.3
WORDS = (30, 80)


def review(good: bool, draws: Draws) -> str:
    """One review of 30 to 80 words whose verdict is good or bad."""
    sentences = [_opening(draws)]
    length = draws.between(WORDS[0] + 6, WORDS[1] - 22)
    while sum(len(sentence.split()) for sentence in sentences) < length - 14:
        sentences.append(draws.choice(REMARKS) if draws.chance(0.3) else _opinion(draws))
    sentences.append(_verdict(good, draws))
    text = sentences[0]
    for sentence in sentences[1:]:
        text += ("<br /><br />" if draws.chance(0.15) else " ") + sentence
    return text


def reviews(count: int, draws: Draws, taken: set[str]) -> list[tuple[int, str]]:
    """(label, text) of both classes in turn, no text twice and none of `taken`, to which they are added."""
    made: list[tuple[int, str]] = []
    while len(made) < count:
        label = len(made) % 2
        text = review(label == 1, draws)
        if text not in taken:
            taken.add(text)
            made.append((label, text))
    return made


def _opening(draws: Draws) -> str:
    return f"{draws.choice(TITLES)} is a {draws.choice(GENRES)} about a {draws.choice(ROLES)}."


def _opinion(draws: Draws) -> str:
    first = statement(draws.chance(0.5), draws)
    if draws.chance(0.4):
        return _sentence(f"{first} and {statement(draws.chance(0.5), draws)}")
    return _sentence(first)


def _verdict(good: bool, draws: Draws) -> str:
    main, aside = statement(good, draws), statement(not good, draws)
    forms = (
        f"{aside}, but {main}",
        f"although {aside}, {main}",
        f"{aside}; still, {main}",
        f"{main}, although {aside}",
    )
    form = draws.choice(forms)
    return draws.choice(LEADS) + form + draws.choice((".", ".", "!"))


def statement(good: bool, draws: Draws) -> str:
    """A clause that says something good or bad, by praise or blame, negated or not."""
    negated = draws.chance(NEGATED)
    words = GOOD if good != negated else BAD
    part, frame = draws.choice(PARTS), draws.between(0, 3)
    if frame == 0:
        adjective, degree = draws.choice(words.adjectives), draws.choice(DEGREES)
        return f"the {part} is {'not ' if negated else ''}{degree} {adjective}"
    if frame == 1:
        adjective, degree = draws.choice(words.adjectives), draws.choice(DEGREES)
        return f"it is {'not ' if negated else ''}{degree} a {adjective} {part}"
    if frame == 2:
        return f"I {'do not' if negated else 'must'} {draws.choice(words.verbs)} the {part}"
    noun = draws.choice(words.nouns)
    return f"the {part} is no {noun}" if negated else f"its main {noun} is the {part}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
