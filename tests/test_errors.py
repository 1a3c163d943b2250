"""Errors in one line."""

from __future__ import annotations

import pytest

from mdt_jax.errors import one_line, reason_of_machine


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (ValueError("no\n  such\tfile \n"), "no such file"),
    (ValueError(" \n "), "ValueError"),
    (KeyError(), "KeyError"),
    (ValueError("\x1b[2Jname\x07"), r"\x1b[2Jname\x07"),
    (ValueError("caf\udce9 é"), r"caf\udce9 é"),
    (ValueError("x" * 300), "x" * 300),
    (ValueError("x" * 301), "x" * 299 + "…"),
  ],
)
def test_error_has_one_line_without_control_characters(error, expected):
  assert one_line(error) == expected


def test_memory_error_without_a_text_is_described():
  reason = reason_of_machine(MemoryError())
  assert reason == "too little memory: an array cannot be allocated"
