"""The letter that a reply to a multiple-choice question settles on, as a person would read it.

Labels and options' texts become single marks in the reply, so that one set of patterns reads English and Chinese.
Options that are judged one by one ("A: wrong, B: right") become the conclusion that this is. What is denied is taken
out next ("not A but B"). Then the last conclusion counts, else a label that the reply begins with,
else the only label that is set apart as one, else the only option whose text is named. Nothing is guessed: replies that
name several options and settle on none, and refusals, are unreadable.
"""

import json
import re
from collections.abc import Callable

from train.scores.plain_words import NUMBER, REFUSAL, bare, number_of, whole_number, without_markup

# Marks: a label that is set apart as one, such as "(B)" or "option B"; a bare letter; an option's text.
APART, BARE, TEXT = 0xE000, 0xE100, 0xE200
DOUBT = "\ue300"  # an option's text behind an "A" that may be a label or an article
LABEL, ANY = "[\ue000-\ue1ff]", "[\ue000-\ue2ff]"
SIGNS = r"[^\w\ue000-\ue300]*"
WORDS = "[^.!?;。\ue000-\ue2ff]"  # of the same sentence, without a mark in it

# "The second option" is option number 2, whatever its label.
ORDINALS = list(zip(("first", "second", "third", "fourth", "fifth", "sixth"), "一二三四五六", strict=True))

# Words after which "A" or "I" is a label; before any other word of English it is an article or a pronoun.
AFTER_LABEL = r"is|was|isn't|and|or|but|because|since|as|for|seems|would|can|cannot|must|has"
LETTERS = "0-9A-Za-zÀ-ÖØ-öø-ӿ"  # beside which a letter is no label; a Chinese character may be beside one
SMALL_WORDS = set(
    re.findall(r"\w+", "a an the i is are was were be not no yes or and so but to of in on at it this that one")
)
# Characters beside which a Chinese option of one character is a word of its own.
BEFORE_WORD, AFTER_WORD = "是为选有只条个名位头匹辆朵张棵的", "吧呢啊的"

OPEN, CLOSE = r"[\"'“‘(\[{<「『【]*\s*", r"\s*[\"'”’)\]}>」』】]*"
LIST_END = r"(?:\s*(?:,\s*)?(?:and|or|nor|&|/|、|和|或者?|与|及|还是|也可能是|也是)\s*(?:also\s+)?(?:options?\s+)?)"
# Repetitions give nothing back (`*+`): a reply that repeats itself would take for ever.
LIST = rf"{OPEN}{ANY}{CLOSE}(?:(?:\s*,\s*{OPEN}{ANY}{CLOSE}){{0,26}}+{LIST_END}{OPEN}{ANY}{CLOSE}){{0,26}}+"
ENDS = (
    r"(?=[\"'”’)\]}\s]*(?:选?项|吧|呀)?\s*(?:[.,;:!?。、\n(\[—–-]|$|"
    r"\b(?:because|since|as|for|due|given|based|which|where|with)\b|因))"
)
FILL = (
    r"(?:(?:that|it|is|it's|the|an?|would|should|must|be|to|option|choice|letter|answer|number|clearly|definitely|probably|"
    r"likely|most|actually|simply|just|indeed|obviously|also|correct|right|best|one|therefore|thus|only|:|,|=|-|"
    r"\"|'|“|‘|\(|\[)\s*){0,20}+"
)
FILL_CHINESE = r"[\s,:=]*(?:选项|选择|选|是|为|应|该|的|第|答案){0,10}+[\s:]*[\"'“‘(「『【]*"

# A table or list that judges options one by one: a label, its own text perhaps, and the verdict.
RIGHT = r"(?:(?:correct|right|true|yes|正确|对|是)(?![\w])|[✓✔✅√☑])"
WRONG = r"(?:(?:incorrect|not correct|wrong|false|no|不正确|错误|不对|错|否|不是)(?![\w])|[✗✘❌×✖☒])"
BEFORE_VERDICT = (
    rf"(?P<mark>{LABEL})(?:[^\S\n]*[|:,(-]*[^\S\n]*[\ue200-\ue300])?[^\S\n]*[)\]?.:,;、|(\[–—-]*\s*(?:\(\s*)?"
)
VERDICT = re.compile(
    rf"{BEFORE_VERDICT}(?:(?P<right>{RIGHT})|{WRONG})(?=\s*(?:[.,;:!?)\]|。、\n–—-]|$|{LABEL}|because\b|since\b|as\b|因))"
    r"[)\]|.,;、。]*",
    re.I,
)
# The same with the sign before the label: "[x] B", "✅ B".
SIGNED = re.compile(rf"(?m:^)[\s*+-]*(?:(?P<right>\[x\]|[✓✔✅√☑])|\[ ?\]|[✗✘❌×✖☒☐])\s*(?P<mark>{LABEL})", re.I)

DENIED = [
    re.compile(pattern, re.I)
    for pattern in (
        r"不是" + LIST + r"就是" + LIST,
        r"(?:\bnot\b|n't\b|\bcannot\b|\bnever\b|\bneither\b|\bnor\b|\brather than\b|\binstead of\b|\bas opposed to\b|"
        r"\bexclud(?:e|es|ing)\b|\beliminat(?:e|es|ed|ing)\b|\brul(?:e|es|ed|ing) out\b|\bdiscard(?:ed|ing)?\b|"
        r"\breject(?:ed|ing)?\b|"
        r"\bexcept(?: for)?\b|\bunlike\b|\b(?:anything|all|everything) but\b)\s*"
        r"(?:(?:the|an?|be|to|choose|pick|select|options?|choices?|answers?|letter|correct|right|think|believe|say|that|it|it's|is|was)"
        r"\s+){0,10}+" + LIST,
        LIST
        + r"\s*(?:选项|options?)?\s*(?:is|are|was|were|ca|could|does|do|did|wo|would|should|has|have|can|will|must)?\s*"
        r"(?:n't|\s*not\b|\s+cannot\b)(?!\s+(?:only|wrong|incorrect|false))",
        LIST + r"\s*(?:(?:is|are|was|were|seems?|looks?|can|could|would|must|be|been|both|all|also|clearly|obviously|"
        r"definitely|therefore|thus|to|the|an?)\s+)+"
        r"(?:wrong|incorrect|false|eliminated|excluded|ruled out|impossible|inaccurate|invalid|unlikely|implausible|"
        r"out)\b",
        LIST + r"\s*[:,(–—-]+\s*(?:(?:is|this is)\s+)?"
        r"(?:incorrect|wrong|false|not correct|no(?=\s*(?:[.;,)\n]|$))|[✗✘❌×错])",
        r"\bno\s+[\ue200-\ue2ff]",
        r"\b(?:wrong|incorrect|false)(?: (?:options?|choices?|answers?))?\s*(?:is|are|:)\s*"
        + rf"(?:{OPEN}{ANY}{CLOSE}[,、/]\s*){{0,26}}+"
        + LIST,
        r"(?:不是|并不是|并非|绝非|而非|非|不选|不能选|不应选|不该选|排除了?|不可能是|不会是|不为|除了)\s*(?:选项)?\s*"
        + LIST,
        LIST + r"\s*(?:选?项)?\s*(?:都|均|也|是|就|显然|明显|可以|可|被|则)*\s*"
        r"(?:错误?的?|错了|不对|不正确|不符合?|不合适|不是|不成立|不选|有误|排除)",
    )
]
# From a refusal to the end of the sentence, or to a word that takes it back, nothing is affirmed.
REFUSED = re.compile(
    rf"(?:{REFUSAL.pattern})(?:(?!\b(?:but|however|so|anyway|though|maybe|probably|perhaps|guess)\b|但|不过|可能|也许|猜)[^.!?;。\n])*",
    re.I,
)
CONCLUSIONS = [
    re.compile(pattern, re.I)
    for pattern in (
        rf"\b(?:ans|answer|choice|option|letter|response|solution|selection|conclusion|correct|right|best)\b{WORDS}{{0,80}}?"
        rf"(?:\b(?:is|be|was)\b|'s\b|[:=→]|->|=>)[\s:]*{FILL}(?P<mark>{ANY})",
        rf"\banswer{SIGNS}(?P<mark>{LABEL})",
        rf"\b(?:choose|chose|choosing|pick|picking|select|selecting|go(?:ing)? (?:with|for)|went with|vote for|opt for|"
        rf"settle (?:on|for)|leaning towards?)\s+{FILL}(?P<mark>{ANY})",
        r"\b(?:so|therefore|thus|hence|consequently|overall|finally|in conclusion|meaning|means|leaving|leaves|"
        r"leads to|corresponds to|matches|it is|it's|that is|that's|this is|could be|would be|might be|may be|must be|"
        r"has to be|should be|"
        r"looks like|seems like|think|believe|say|guess|conclude|but|actually|no|wait|rather|sorry|instead|correction|"
        r"i mean|meant|make that|scratch that|definitely|probably|likely|maybe|perhaps|clearly|certainly)\b[\s,:—-]*"
        rf"{FILL}(?P<mark>{ANY}){ENDS}",
        rf"\bmak(?:e|es|ing)\s+{FILL}(?P<mark>{ANY})\s+(?:the|a|our|my)\b",
        rf"(?:=>|->|→|∴)\s*{FILL}(?P<mark>{ANY}){ENDS}",
        rf"(?P<mark>{ANY})\s*(?:(?:is|was|seems?|appears?|looks?|would|must|should|has|to|be)\s+)+(?:\w+\s+){{0,3}}?"
        r"(?:correct|right|answer|best|true|accurate|appropriate|one|choice|option|likely|suitable|fitting|plausible|it)\b",
        rf"(?P<mark>{ANY})\s*[:,(–—-]+\s*(?:(?:is|this is)\s+)?(?:(?:correct|right|true|yes)\b|[✓✔✅])",
        rf"(?P<mark>{LABEL})\s*it is\b",
        rf"(?:答案|正确选项|正确的选项|结论|选择){WORDS}{{0,20}}?(?:是|为|选|:|=)" + FILL_CHINESE + rf"(?P<mark>{ANY})",
        rf"答案[】\])\s]*(?P<mark>{ANY})",
        r"(?:选择?|挑|答|认为是?|觉得是?|判断[为是]|应该?[是为选]|就是|而是|即[为是]?|所以|因此|故|综上|对应|改为|更正为|不对|错了|不,|那么)"
        + FILL_CHINESE
        + rf"(?P<mark>{ANY})",
        rf"是\s*(?P<mark>{ANY}){ENDS}",
        rf"(?P<mark>{ANY})\s*(?:选?项)?\s*(?:是|为|才是|最|更)*\s*(?:正确|对的|最佳|合适|符合|答案|正解)",
    )
]
# What follows a concluded mark and makes it one of several.
FURTHER = re.compile(
    rf"{CLOSE}(?:{LIST_END}{OPEN}(?P<joined>{ANY})|\s*,\s*{OPEN}(?P<listed>{ANY}){CLOSE}(?=\s*(?:$|[.;!?,。\n]|and\b|or\b)))",
    re.I,
)
LEADING = re.compile(
    rf"{SIGNS}(?:option|choice|选项|选)?\s*(?P<mark>{LABEL}){CLOSE}(?:选?项)?(?P<rest>.*)", re.I | re.S
)
ALONE = re.compile(rf"{SIGNS}(?:option|choice|选项)?\s*(?P<mark>{LABEL}){SIGNS}(?:选?项)?{SIGNS}", re.I)
SETTLED = re.compile(r"\s*(?:$|[.,。\n]|because\b|since\b|as\b|for\b|因)", re.I)


def parse_letter(reply: str, options: dict[str, str]) -> str | None:
    """The label of the option that a reply settles on; None where a person would read none, or more than one.

    options: texts by label, such as {"A": "cat", "B": "dog"}. Labels are told from texts: where an option's text is
    itself a label, "B" means the label, which is what questions ask for.
    """
    labels = list(options)
    words = told_answer(without_markup(reply))
    options = {label: without_markup(text) for label, text in options.items()}
    if whole := whole_reply(words, options):
        return whole
    marked = with_verdict(with_marks(words, options))
    # "A?" is a doubt wherever more is said.
    marked = re.sub(rf"{ANY}{CLOSE}\?(?=\s*\w)", "?", marked)
    for pattern in DENIED:
        marked = pattern.sub(" ", marked)
    marked = REFUSED.sub(" ", marked)

    def option_of(mark: str) -> str:
        return labels[ord(mark) & 0xFF]

    for read in (concluded, leading, only_apart, only_text):
        found = read(marked, option_of)
        if found:
            return found if found in options else None
    return None


def with_verdict(marked: str) -> str:
    """The same, with what judges two options or more one by one replaced by the conclusion that it comes to."""
    for pattern in (VERDICT, SIGNED):
        judged = list(pattern.finditer(marked))
        if len({match["mark"] for match in judged}) < 2:
            continue
        held = [match for match in judged if match["right"]]
        # Where none is right, it is one of those that are not named; where several are, none is settled on.
        conclusion = f" answer: {' and '.join(match['mark'] for match in held)}. " if held else " "
        last = (held or judged)[-1]
        before, behind = marked[: last.start()], marked[last.end() :]
        marked = pattern.sub(" ", before) + conclusion + pattern.sub(" ", behind)
    return marked


def told_answer(words: str) -> str:
    """The value of `answer` where a reply is JSON that has one; else the words as they are."""
    for found in reversed(re.findall(r"\{[^{}]*\}", words)):
        try:
            values = json.loads(found)
        except ValueError:
            continue
        for key in ("final_answer", "answer", "choice", "option", "letter", "答案", "选项"):
            lowered = {name.casefold(): value for name, value in values.items()}
            if isinstance(value := lowered.get(key), str | int | float):
                return str(value)
    return words


def whole_reply(words: str, options: dict[str, str]) -> str | None:
    """The option whose label, or else whose text, is all that a reply says."""
    said = bare(words)
    for label in options:
        if said == label.casefold():
            return label
    texts = {label: bare(text) for label, text in options.items()}
    named = [label for label, text in texts.items() if said in (text, f"a {text}", f"an {text}", f"the {text}")]
    if not named and (number := whole_number(said)) is not None:
        named = [label for label, text in texts.items() if whole_number(text) == number]
    return named[0] if len(named) == 1 and said else None


def with_marks(words: str, options: dict[str, str]) -> str:
    """The reply with a mark in place of every label and of every option's text."""
    marked = words
    names = {label.casefold(): number for number, label in enumerate(options)}
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))

    def mark(kind: int) -> Callable[[re.Match[str]], str]:
        return lambda found: found["lead"] + chr(kind + names[found["label"].casefold()])

    edge = rf"(?<![{LETTERS}_°+-])(?<![{LETTERS}]['’])"
    close = rf"(?![{LETTERS}_+#-])(?!['’][{LETTERS}])"
    article = rf"(?:(?<![aAiI])|(?![ \t]+(?!(?:{AFTER_LABEL})\b)[a-zA-Z]))"
    said = [bare(text) for text in options.values()]
    texts = sorted(
        ((text, number) for number, text in enumerate(said) if said.count(text) == 1), key=lambda pair: -len(pair[0])
    )
    # A label with its own text behind it is one label: "B. dog", "(b) dog".
    for text, number in texts:
        label = re.escape(list(options)[number])
        if text:
            # "A dog" without a sign between them may be an article.
            between = r"(?:[)\].:,、]+\s*|\s*[:\-–—(]\s*)" if label in "AaIi" else r"[)\].:,、]*\s*[:\-–—(]?\s*"
            own = rf"\(?{edge}{label}{between}{re.escape(text)}\)?(?!\w)"
            marked = re.sub(own, chr(APART + number), marked, flags=re.I)
    # Set apart: in brackets or quotes, behind "option", before a bracket or, where a line begins, a full stop.
    for pattern in (
        rf"(?P<lead>(?<![A-Za-z0-9])[(\[{{<\"'“‘「『【]\s*)(?P<label>{either})(?=\s*[)\]}}>\"'”’」』】])",
        rf"(?P<lead>\b(?:options?|choice|answer|letter|ans)\s*[:#=]?\s*){edge}(?P<label>{either}){close}{article}",
        rf"(?P<lead>选项\s*)(?P<label>{either})(?![A-Za-z0-9])",
        rf"(?P<lead>){edge}(?P<label>{either})(?=\s*选?项)",
        rf"(?P<lead>(?:^|\n)\s*){edge}(?P<label>{either})(?=[)\].:,。]+(?:\s|$)|[):\]]|[ \t]*(?:\n|$)|\s+[-–—]\s)",
        rf"(?P<lead>){edge}(?P<label>{either})(?=\))",
    ):
        marked = re.sub(pattern, mark(APART), marked, flags=re.I)
    for text, number in texts:
        marked = mark_text(marked, text, TEXT + number, "a" in names)
    for number, (english, chinese) in enumerate(ORDINALS[: len(options)]):
        nth = (
            rf"\b(?:{english}|{number + 1}(?:st|nd|rd|th))\s+(?:option|choice|answer)\b|"
            rf"第\s*[{chinese}{number + 1}]\s*(?:个?选项|个?答案|[个项](?=\W|$))"
        )
        marked = re.sub(nth, chr(APART + number), marked, flags=re.I)
    # Bare letters in capitals; small ones only where the sentence ends behind a word that concludes.
    capitals = "|".join(re.escape(label) for label in sorted(options, key=len, reverse=True))
    marked = re.sub(rf"(?P<lead>){edge}(?P<label>{capitals}){close}{article}", mark(BARE), marked)
    lead = r"(?P<lead>\b(?:is|be|choose|pick|select|with|so|therefore|[选是为])\s*)"
    small = rf"{lead}{edge}(?P<label>{either}){close}(?=\s*(?:[.,;!?]|$))"
    return re.sub(small, mark(BARE), marked, flags=re.I)


def mark_text(marked: str, text: str, code: int, a_is_label: bool) -> str:
    """Mark an option's text where it stands as whole words; "A dog" that begins a sentence may be label or article."""
    if not text or (len(text) == 1 and text.isascii() and text.isalpha()):
        return marked
    if text in SMALL_WORDS:
        pattern = rf"(?:(?<=^)|(?<=[\"'“‘(])|(?<=answer is )|(?<=answer: )){re.escape(text)}(?=[\"'”’).,;:!?]|$)"
        return re.sub(pattern, chr(code), marked, flags=re.I)
    if (number := whole_number(text)) is not None:
        return NUMBER.sub(
            lambda found: chr(code) if is_meant(found) and number_of(found.group()) == number else found.group(), marked
        )
    left, right = r"(?<![\w.])" if text[0].isdigit() else r"(?<!\w)", r"(?![\w%])(?!\.\d)"
    if "\u3400" <= text[0] <= "\u9fff":
        left = "" if len(text) > 1 else rf"(?:(?<=^)|(?<=[\W{BEFORE_WORD}]))"
        right = "" if len(text) > 1 else rf"(?=\W|$|[{AFTER_WORD}])"
    if not (text[-1].isalnum()):
        right = ""
    article = r"(?P<article>\b(?:an?|the)\s+)?"

    def replaced(found: re.Match[str]) -> str:
        begins = re.search(r"(?:^|[.!?;\n])\s*$", marked[: found.start()]) is not None
        first = found.group().split()[0]
        return DOUBT if a_is_label and begins and first == "A" else chr(code)

    return re.sub(rf"{article}{left}{re.escape(text)}{right}", replaced, marked, flags=re.I)


def is_meant(number: re.Match[str]) -> bool:
    """Whether a number counts something; "one" mostly stands for what was named before."""
    before = number.string[: number.start()]
    return number.group() != "one" or re.search(r"\b(?:is|are|only|just|exactly)\s+$", before) is not None


Reader = Callable[[str, Callable[[str], str]], str | None]


def concluded(marked: str, option_of: Callable[[str], str]) -> str | None:
    """The option of the last conclusion; "" where that names several."""
    found = {match.start("mark"): match for pattern in CONCLUSIONS for match in every(pattern, marked)}
    places = sorted(found)
    clauses = [match for match in re.finditer(r"[^.,:;!?。、\n]+", marked)]
    alone = [match for match in clauses if ALONE.fullmatch(match.group())]
    letters = [option_of(re.search(LABEL, match.group()).group()) for match in alone]  # type: ignore[union-attr]
    last = clauses[-1] if clauses else None
    if last is not None and alone and alone[-1] is last and len(clauses) > 1:
        place = last.start() + re.search(LABEL, last.group()).start()  # type: ignore[union-attr]
        # The last of several lines of a list is none, unless it says again what the list had.
        if len(set(letters)) == 1 or letters[-1] in letters[:-1]:
            places = sorted({*places, place})
    if not places:
        return None
    place = places[-1]
    option = option_of(marked[place])
    further = FURTHER.match(marked, place + 1)
    if further and option_of(further["joined"] or further["listed"]) != option:
        return " "
    if place in found and (before := re.search(rf"(?P<first>{ANY}){LIST_END}{OPEN}$", marked[:place], re.I)):
        return option if option_of(before["first"]) == option else " "
    return option


def every(pattern: re.Pattern[str], marked: str) -> list[re.Match[str]]:
    """Matches of a pattern, those too that begin inside another."""
    found, start = [], 0
    while match := pattern.search(marked, start):
        found.append(match)
        start = match.start() + 1
    return found


def leading(marked: str, option_of: Callable[[str], str]) -> str | None:
    """The label that a reply begins with: alone in its sentence, or the only one that begins a sentence."""
    first = LEADING.match(marked)
    if first is None:
        return None
    option = option_of(first["mark"])
    sentences = [part for part in re.split(r"[.!?;。\n]+", marked) if part.strip()]
    begun = [(match, part) for part in sentences if (match := LEADING.match(part))]
    lists = {option_of(match["mark"]) for match, part in begun if ALONE.fullmatch(part)}
    if SETTLED.match(first["rest"]) and lists <= {option} and not FURTHER.match(marked, first.end("mark")):
        return option
    if re.match(rf"\s*{LABEL}", first["rest"]) or FURTHER.match(marked, first.end("mark")):
        return " "
    return option if {option_of(match["mark"]) for match, _ in begun} == {option} else None


def only_apart(marked: str, option_of: Callable[[str], str]) -> str | None:
    options = {option_of(mark) for mark in re.findall(LABEL, marked)}
    if not re.search("[\ue000-\ue0ff]", marked):
        return None
    return options.pop() if len(options) == 1 else " "


def only_text(marked: str, option_of: Callable[[str], str]) -> str | None:
    labels = {option_of(mark) for mark in re.findall(LABEL, marked)}
    options = {option_of(mark) for mark in re.findall("[\ue200-\ue2ff]", marked)}
    return options.pop() if len(options) == 1 and labels <= options and DOUBT not in marked else None
