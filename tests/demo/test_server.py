"""The command and its server: refusals, port, limits. No test here needs gradio."""

from __future__ import annotations

import asyncio
import socket

import pytest

from mdt_jax.demo import server
from tests.cli.commands import assert_refused, run


@pytest.mark.parametrize(
  ("flags", "texts"),
  [
    ("", ["--checkpoint must be given", "--checkpoint=runs/digits"]),
    ("--checkpoint=nowhere", ["--checkpoint = 'nowhere'"]),
    ("--checkpoint=. --port=99999", ["--port = 99999", "65,535"]),
    ("--checkpoint=. --host=no.such.host.invalid", ["--host ="]),
    ("--checkpoint=. --max_queue=0", ["--max_queue = 0"]),
    ("--checkpoint=. --ports=3", ["--ports", "did you mean --port=3?"]),
  ],
)
def test_bad_flags_give_one_line_and_exit_code_2(flags, texts, tmp_path):
  module = "tests.demo.without_gradio"
  assert_refused(run(module, *flags.split(), folder=tmp_path), *texts)
  assert not any(tmp_path.iterdir())


def test_a_taken_port_is_refused(tmp_path):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    flags = f"--checkpoint={tmp_path}", f"--port={port}"
    result = run("tests.demo.without_gradio", *flags)
  assert_refused(result, f"--port = {port}", "taken")


def test_missing_gradio_is_named(tmp_path):
  result = run("tests.demo.without_gradio", "--gone", f"--checkpoint={tmp_path}")
  assert_refused(result, "needs gradio", "pip install")


@pytest.mark.parametrize(
  ("host", "expected"),
  [
    ("127.0.0.1", True),
    ("::1", True),
    ("localhost", True),
    ("0.0.0.0", False),
    ("192.168.0.4", False),
    ("example.org", False),
  ],
)
def test_loopback_addresses_are_known(host, expected):
  assert server.is_loopback(host) == expected


def post(length, parts, limit=100):
  """(status, bytes that the application received) of a request."""
  sent, seen = [], []
  messages = [
    {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}
    for i, part in enumerate(parts)
  ]

  async def app(scope, receive, send):
    while True:
      message = await receive()
      if message["type"] == "http.disconnect":
        return
      seen.append(message["body"])
      if not message["more_body"]:
        break
    await send({"type": "http.response.start", "status": 200, "headers": []})

  async def receive():
    return messages.pop(0)

  async def send(message):
    sent.append(message)

  headers = [] if length is None else [(b"content-length", str(length).encode())]
  scope = {"type": "http", "headers": headers}
  asyncio.run(server.LimitedRequests(app, limit)(scope, receive, send))
  return sent[0]["status"] if sent else None, sum(map(len, seen))


def test_requests_up_to_the_limit_pass():
  assert post(100, [bytes(60), bytes(40)]) == (200, 100)


def test_a_longer_request_is_refused_before_it_is_read():
  assert post(101, [bytes(101)]) == (413, 0)


def test_a_request_of_unknown_length_ends_at_the_limit():
  status, seen = post(None, [bytes(60), bytes(60), bytes(60)])
  assert status is None
  assert seen <= 100


def test_files_lie_in_a_folder_that_is_removed():
  with server.temporary_folder() as folder:
    (folder / "picture.png").write_bytes(b"")
  assert not folder.exists()
