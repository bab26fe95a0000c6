"""The words around the three tasks, in English and Chinese, as the released model was trained on them.

`<image>` marks where an image goes; a row's `images` fill the marks in order.
Source: the message rows and the inference code published with Nexus-Gen.
"""

IMAGE_TAG = "<image>"
LANGUAGES = ("en", "zh")
# What Qwen's chat template puts around turns and pictures: in the words of a message it would end or begin them.
CONTROL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        *("im_start", "im_end", "endoftext"),
        *("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"),
    )
)

GENERATION_PROMPT = {
    "en": "Generate an image according to the following description: {}",
    "zh": "根据以下描述生成一张图像：{}",
}
GENERATION_REPLY = {
    "en": "Here is an image based on the description: <image>",
    "zh": "这是根据您的描述生成的图像：<image>",
}
EDITING_PROMPT = "<image> {}"
EDITING_REPLY = {"en": "Here is the image: <image>", "zh": "以下为编辑后的图像：<image>"}
UNDERSTANDING_PROMPT = "<image>\n{}"


def words_of(content: str) -> str:
    """A user message without image tags and without the words around a caption."""
    words = content.replace(IMAGE_TAG, "").strip()
    for template in GENERATION_PROMPT.values():
        words = words.removeprefix(template.format(""))
    return words


def language_of(text: str) -> str:
    """`zh` for text with Chinese characters, else `en`."""
    if text.isascii():  # at once, where a look at every character takes longer than all else about a row
        return "en"
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in text) else "en"
