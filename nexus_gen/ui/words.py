"""The words of the user interface, in the languages that it speaks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Everything that the page says, by what it is said of. Braces are filled in by name."""

    language: str
    intro: str
    understand: str
    generate: str
    edit: str
    about: str
    picture: str
    source: str
    result: str
    question: str
    answer: str
    prompt: str
    instruction: str
    ask: str
    paint: str
    repaint: str
    stop: str
    use_in_edit: str
    use_in_understand: str
    examples: str
    sampling: str
    decoder: str
    shape: str
    stretch: str
    pad: str
    crop: str
    native: str
    square: str
    input_size: str
    generation_decoder: str
    editing_decoder: str
    autoregressive: str
    seed: str
    new_seed: str
    steps: str
    cfg_scale: str
    embedded_guidance: str
    history: str
    parts: str
    made: str
    code: str
    fingerprint: str
    trained: str
    parameters: str
    wording: str
    scores: str
    score: str
    interval: str
    rows: str
    no_scores: str
    stale_scores: str
    not_served: str
    no_picture: str
    no_words: str
    too_long: str
    looking: str
    imagining: str
    answering: str
    painting: str
    stopped: str
    failed: str


ENGLISH = Words(
    language="Language",
    intro="One model that understands, generates and edits images: **{name}**, on {device}.",
    understand="Understand",
    generate="Generate",
    edit="Edit",
    about="About the model",
    picture="Picture",
    source="Picture to edit",
    result="Result",
    question="Question",
    answer="Answer",
    prompt="What to paint",
    instruction="What to change",
    ask="Ask",
    paint="Generate",
    repaint="Edit",
    stop="Stop",
    use_in_edit="Edit this picture",
    use_in_understand="Ask about this picture",
    examples="Examples",
    sampling="Sampling",
    decoder="Painted by",
    shape="A picture that is not square is",
    stretch="squashed, painted, stretched back",
    pad="padded to a square",
    crop="edited in its middle",
    native="painted in its own aspect",
    square="made a square",
    input_size="Result in the size of the picture",
    generation_decoder="Generation decoder",
    editing_decoder="Editing decoder",
    autoregressive="Language model",
    seed="Seed",
    new_seed="New seed every time",
    steps="Steps",
    cfg_scale="Guidance (1: off; more takes twice the time)",
    embedded_guidance="Distilled guidance",
    history="This session",
    parts="Part",
    made="Made",
    code="Commit",
    fingerprint="Fingerprint",
    trained="Training steps",
    parameters="Parameters",
    wording="How prompts are worded: {wording}",
    scores="Scores on the {split} rows",
    score="Score",
    interval="95% interval",
    rows="Rows",
    no_scores="These weights have no scores yet: `nexus-gen evaluate {run}` measures them.",
    stale_scores="The scores in {directory} are of other weights and are not shown.",
    not_served="Not served: {reason}",
    no_picture="There is no picture yet; upload one or take an example.",
    no_words="There are no words yet; write some or take an example.",
    too_long="The text has {length} characters; {limit} is the most.",
    looking="Looking at the picture",
    imagining="Imagining the picture",
    answering="Answering",
    painting="Painting",
    stopped="Stopped.",
    failed="Something broke; the terminal of the server says what.",
)
CHINESE = Words(
    language="语言",
    intro="一个能理解、生成和编辑图像的模型：**{name}**，运行于 {device}。",
    understand="理解",
    generate="生成",
    edit="编辑",
    about="关于模型",
    picture="图片",
    source="待编辑的图片",
    result="结果",
    question="问题",
    answer="回答",
    prompt="画什么",
    instruction="改什么",
    ask="提问",
    paint="生成",
    repaint="编辑",
    stop="停止",
    use_in_edit="编辑这张图片",
    use_in_understand="就这张图片提问",
    examples="示例",
    sampling="采样",
    decoder="解码器",
    shape="非正方形的图片",
    stretch="压成正方形绘制，再拉伸回来",
    pad="补成正方形",
    crop="只编辑中央部分",
    native="按原宽高比绘制",
    square="结果为正方形",
    input_size="结果与原图同样大小",
    generation_decoder="生成解码器",
    editing_decoder="编辑解码器",
    autoregressive="语言模型",
    seed="随机种子",
    new_seed="每次使用新种子",
    steps="步数",
    cfg_scale="引导强度（1 为关闭；大于 1 耗时加倍）",
    embedded_guidance="蒸馏引导",
    history="本次会话",
    parts="部分",
    made="生成时间",
    code="提交",
    fingerprint="指纹",
    trained="训练步数",
    parameters="参数量",
    wording="提示词的措辞：{wording}",
    scores="在 {split} 数据上的得分",
    score="得分",
    interval="95% 置信区间",
    rows="行数",
    no_scores="这些权重还没有得分，可用 `nexus-gen evaluate {run}` 评测。",
    stale_scores="{directory} 中的得分属于其他权重，未予显示。",
    not_served="未提供：{reason}",
    no_picture="还没有图片，请上传或选用示例。",
    no_words="还没有文字，请输入或选用示例。",
    too_long="文字有 {length} 个字符，最多 {limit} 个。",
    looking="正在看图",
    imagining="正在构想图片",
    answering="正在回答",
    painting="正在绘制",
    stopped="已停止。",
    failed="出错了，详情见服务器的终端。",
)
WORDS = {"en": ENGLISH, "zh": CHINESE}
# Label in the switch -> key of WORDS; each language is named in itself.
SWITCH = {"English": "en", "中文": "zh"}

# Where a run has no rows of its own to show: of the dataset that `nexus-gen data shapes` draws.
QUESTIONS = ("What colour is the circle?", "How many shapes are there?", "圆形是什么颜色？", "图中有几个形状？")
PROMPTS = (
    "a red circle on a white background",
    "two green squares on a grey background",
    "一个蓝色三角形，白色背景",
    "一个黄色圆形，黑色背景",
)
INSTRUCTIONS = ("make the circle blue", "remove the square", "把背景换成米色", "去掉蓝色正方形")
