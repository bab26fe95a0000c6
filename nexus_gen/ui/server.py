"""`nexus-gen ui [RUN]`: a page in the browser that understands, generates and edits with a run's models.

nexus-gen ui runs/tiny --port 7861

The models load once, before the page opens: what is missing is said here in the terminal, and no click waits for it.
Docs: docs/ui.md.
"""

import asyncio
import importlib.util
import logging
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nexus_gen.artifacts.results import check_result
from nexus_gen.commands.use import add_model_arguments
from nexus_gen.parts.models import DECODER_KINDS, default_run, flag_of
from nexus_gen.parts.wording import TEMPLATES, TRAINED
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.ui.served import ServedModels, ServedPaths

MAX_UPLOAD = "20mb"
SECONDS_TO_FINISH = 2  # for open connections, when the server is told to end


def parser() -> Parser:
    result = Parser(prog="nexus-gen ui", description="Understand, generate and edit in the browser.")
    result.add_argument("run", type=Path, nargs="?", default=default_run(), help="run directory (default: %(default)s)")
    result.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    result.add_argument("--port", type=int, default=7860, help="0 takes a free one (default: %(default)s)")
    result.add_argument(
        "--template",
        choices=TEMPLATES,
        default=TRAINED,
        help="how prompts are worded: as the rows that the model was trained on, as for the released model, not at all "
        "(default: %(default)s)",
    )
    models = add_model_arguments(result, paints=True)
    for kind in DECODER_KINDS:
        models.add_argument(flag_of(kind), type=Path, help="decoder file or artifact directory")
    return result


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UserError when there is none to be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} cannot be listened on ({error}); give others") from error


def serve(served: ServedPaths, device: str, template: str, listener: socket.socket) -> None:
    """Load the models and answer requests until a signal ends the server. GRADIO_TEMP_DIR holds what it writes."""
    import fastapi
    import gradio as gr
    import uvicorn

    from nexus_gen.ui.page import Page
    from nexus_gen.ui.parts import CSS, theme

    page = Page(served, ServedModels(served, device, template))

    @asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        page.tasks.stop_all()

    app = gr.mount_gradio_app(
        fastapi.FastAPI(lifespan=lifespan),
        page.blocks,
        "/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        theme=theme(),
        css=CSS,
    )
    host, port = listener.getsockname()[:2]
    for reason in served.lacking.values():
        print(f"not served: {reason}")
    print(f"{served.run}: http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl+C ends it)", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH)
    # Pages that are open when the server ends are cut off, which uvicorn tells with a traceback for each.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not cut_off(record))
    uvicorn.Server(config).run(sockets=[listener])


def cut_off(record: logging.LogRecord) -> bool:
    return record.exc_info is not None and record.exc_info[0] is asyncio.CancelledError


def end(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv[1:])
    if importlib.util.find_spec("gradio") is None:
        raise UserError("nexus-gen ui needs Gradio, which is not installed: pip install 'nexus-gen[ui]'")
    check_result(tempfile.gettempdir(), "TMPDIR", directory=True)  # where pictures are kept while it runs
    decoders = {kind: getattr(arguments, kind) for kind in DECODER_KINDS}
    served = ServedPaths.find(arguments.run, arguments.autoregressive, arguments.flux, decoders)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, end)  # uvicorn ends first, then raises the signal again: the directory is removed
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    with (
        listen(arguments.host, arguments.port) as listener,
        tempfile.TemporaryDirectory(prefix="nexus-gen-ui-", ignore_cleanup_errors=True) as scratch,
    ):
        # Gradio reads these when it is imported. Its own places are shared by all servers and never emptied.
        os.environ |= {"GRADIO_TEMP_DIR": scratch, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        serve(served, arguments.device, arguments.template, listener)
    return 0
