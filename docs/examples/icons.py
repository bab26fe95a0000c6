"""A small dataset of your own, made on the spot: toolbar icons that matplotlib ships, in five colours on five grounds.

Questions about them, requests to draw them, and edits of their ground, in English and Chinese.
Run: python docs/examples/icons.py icons
"""

import argparse
import json
import random
from pathlib import Path

import matplotlib
from PIL import Image

ICONS = Path(matplotlib.get_data_path()) / "images"
NAMES = {  # file -> what it shows
    "home": ("house", "房子"),
    "back": ("left arrow", "左箭头"),
    "forward": ("right arrow", "右箭头"),
    "filesave": ("floppy disk", "软盘"),
    "move": ("cross of arrows", "十字箭头"),
    "zoom_to_rect": ("magnifier", "放大镜"),
    "subplots": ("set of sliders", "滑块"),
    "help": ("question mark", "问号"),
}
INKS = [(20, 20, 20), (180, 30, 40), (30, 60, 170), (20, 110, 60), (120, 40, 140)]
GROUNDS = {
    "white": ("白色", (255, 255, 255)),
    "pink": ("粉色", (250, 200, 215)),
    "blue": ("蓝色", (170, 215, 245)),
    "beige": ("米色", (238, 220, 180)),
    "grey": ("灰色", (165, 165, 165)),
}
SIDE = 72


def draw(icon: str, ground: str, seed: int) -> Image.Image:
    """An icon in some ink, size and place on a ground."""
    chance = random.Random(seed)
    size = chance.randint(40, 64)
    shape = Image.open(ICONS / f"{icon}_large.png").convert("RGBA").getchannel("A").resize((size, size))
    picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground][1])
    place = tuple((SIDE - size) // 2 + chance.randint(-6, 6) for _ in range(2))
    picture.paste(chance.choice(INKS), (*place, place[0] + size, place[1] + size), shape)
    return picture


def row(task: str, directory: Path, name: str, chance: random.Random) -> dict:
    """One row in the message format; its pictures are written beside the rows."""
    icon, ground, other = chance.choice(list(NAMES)), *chance.sample(list(GROUNDS), 2)
    language = int(chance.random() < 0.3)  # 0 English, 1 Chinese
    what, colour, new_colour = NAMES[icon][language], (ground, GROUNDS[ground][0]), (other, GROUNDS[other][0])
    pictures = [draw(icon, ground, seed := chance.randrange(2**32))]
    if task == "understanding":
        user, reply = ("<image> What is this?", "<image> 这是什么？")[language], what
    elif task == "generation":
        user = (f"Draw a {what}, {colour[0]} ground.", f"画一个{what}，{colour[1]}背景。")[language]
        reply = "<image>"
    else:
        user = (f"<image> Make the ground {new_colour[0]}.", f"<image> 把背景换成{new_colour[1]}。")[language]
        reply = "<image>"
        pictures.append(draw(icon, other, seed))
    files = [f"pictures/{name}-{number}.png" for number in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(directory / file)
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return {"id": name, "source": "icons", "images": files, "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=1500, help="of training; a tenth as many are held out")
    arguments = parser.parse_args()
    (arguments.directory / "pictures").mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for split, count in (("train", arguments.rows), ("heldout", arguments.rows // 10)):
        tasks = [("understanding", "generation", "editing")[number % 3] for number in range(count)]
        rows = [row(task, arguments.directory, f"{split}{number}", chance) for number, task in enumerate(tasks)]
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
        (arguments.directory / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
