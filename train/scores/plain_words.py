"""What a model's reply says, without the markup that it is said in. No torch here."""

import re
import unicodedata

# What LaTeX sets in a typeface, and what it is.
TYPEFACE = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|it|rm|sf)|operatorname|emph|textnormal)\s*\{([^{}]*)\}")
REFUSAL = re.compile(
    r"\bcan(?:no|')t\b|\bcan not\b|\bunable to\b|\bnot able to\b|\b(?:do not|don't) know\b|"
    r"\b(?:not sure|unsure|unclear|uncertain)\b|"
    r"\b(?:impossible|hard|difficult) to\b|无法|不能(?:确定|判断|回答|看)|不知道|不确定|看不清|难以",
    re.I,
)

# Traditional characters of what replies and answers say most, by the simplified ones that patterns are written in.
SIMPLIFIED = str.maketrans(
    "選擇項為對錯誤確應該認覺綜論結適無難圖顏狀邊側體沒過據則與還顯絕並這麼會於條張頭輛隻個兩實際從於後來終題說紅藍綠"
    "黃圓綫線點數貓狗鳥魚馬車樹間裡裏當斷測號僅總處證",
    "选择项为对错误确应该认觉综论结适无难图颜状边侧体没过据则与还显绝并这么会于条张头辆只个两实际从于后来终题说红蓝绿"
    "黄圆线线点数猫狗鸟鱼马车树间里里当断测号仅总处证",
)


def without_markup(reply: str) -> str:
    """Plain words: of one width, without thoughts, Markdown, LaTeX and tags. What is boxed is "answer: ...".

    A reply that is cut off in its thoughts says nothing. Struck words are gone.
    """
    words = unicodedata.normalize("NFKC", reply).translate(SIMPLIFIED)
    words = re.sub(r"([^\w\s])\1{9,}", r"\1\1\1", words)  # what repeats itself for ever says no more, and reads slowly
    words = re.sub("[\ue000-\uf8ff]", "", words)
    words = re.sub(r"<(think|thinking|reasoning)>.*?</\1>", " ", words, flags=re.S | re.I)
    words = re.split(r"</think(?:ing)?>", words, flags=re.I)[-1]
    words = re.split(r"<think(?:ing)?>", words, flags=re.I)[0]
    while (shorter := TYPEFACE.sub(r"\1", words)) != words:
        words = shorter
    words = re.sub(r"\\boxed\s*\{([^{}]*)\}", r" answer: \1 ", words)
    words = re.sub(r"<answer>(.*?)(?:</answer>|$)", r" answer: \1 ", words, flags=re.S | re.I)
    words = re.sub(r"~~.*?~~|<(s|del)>.*?</\1>", " ", words, flags=re.S)
    words = re.sub(r"\\(?:rightarrow|to|Rightarrow|therefore)\b", " → ", words)
    words = re.sub(r"\\[()\[\],;! ]|\\(?:quad|rm|bf)\b|\$", " ", words)
    words = re.sub(r"</?[a-zA-Z][^<>]{0,40}>|<\|[^<>]*\|>", " ", words)
    words = re.sub(r"\*+|`+|(?<!\w)_+|_+(?!\w)|(?m:^\s*[#>]+)", "", words)
    return re.sub(r"[ \t\u00a0]+", " ", words).strip()


ENGLISH_NUMBERS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
for tens in ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"):
    ENGLISH_NUMBERS += [tens, *(f"{tens}-{ones}" for ones in ENGLISH_NUMBERS[1:10])]
CHINESE_DIGITS = {**{digit: value for value, digit in enumerate("零一二三四五六七八九")}, "两": 2, "〇": 0}
# A number, in digits or words; not the one in the name of a shape, as in "三角形", or in "一共".
NUMBER = re.compile(
    r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?![\da-z])|(?<=[\u3400-\u9fff])\d+|"
    rf"\b(?:{'|'.join(sorted(ENGLISH_NUMBERS, key=len, reverse=True))})\b|"
    r"(?<![第统])[零〇一二两三四五六七八九十]+(?![角边星字共些样定起])"
)


def number_of(word: str) -> float:
    """The value of what `NUMBER` found; Chinese below a hundred."""
    if word in ENGLISH_NUMBERS:
        return ENGLISH_NUMBERS.index(word)
    if word[-1].isascii():
        return float(word.replace(",", ""))
    tens, ten, ones = word.rpartition("十")
    if not ten:
        tens, ones = "", word
    digits = float("".join(str(CHINESE_DIGITS[digit]) for digit in ones) or 0)
    return 10 * (CHINESE_DIGITS[tens] if tens else 1) * bool(ten) + digits


def numbers_in(words: str) -> list[float]:
    """All numbers that a text says, in order."""
    return [number_of(found) for found in NUMBER.findall(words.casefold())]


def whole_number(words: str) -> float | None:
    """The number that a text is, in digits or words; None where it says anything else."""
    return number_of(words.casefold()) if NUMBER.fullmatch(words.casefold()) else None


def bare(words: str) -> str:
    """Without case and without signs around it; minus, degrees and the like stay."""
    return unicodedata.normalize("NFKC", words).casefold().strip(" \t\n.,;:!?。、\"'“”‘’()[]{}<>「」『』【】")
