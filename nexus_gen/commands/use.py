"""`nexus-gen understand | generate | edit`: arguments and their checks; models load only after those pass.

nexus-gen understand --input-image photo.png --prompt "How many shapes are there?"
nexus-gen generate --prompt "a red circle on a white background" --result-path circle.png
nexus-gen edit --input-image photo.png --instruction "make the circle blue" --result-path blue.png

Several --input-image fill the model's `<image>` tags in order; `edit` repaints the last one. What is resized to what is
said on stderr, and what message is sent where it is worded otherwise than for the released model.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_gen.artifacts.results import PICTURES, aside, check_result
from nexus_gen.parts.models import DECODER_KINDS, ModelPaths, default_run
from nexus_gen.parts.preflight import require_loadable
from nexus_gen.parts.wording import COMMANDS, TRAINED, Wording, check_template
from nexus_gen.pictures.framing import ASPECTS, SIZES, Frame, beyond_training, seen_sentence
from nexus_gen.pictures.images import open_size
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import LANGUAGES

if TYPE_CHECKING:
    from PIL.Image import Image

    from nexus_gen.inference import NexusGen

TASKS = {command: task for task, command in COMMANDS.items()}
MAX_SEED = 2**63 - 1  # that torch's generators take


def add_model_arguments(parser: Parser, paints: bool) -> argparse._ArgumentGroup:
    """--device, --autoregressive and, for a command that paints, --flux; returns the group, for what else it loads."""
    models = parser.add_argument_group("models (a run's artifacts unless given one by one)")
    models.add_argument("--autoregressive", type=Path, help="autoregressive checkpoint directory")
    if paints:
        models.add_argument("--flux", type=Path, help="FLUX.1-dev directory")
    models.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return models


def add_template_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--template",
        default=TRAINED,
        metavar="trained|released|raw|TEXT",
        help="how the prompt is worded: as the rows that the model was trained on, as for the released model, not at "
        "all, or as a text with {} where the prompt goes, such as 'Draw {}.' (default: trained)",
    )


def parser(command: str) -> Parser:
    summaries = {
        "understand": "Answer a question about a picture.",
        "generate": "Paint a picture from a prompt.",
        "edit": "Repaint a picture by an instruction.",
    }
    result = Parser(prog=f"nexus-gen {command}", description=summaries[command])
    models = add_model_arguments(result, paints=command != "understand")
    models.add_argument("--run", type=Path, default=default_run(), help="run directory (default: %(default)s)")
    add_template_argument(result)
    if command == "understand":
        add_input_images(result, "picture to ask about; several in order, one option each")
        result.add_argument("--prompt", required=True, help="the question")
        result.add_argument("--max-new-tokens", type=int, default=256)
        return result
    models.add_argument("--decoder", type=Path, help="decoder file (.safetensors or .bin) or artifact directory")
    if command == "generate":
        result.add_argument("--prompt", required=True, help="what to paint")
        result.add_argument("--result-path", type=Path, default=Path("generation.png"))
    else:
        add_input_images(result, "picture to edit; of several, one option each, the last one is edited")
        result.add_argument("--instruction", required=True, help="what to change")
        result.add_argument("--result-path", type=Path, default=Path("editing.png"))
        result.add_argument(
            "--use-generation-decoder",
            action="store_true",
            help="paint from the target embeddings alone, without the source's",
        )
        result.add_argument(
            "--aspect",
            choices=ASPECTS,
            help="how a picture that is not square is edited: stretch paints a square and stretches it back; pad and "
            "crop edit the padded picture or its middle; native paints its own aspect; square leaves the square "
            "(default: as the decoder was trained)",
        )
        result.add_argument(
            "--size",
            choices=SIZES,
            help="of the result: as many pixels as the decoder was trained at, or the input's (default: decoder)",
        )
    result.add_argument("--seed", type=int, default=42, help="of the noise (default: %(default)s)")
    result.add_argument(
        "--reply", help="how the model's reply is worded, <image> included (default: as --template says)"
    )
    result.add_argument(
        "--language", choices=LANGUAGES, help="language of the words around the prompt (default: that of the prompt)"
    )
    result.add_argument("--width", type=int, help="pixels to paint (default: the size the decoder was trained at)")
    result.add_argument("--height", type=int, help="pixels to paint")
    result.add_argument("--num-inference-steps", type=int, help="Euler steps (default: the decoder's)")
    result.add_argument(
        "--cfg-scale", type=float, help="classifier-free guidance; 1 switches it off (default: the decoder's)"
    )
    result.add_argument("--embedded-guidance", type=float, help="FLUX's distilled guidance (default: the decoder's)")
    result.add_argument("--negative-prompt", default="", help="what classifier-free guidance moves away from")
    return result


def add_input_images(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--input-image", type=Path, required=True, action="append", metavar="PATH", help=help_text)


def check(command: str, arguments: argparse.Namespace) -> ModelPaths:
    """Everything that can be wrong before weights are read."""
    for image in getattr(arguments, "input_image", ()):
        if not image.is_file():
            raise UserError(f"--input-image {image} does not exist; check the path")
        open_size(image)
    for name in ("width", "height", "num_inference_steps", "max_new_tokens"):
        value = getattr(arguments, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if abs(getattr(arguments, "seed", 0)) > MAX_SEED:
        raise UserError(f"--seed is {arguments.seed}; it must be {MAX_SEED} at most")
    check_template(arguments.template, getattr(arguments, "reply", None))
    result_path = getattr(arguments, "result_path", None)
    if result_path is not None:
        check_result(result_path, "--result-path", suffixes=PICTURES)
    decoder = None
    if command != "understand":
        generation = command == "generate" or arguments.use_generation_decoder
        decoder = DECODER_KINDS[0] if generation else DECODER_KINDS[1]
    paths = ModelPaths.find(
        arguments.run,
        decoder=decoder,
        autoregressive=arguments.autoregressive,
        decoder_path=getattr(arguments, "decoder", None),
        flux=getattr(arguments, "flux", None),
    )
    if paths.details is not None:
        frame_of(arguments, paths)
    require_loadable(paths, getattr(arguments, "cfg_scale", None))
    return paths


def frame_of(arguments: argparse.Namespace, paths: ModelPaths) -> Frame:
    """The sizes of what is painted; UserError for impossible ones."""
    assert paths.details is not None
    side = paths.details["image_size"]
    edits = hasattr(arguments, "input_image")
    source = open_size(arguments.input_image[-1]) if edits else (arguments.width or side, arguments.height or side)
    shape = {name: getattr(arguments, name, None) for name in ("aspect", "size", "width", "height")}
    return Frame.of(source, paths.details, **shape)


def resizing(arguments: argparse.Namespace, model: "NexusGen") -> list[str]:
    """A line for each picture that is not seen, painted and returned in the size that it has."""
    images, paths = getattr(arguments, "input_image", []), model.paths
    sizes = [open_size(image) for image in images]
    frame = None if paths.details is None else frame_of(arguments, paths)
    shown = [*sizes[:-1], frame.shown] if frame is not None and images else sizes
    lines = []
    for number, looked_at in enumerate(model.seen_sizes(shown, edits=frame is not None) if images else (), start=1):
        edited = frame if number == len(images) else None
        line = edited.sentence("en", looked_at) if edited else seen_sentence("en", sizes[number - 1], looked_at)
        if line:
            lines.append(f"{images[number - 1]}: {line}")
    if frame is not None and paths.details is not None:
        lines += filter(None, [beyond_training(paths.details, frame.painted)])
    return lines


def sent(arguments: argparse.Namespace, wording: Wording, task: str, words: str) -> list[str]:
    """A line that says which message is sent, unless it is what the released model would be sent."""
    count, language = len(getattr(arguments, "input_image", [])), getattr(arguments, "language", None)
    turn = wording.under(arguments.template, getattr(arguments, "reply", None)).turn(task, words, count, language)
    if turn == Wording().turn(task, words, count, language):
        return []
    quoted = {name: json.dumps(text, ensure_ascii=False) for name, text in turn._asdict().items()}
    parts = [f"sent (--template {shlex.quote(arguments.template)}): {quoted['user']}"]
    parts += [f"system message {quoted['system']}"] * bool(turn.system)
    if turn.reply is None:
        parts.append("the model words its reply itself")
    elif turn.reply:
        parts.append(f"reply {quoted['reply']}")
    return ["; ".join(parts)]


def save_atomic(image: "Image", path: Path) -> None:
    """Write a picture beside its place and rename it there."""
    with aside(path) as partial:
        image.save(partial)


def main(argv: list[str]) -> int:
    command = argv[0]
    arguments = parser(command).parse_args(argv[1:])
    paths = check(command, arguments)
    from nexus_gen.inference import NexusGen  # loads torch: only once the arguments hold

    model = NexusGen(paths, device=arguments.device)
    words = arguments.instruction if command == "edit" else arguments.prompt
    for line in [*resizing(arguments, model), *sent(arguments, model.wording, TASKS[command], words)]:
        print(line, file=sys.stderr)
    if command == "understand":
        template, length = arguments.template, arguments.max_new_tokens
        print(model.understand(arguments.input_image, words, length, template=template))
        return 0
    sampling = {
        "language": arguments.language,
        "template": arguments.template,
        "reply": arguments.reply,
        "width": arguments.width,
        "height": arguments.height,
        "num_inference_steps": arguments.num_inference_steps,
        "cfg_scale": arguments.cfg_scale,
        "embedded_guidance": arguments.embedded_guidance,
        "negative_prompt": arguments.negative_prompt,
        "seed": arguments.seed,
    }
    if command == "generate":
        image = model.generate(words, **sampling)
    else:
        shape = {"aspect": arguments.aspect, "size": arguments.size}
        image = model.edit(arguments.input_image, words, **shape, **sampling)
    save_atomic(image, arguments.result_path)
    print(arguments.result_path)
    return 0
