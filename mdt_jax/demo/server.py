"""Serves the page: one port, bounded requests, no file outside a temporary folder."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdt_jax.demo.engine import Engine
from mdt_jax.errors import SettingError
from mdt_jax.logs import logger

MAX_REQUEST = 16 * 2**20  # bytes of a request; a canvas sends at most two pictures
CLOSE_SECONDS = 2  # that the server waits for open connections at its end
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "::1")


def has_gradio() -> bool:
  """Whether gradio is installed."""
  return importlib.util.find_spec("gradio") is not None


def is_loopback(host: str) -> bool:
  """Whether only this machine reaches an address."""
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost"


def open_socket(host: str, port: int) -> socket.socket:
  """Binds the port; port 0 chooses a free one.

  Raises:
    SettingError: the port is taken or not allowed, or the host is not of this machine.
  """
  if not 0 <= port < 2**16:
    raise SettingError("port", port, "must lie in [0, 65,535]")
  try:
    family, kind, _, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM
    )[0]
    bound = socket.socket(family, kind)
  except OSError as error:
    raise SettingError("host", host, f"is no address: {error.strerror}") from None
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind(address)
    bound.listen(128)
  except OSError as error:
    bound.close()
    if error.errno == errno.EADDRINUSE:
      accepted = "is taken by another program; choose another one, or 0 for a free one"
      raise SettingError("port", port, accepted) from None
    if error.errno == errno.EACCES:
      raise SettingError(
        "port", port, "is not allowed; choose one above 1023"
      ) from None
    raise SettingError("host", host, f"cannot be used: {error.strerror}") from None
  return bound


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
  """A folder for all files of the page, removed at the end.

  gradio reads its folder from the environment when it is imported.
  """
  with tempfile.TemporaryDirectory(
    prefix="mdt_jax_demo_", ignore_cleanup_errors=True
  ) as name:
    os.environ["GRADIO_TEMP_DIR"] = name
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    yield Path(name)


def serve(engine: Engine, bound: socket.socket, host: str, max_queue: int) -> int:
  """Serves the page until a signal ends the server.

  Args:
    engine: draws the pictures.
    bound: socket from `open_socket`.
    host: the host as the user typed it.
    max_queue: largest number of requests that wait.

  Returns:
    The number of the signal.
  """
  import uvicorn  # pyright: ignore[reportMissingImports]

  with temporary_folder() as folder:
    only_local = is_loopback(host) and ":" not in host  # starlette splits at ":"
    app = make_app(engine, folder, max_queue, only_local=only_local)
    config = uvicorn.Config(
      app,
      log_level="error",
      access_log=False,
      lifespan="on",
      timeout_graceful_shutdown=CLOSE_SECONDS,
      ws="none",
    )
    server = _make_server(config)
    port = bound.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    logger.info("open http://%s:%d (Ctrl-C ends the demo)", shown, port)
    if not is_loopback(host):
      logger.warning("everyone who reaches this machine can use the page")
    threading.Thread(target=_warm_up, args=(engine,), daemon=True).start()
    server.run(sockets=[bound])
    return server.signal


def make_app(engine: Engine, folder: Path, max_queue: int, *, only_local: bool) -> Any:
  """Returns the ASGI application.

  Args:
    engine, max_queue: see `serve`.
    folder: the temporary folder.
    only_local: whether to refuse requests that name another host than this machine, so
      that pages of other sites cannot reach the server.
  """
  import fastapi  # pyright: ignore[reportMissingImports]
  import gradio as gr  # pyright: ignore[reportMissingImports]
  from starlette.middleware.trustedhost import (  # pyright: ignore[reportMissingImports]
    TrustedHostMiddleware,
  )

  from mdt_jax.demo.handlers import Handlers
  from mdt_jax.demo.inside import Viewer
  from mdt_jax.demo.page import STYLE, Page, theme
  from mdt_jax.demo.uploads import MAX_BYTES

  viewer = Viewer(engine)
  page = Page(engine, viewer, Handlers(engine, viewer, folder), max_queue)
  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  app = gr.mount_gradio_app(
    app,
    page.build(),
    path="/",
    footer_links=[],
    run_history=False,
    ssr_mode=False,
    mcp_server=False,
    enable_monitoring=False,
    pwa=False,
    show_error=True,
    max_file_size=MAX_BYTES,
    theme=theme(),
    css=STYLE,
    app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
  )
  app.add_middleware(LimitedRequests, max_bytes=MAX_REQUEST)
  if only_local:
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL_HOSTS))
  return app


class LimitedRequests:
  """ASGI middleware that refuses requests with too many bytes.

  Args:
    app: the application.
    max_bytes: largest size of a request's body.
  """

  def __init__(self, app: Any, max_bytes: int):
    self._app = app
    self._max_bytes = max_bytes

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    headers = {name.lower(): value for name, value in scope["headers"]}
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > self._max_bytes:
      await self._refuse(send)
      return
    count = 0

    async def limited() -> Any:
      nonlocal count
      message = await receive()
      count += len(message.get("body", b""))
      if count > self._max_bytes:
        return {"type": "http.disconnect"}
      return message

    await self._app(scope, limited, send)

  async def _refuse(self, send: Any) -> None:
    text = f"The request has more than {self._max_bytes // 2**20} MB."
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _make_server(config: Any) -> Any:
  """A uvicorn server that ends at a signal, and remembers the signal."""
  import signal

  import uvicorn  # pyright: ignore[reportMissingImports]

  class Server(uvicorn.Server):
    signal = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
      # uvicorn would raise the signal again, before the folder is removed.
      if threading.current_thread() is not threading.main_thread():
        yield
        return

      def stop(number: int, frame: Any) -> None:
        del frame
        self.signal = self.signal or number
        self.force_exit = self.should_exit
        self.should_exit = True

      numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
      kept = {n: signal.signal(n, stop) for n in numbers}
      try:
        yield
      finally:
        for number, handler in kept.items():
          signal.signal(number, handler)

  return Server(config)


def _warm_up(engine: Engine) -> None:
  """Compiles the programs of the first picture."""
  try:
    engine.warm_up()
  except Exception as error:  # the first picture of a user reports it
    logger.warning("the first picture failed: %s", error)
