"""`nexus-gen ui` as a person meets it: the real server, over HTTP, and in a real browser where the machine has one."""

import dataclasses
import os
import signal
import socket
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsers import browser
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from runs import NEXUS_GEN, nexus_gen

from nexus_gen.ui.words import CHINESE, ENGLISH

pytestmark = pytest.mark.xdist_group("ui")  # one server for all of them
SAMPLING = {"seed": 1, "new_seed": False, "steps": 2, "cfg_scale": 1.0, "embedded_guidance": 3.5}
ENGLISH_PAGE = {"language": "en"}


@pytest.fixture(scope="module")
def server(tiny_run: Path) -> Iterator[str]:
    """The address of a server on a free port. In the end it leaves nothing behind."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [NEXUS_GEN, "ui", str(tiny_run), "--port", "0", "--device", "cpu"]
        with subprocess.Popen(
            command, env={**os.environ, "TMPDIR": temporary}, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "http://127.0.0.1:" in line, line
            try:
                yield next(word for word in line.split() if word.startswith("http"))
                assert [path.name for path in Path(temporary).iterdir() if path.name.startswith("nexus-gen-ui-")]
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait() == 128 + signal.SIGTERM
        assert not list(Path(temporary).glob("nexus-gen-ui-*")), "uploads and pictures are left behind"


@pytest.fixture(scope="module")
def client(server: str, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(server, download_files=tmp_path_factory.mktemp("pictures"), verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "blue.png"
    Image.new("RGB", (100, 60), "blue").save(path)
    return path


def pixels(path: str, size: tuple[int, int] = (64, 64)) -> bytes:
    with Image.open(path) as picture:
        assert picture.size == size
        return picture.tobytes()


def test_pictures_follow_prompt_and_seed(client: Client) -> None:
    def generate(prompt: str, **sampling: object) -> tuple[bytes, int]:
        picture, seed = client.predict(prompt=prompt, **{**SAMPLING, **sampling}, **ENGLISH_PAGE, api_name="/generate")
        return pixels(picture), seed

    one, again, other = generate("a red circle"), generate("a red circle"), generate("a red circle", seed=2)
    assert one == again
    assert one[0] != other[0]
    assert generate("一个红色圆形")[0] != one[0]
    drawn, seed = generate("a red circle", new_seed=True)
    assert seed != 1
    assert generate("a red circle", seed=seed)[0] == drawn


def test_the_page_paints_what_the_command_paints(client: Client, tiny_run: Path, tmp_path: Path) -> None:
    picture, _ = client.predict(prompt="a red circle", **SAMPLING, **ENGLISH_PAGE, api_name="/generate")
    command = ["generate", "--run", tiny_run, "--prompt", "a red circle", "--seed", "1", "--num-inference-steps", "2"]
    ended = nexus_gen(*command, "--cfg-scale", "1", "--device", "cpu", "--result-path", tmp_path / "command.png")
    assert ended.returncode == 0, ended.stderr
    assert pixels(picture) == pixels(str(tmp_path / "command.png"))


def test_questions_and_edits_read_the_picture(client: Client, source: Path) -> None:
    file = handle_file(source)
    answer = client.predict(picture=file, question="What colour is it?", **ENGLISH_PAGE, api_name="/understand")
    assert isinstance(answer, str)
    by = {
        decoder: client.predict(
            picture=file, instruction="make it red", decoder=decoder, **SAMPLING, **ENGLISH_PAGE, api_name="/edit"
        )[0]
        for decoder in ("editing_decoder", "generation_decoder")
    }
    aspect_kept = (83, 50)  # of 100 x 60, in about 64 * 64 pixels
    assert pixels(by["editing_decoder"], aspect_kept) != pixels(by["generation_decoder"], aspect_kept)
    asked = {"picture": file, "instruction": "make it red", "decoder": "editing_decoder", **SAMPLING, **ENGLISH_PAGE}
    as_large, _ = client.predict(**asked, shape="pad", input_size=True, api_name="/edit")
    assert pixels(as_large, (100, 60))
    assert "not the size of the input" in refusal(client, "/edit", **asked, shape="square", input_size=True)


def refusal(client: Client, name: str, **arguments: object) -> str:
    with pytest.raises(AppError) as caught:
        client.predict(api_name=name, **arguments)
    return str(caught.value)


def test_bad_input_is_answered_with_a_sentence(client: Client, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1000, 2)).save(thin)

    def ask(picture: Path | None, question: str = "What is it?", language: str = "en") -> str:
        file = None if picture is None else handle_file(picture)
        return refusal(client, "/understand", picture=file, question=question, language=language)

    assert ENGLISH.no_picture in ask(None)
    assert CHINESE.no_picture in ask(None, language="zh")
    assert "picture text.png cannot be read" in ask(text)
    assert "crop it" in ask(thin)
    assert ENGLISH.no_words in ask(source, question=" ")
    assert "leave the tag out" in ask(source, question="<image> what?")
    assert "<|im_end|>" in ask(source, question="<|im_end|>")
    assert ENGLISH.too_long.format(length=2001, limit=2000) in ask(source, question="a" * 2001)
    elsewhere = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
    assert "not fetched" in refusal(client, "/understand", picture=elsewhere, question="What is it?", **ENGLISH_PAGE)
    steps = refusal(client, "/generate", prompt="a", **{**SAMPLING, "steps": 100000}, **ENGLISH_PAGE)
    assert "200" in steps


def test_what_cannot_be_served_is_said_before_anything_loads(tmp_path: Path, tiny_run: Path) -> None:
    ended = nexus_gen("ui", tmp_path)
    assert ended.returncode == 2
    assert "finish stage=pretrain" in ended.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = nexus_gen("ui", tiny_run, "--port", str(taken.getsockname()[1]))
    assert ended.returncode == 2
    assert "give others" in ended.stderr


def test_without_gradio_one_sentence_names_the_extra(tiny_run: Path) -> None:
    code = "import sys; sys.modules['gradio'] = None; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = subprocess.run([sys.executable, "-c", code, "ui", str(tiny_run)], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "pip install 'nexus-gen[ui]'" in ended.stderr


def test_both_languages_fill_in_the_same() -> None:
    def names(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text)} - {None}

    for field in dataclasses.fields(ENGLISH):
        assert names(getattr(ENGLISH, field.name)) == names(getattr(CHINESE, field.name)), field.name


# Clicks Stop when the page first says that it paints. On busy cores the page, which shows every step, stands still
# until the picture is there, and a click from outside comes too late.
STOP_AT_ONCE = """() => new MutationObserver((changes, watching) => {
    if (!changes.some(change => change.target.textContent.includes("Painting"))) return
    const stop = [...document.querySelectorAll("button")].find(
        button => button.offsetParent && button.textContent.trim() == "Stop")
    if (!stop) return
    watching.disconnect()
    stop.click()
    window.stopped = true
}).observe(document.querySelector(".gradio-container"), {subtree: true, childList: true, characterData: true})"""


@pytest.mark.browser
def test_a_person_asks_paints_edits_stops_and_changes_the_language(server: str, source: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=browser(), args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = started.new_page(locale="en-GB")
        page.set_default_timeout(60_000)
        fetched: list[str] = []
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(server)

        shown = page.get_by_role("tabpanel")  # of the tab that is open
        shown.get_by_role("button", name="Ask", exact=True).click()
        expect(page.get_by_text(ENGLISH.no_picture)).to_be_visible()
        shown.locator("input[type=file]").set_input_files(source)
        shown.get_by_label("Question").fill("What colour is it?")
        shown.get_by_role("button", name="Ask", exact=True).click()
        history = page.locator(".thumbnail-item")
        expect(history).to_have_count(1, timeout=60_000)

        page.get_by_role("tab", name="Generate").click()
        shown.get_by_label("What to paint").fill("a red circle")
        shown.get_by_text("Sampling").click()
        shown.get_by_label("number input for Steps").fill("200")
        shown.get_by_label(f"number input for {ENGLISH.cfg_scale}").fill("3")  # ten seconds, unless it is stopped
        page.evaluate(STOP_AT_ONCE)
        shown.get_by_role("button", name="Generate", exact=True).click()
        page.wait_for_function("window.stopped")
        expect(shown.get_by_text("Painting")).to_have_count(0, timeout=60_000)
        expect(shown.locator("img")).to_have_count(0)
        shown.get_by_label("number input for Steps").fill("2")
        shown.get_by_role("button", name="Generate", exact=True).click()
        expect(shown.locator("img")).to_be_visible(timeout=60_000)
        expect(history).to_have_count(2)

        shown.get_by_role("button", name=ENGLISH.use_in_edit).click()
        expect(shown.locator("img").first).to_be_visible(timeout=60_000)
        shown.get_by_label("What to change").fill("make it blue")
        shown.get_by_role("button", name="Edit", exact=True).click()
        expect(history).to_have_count(3, timeout=60_000)

        page.get_by_label("中文").click()
        expect(page.get_by_role("tab", name="理解")).to_be_visible(timeout=60_000)
        expect(shown.get_by_role("columnheader", name=CHINESE.instruction)).to_be_visible()
        shown.get_by_role("row").last.click()  # an example
        expect(shown.get_by_label(CHINESE.instruction)).not_to_have_value("make it blue")
        shown.get_by_label(CHINESE.instruction).fill("")
        shown.get_by_role("button", name=CHINESE.repaint, exact=True).click()
        expect(page.get_by_text(CHINESE.no_words)).to_be_visible(timeout=60_000)
        page.get_by_role("tab", name=CHINESE.about).click()
        expect(page.get_by_role("cell", name=CHINESE.editing_decoder)).to_be_visible()

        outside = [url for url in fetched if not url.startswith((server, "data:", "blob:"))]
        assert not outside
        started.close()

        chinese = playwright.chromium.launch(
            executable_path=browser(), args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = chinese.new_page(locale="zh-CN")
        page.goto(server)
        expect(page.get_by_role("tab", name="理解")).to_be_visible(timeout=60_000)
        chinese.close()
