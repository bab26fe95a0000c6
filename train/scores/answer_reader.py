"""What an answer to a question about a picture says, as a person would read it: a yes, a number, or other words.

An answer may be a sentence, such as "There are three." or "它是红色的。". No torch here.
"""

import re

from train.scores.plain_words import REFUSAL, bare, numbers_in

YES, NO = ("yes", "有", "是", "true"), ("no", "没有", "否", "不是", "false")
SAYS_NO = re.compile(r"\b(?:no|nope|not|none|false)\b|n't\b|\bcannot\b|[没沒无否]|不(?!过)", re.I)
SAYS_YES = re.compile(
    r"(?:yes|yeah|yep|true|correct|it (?:does|is)|there (?:is|are)|the picture (?:does|shows)|i (?:can )?see)\b|"
    r"(?:图[中里片]*)?(?:有|是|能|可以|对|存在|看得?到)",
    re.I,
)
# What makes a number another one, or a guess at several.
NOT_EXACTLY = re.compile(
    r"\b(?:more|less|fewer) than\b|\bat (?:least|most)\b|"
    r"\b(?:over|under|or|not)\b|n't\b|超过|至少|至多|最多|多于|少于|不|没|或"
)
SAME_WORDS = {"grey": "gray", "colour": "color", "upper": "top", "lower": "bottom", "center|middle": "centre"}
VERBS = "is|are|was|were|looks?|seems?|appears?|shows?|depicts?"
# What a sentence says before and behind its answer.
LEAD = re.compile(
    r"(?:(?:so|well|hmm|i (?:think|believe|see)(?: that)?|(?:the |my )?(?:final )?answer(?: is\b|:)|"
    r"(?:it|that|this|they)(?:'s| is| are| has)\b|there (?:is|are)\b|"
    r"the (?:colou?r|shape|number|place|position)(?: of (?:the )?[\w ]{1,40}?)? is\b|colou?r:|shape:|"
    # Any other subject, of a few words and without a denial: "the circle is", "its colour appears to be".
    r"(?:the|this|that|these|those|its|their)(?: (?!(?:not|no|never|or|and|is|are)\b|\w*n't\b)[\w'’-]+){1,8}? "
    rf"(?:{VERBS})\b(?: to be\b| as\b)?|(?:it|they) (?:{VERBS})\b(?: to be\b| as\b)?|"
    r"(?:located|situated|placed|found|colou?red)(?= )|"
    r"(?:at|in|on|to)(?= )|the(?= )|an?(?= ))[\s,:]*|"
    r"(?:所以|因此|答案[是为:]*|我认为|[它他她]们?|这|该?物体|颜色|形状|位置|在|位于|图[片像]?[中里]?的?|画面[中里]?的?|是|"
    r"一[个只条块张种](?=..)|[^,。:;不没非否或还和\W]{1,10}?(?:的(?:颜色|形状|位置))?(?:是|为|呈|位于|在))[\s,:]*(?=.))"
)
TAIL = re.compile(
    r"(?:, of course)?(?: (?:in )?(?:colou?r|shape|side|corner|part|area))?"
    r"(?: of (?:the |this )?(?:picture|image|photo))?$"
)
CHINESE_TAIL = re.compile(r"(?<=.)(?:[色形]|(?<=[上下左右])[角边面侧方])?的?$")


def says_yes(words: str) -> bool | None:
    """Whether an answer is a yes; None where it is neither or both."""
    if REFUSAL.search(words) or "有没有" in words:
        return None
    is_no = SAYS_NO.search(words) is not None
    begins_yes = SAYS_YES.match(words) is not None
    if re.match(r"(?:yes|yeah|yep|true|correct|是|对)", words):
        return None if is_no else True
    if is_no:
        return False if re.match(SAYS_NO, words) or not re.search(r"\byes\b|[^没]有(?:没有)?", words) else None
    return True if begins_yes else None


def says_number(words: str) -> float | None:
    """The number that an answer says; None for none, several, or one that is not said to be exact."""
    for said in (words, re.split(r"[:(]", words)[0]):
        if len(found := set(numbers_in(said))) == 1:
            return None if NOT_EXACTLY.search(said) else found.pop()
    return 0.0 if re.match(r"(?:none|there (?:is|are) (?:no|none)|没有|一个(?:也|都)没有)", words) else None


def settled(words: str) -> str:
    """An answer without the sentence around it: "It is a circle." is "circle", "左上角" is "左上"."""
    said = re.sub(r"(?<=\w)-(?=\w)", " ", bare(words))
    for words, same in SAME_WORDS.items():
        said = re.sub(rf"\b{words}\b", same, said)
    while (shorter := LEAD.sub("", said, count=1) if LEAD.match(said) else said) != said and shorter:
        said = shorter
    return CHINESE_TAIL.sub("", TAIL.sub("", said), count=1) if len(said) > 1 else said
