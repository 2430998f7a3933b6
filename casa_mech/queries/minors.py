"""Rows that mention minors in a sexual or harmful setting: they are left out by default, and counted.

The filter reads words, so it errs on the side of leaving out. A clip or picture whose text is not at hand cannot be
screened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from casa_mech.queries.query import Label

# "a minor" alone, not "a minor change"; an age of less than eighteen years.
_MINOR = re.compile(
    r"""\b(?: child(?:ren|hood)?(?:['’]?s)? | kids?(?:['’]s)? | minors | under-?\s?aged? | infants? | newborns?
    | (?:pre-?)?teens? | (?:pre-?)?teen-?age(?:d|rs?)? | tweens | adolescents? | juveniles | toddlers? | bab(?:y|ies)
    | school-?(?:child(?:ren)?|boys?|girls?|kids?) | kindergart\w* | pre-?school\w* | daycare
    | (?:elementary|primary|middle|grade)[\s-]school\w* | high[\s-]school\s(?:boy|girl|student|kid)s?
    | (?:little|young|teen|small)\s(?:boy|girl)s? | pa?edophil\w* | csam | lolita | lolicon )\b
    | \b(?:a|an|any|the|this|with|of|to|from)\sminor\b(?!\s+\w)
    | \b(?:[1-9]|1[0-7])[\s-]*years?[\s-]old\b""",
    re.VERBOSE | re.IGNORECASE,
)
# Words that adults are called by too: they count beside a sexual word only.
_MAYBE_MINOR = re.compile(r"\b(?:girls?|boys?|pupils?|youths?|juvenile)\b", re.IGNORECASE)
_SEXUAL = re.compile(
    r"\b(?:sex|sexy|sexual\w*|porn\w*|nudes?|naked|erotic\w*|rap(?:e|ed|ing|ist)s?|molest\w*|incest\w*|prostitut\w*"
    r"|fetish\w*|seduc\w*|undress\w*|fuck\w*|orgasm\w*|masturbat\w*|sleep with|condoms?)\b",
    re.IGNORECASE,
)
_HARM = re.compile(
    r"\b(?:abus(?:e|ed|er|ing|ive)\w*|exploit(?:ed|ing|ation)?|traffick\w*|kidnap\w*|abduct\w*|groom(?:ing|ed)"
    r"|murder\w*|tortur\w*|beat(?:ing)? up)\b",
    re.IGNORECASE,
)
_POLICY = re.compile(
    r"\bchild(?:ren)?[\s_-]*(?:\w+[\s_-]+)?(?:abuse|exploitation|porn\w*|safety|sexual\w*)\b|\bcsam\b", re.I
)


def concerns_minors(texts: Iterable[str], label: Label | None, category: str = "") -> bool:
    """True for a row that mentions minors in a sexual or harmful setting.

    Args:
        texts: all of the row that is language: prompt, plain request, target.
        label: in a harmful row any mention of a minor counts; in another one, only beside a sexual or violent word.
        category: the row's policy or category; one about the abuse or safety of children counts for every label.
    """
    if _POLICY.search(category):
        return True
    text = "\n".join(texts)
    if _MINOR.search(text):
        return label == "harmful" or bool(_SEXUAL.search(text) or _HARM.search(text))
    return bool(_MAYBE_MINOR.search(text) and _SEXUAL.search(text))
