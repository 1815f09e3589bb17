"""Names, keys, values and sentences that chats over texts are made of."""

from __future__ import annotations

from random import Random
from uuid import UUID

ADJECTIVES = (
    "amber ancient brisk calm clever copper crimson dusty eager early faint frosty gentle gilded "
    "hollow humble ivory jolly keen lively lonely lucky mellow misty narrow nimble noble pale "
    "patient plain proud quiet rapid rusty scarlet silent silver simple sleepy slender solid "
    "steady sturdy sunny swift tender tidy upper velvet vivid wandering western wild wooden young"
).split()
NOUNS = (
    "anchor anvil apron barrel basket beacon bell bridge bucket cabin candle canoe castle cellar "
    "chapel clock comet compass cottage crane engine falcon ferry fiddle garden glacier granite "
    "hammer harbor harvest island kettle lantern ledger lighthouse locket magpie marble meadow "
    "mirror monsoon orchard otter parcel pebble pepper pigeon pillow piston quarry ribbon river "
    "saddle satchel shuttle sparrow spindle steeple teapot thimble tunnel valley violin wagon "
    "walnut willow windmill"
).split()
PEOPLE = (
    "Ada Agnes Albert Amir Ana Boris Carla Chen Clara Dmitri Edith Elena Emil Farah Felix Greta "
    "Hana Hugo Ines Ivan Jonas Kemal Kofi Laila Leon Lucia Magnus Maria Mateo Mina Nadia Nils Olga "
    "Omar Oscar Petra Priya Rafael Rosa Samir Sofia Stefan Tara Tomas Ursula Viktor Wanda Yusuf"
).split()
SURNAMES = (
    "Abbott Becker Castillo Dalton Eriksen Fischer Garcia Haddad Ivanov Jansen Kowalski Lindgren "
    "Moreau Novak Okafor Petrov Quinn Rossi Schmidt Tanaka Ueda Varga Whitfield Yilmaz Zeller"
).split()
PLACES = (
    "Aldermoor Brackwater Carrowmere Dunhollow Eastwick Fallowfield Greystone Harrowgate Inverlee "
    "Juniper Kestrel Larkspur Millbrook Northam Oakhurst Pinecrest Queensferry Ravenscar "
    "Stonebridge Thornbury Underhill Westerby Yarrow"
).split()


def phrase(rng: Random) -> str:
    """Like `silent harbor`."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def person(rng: Random) -> str:
    return f"{rng.choice(PEOPLE)} {rng.choice(SURNAMES)}"


def number(rng: Random) -> str:
    size = rng.randint(3, 8)
    return str(rng.randrange(10 ** (size - 1), 10**size))


def uuid(rng: Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def code(rng: Random) -> str:
    """Like `QX-4821`."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(2, 4)))
    return f"{letters}-{rng.randrange(100, 99999)}"


def date(rng: Random) -> str:
    months = "January March April May June July August September October November".split()
    return f"{rng.randint(1, 28)} {rng.choice(months)} {rng.randint(1790, 2030)}"


KEYS = (phrase, person, code, uuid, lambda rng: rng.choice(PLACES), lambda rng: rng.choice(NOUNS))
VALUES = (number, number, phrase, code, uuid, date, lambda rng: rng.choice(NOUNS))

FACTS = (
    ("The access code of {key} is {value}.", "What is the access code of {key}?"),
    ("{key} was filed under {value}.", "Under what was {key} filed?"),
    ("Remember that {key} stands for {value}.", "What does {key} stand for?"),
    (
        "Note to the reader: the entry for {key} reads {value}.",
        "What does the entry for {key} read?",
    ),
    (
        "In the register, {key} is listed with {value}.",
        "With what is {key} listed in the register?",
    ),
    (
        "On the label of {key} somebody had written {value}.",
        "What was written on the label of {key}?",
    ),
    ("(For {key}, use {value}.)", "What should be used for {key}?"),
    ("The reference of {key} has been changed to {value}.", "What is the reference of {key} now?"),
    ("{key}: {value}", "Which value is given for {key}?"),
    ("Whoever asks for {key} must answer {value}.", "What must one answer who asks for {key}?"),
    ("They agreed that {key} would be known as {value}.", "As what would {key} be known?"),
    ("Locker {key} opens with {value}.", "With what does locker {key} open?"),
)
"""A sentence that is put into a text, and what asks for it."""

DIRECT = (
    "{value}",
    "{value}.",
    "It is {value}.",
    "The text says {value}.",
    "The answer is {value}.",
)
"""Answers that do not repeat the sentence."""

INTRODUCTIONS = (
    ("", ""),
    ("Read this text.\n\n", ""),
    ("Here is a document.\n\n<document>\n", "\n</document>"),
    ("The following pages are from a longer work. I will ask about them afterwards.\n\n", ""),
    ("Text:\n\n", "\n\nEnd of the text."),
    ('"""\n', '\n"""'),
    ("I am looking for something in these pages:\n\n", ""),
)
"""What stands before and after a text in a question."""

COPY_REQUESTS = (
    'Repeat the paragraph that begins with "{start}".',
    'Copy out, word for word, the paragraph starting "{start}".',
    'I need the exact wording of the paragraph whose first words are "{start}".',
    'Please quote in full the paragraph that opens with "{start}".',
)
CONTINUE_REQUESTS = (
    'What comes right after "{start}" in the text?',
    'Continue this quotation from the text: "{start}"',
    'The text says "{start}" How does it go on?',
    'Which words follow "{start}"?',
)
MENTION_REQUESTS = (
    'Quote the sentence in which the word "{word}" stands.',
    'Which sentence of the text mentions "{word}"?',
    'Find "{word}" in the text and give me the whole sentence.',
)
SEPARATORS = ("\n\n", "\n\n* * *\n\n", "\n\n---\n\n", "\n\n\n", "\n\n=====\n\n", "\n\n#\n\n")
LEAD_INS = (
    "",
    "To say it once more:\n\n",
    "As was written before:\n\n",
    "The passage in question reads:\n\n",
    "Quoted from above:\n\n> ",
    "Recall these words:\n\n",
    "Compare:\n\n",
    'We read earlier: "',
    "Appendix. The same passage:\n\n",
)
"""What stands between a text and a passage of it that comes again."""
