"""metrics.jsonl: one line a write, also after kills and resumed runs."""

from __future__ import annotations

import json
import logging
import math

import pytest

from mdt_jax.training.metric_lines import MetricLines, read_lines


def write(path, start, steps):
  lines = MetricLines(path, start)
  for step in steps:
    lines.write_scalars(step, {"loss": step / 2})
  return lines


def steps_of(path):
  return [line["step"] for line in read_lines(path)]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "metrics.jsonl"


def test_line_holds_step_time_and_metrics(path):
  write(path, 0, [2]).close()
  (line,) = path.read_text().splitlines()
  found = json.loads(line)
  assert found.pop("time") > 0
  assert found == {"step": 2, "loss": 1.0}


def test_each_line_reaches_the_file_at_once(path):
  lines = write(path, 0, [2, 4])
  assert steps_of(path) == [2, 4]
  lines.close()


def test_value_that_is_not_finite_is_null(path):
  MetricLines(path).write_scalars(1, {"a": math.nan, "b": math.inf, "c": 1})
  (line,) = path.read_text().splitlines()
  found = json.loads(line)
  assert (found["a"], found["b"], found["c"]) == (None, None, 1)


def test_resumed_run_replaces_the_lines_of_later_steps(path):
  write(path, 0, [2, 4, 4, 6, 8])
  write(path, 4, [6])
  assert steps_of(path) == [2, 4, 4, 6]


def test_reopened_file_keeps_all_steps(path):
  write(path, 0, [2, 4])
  write(path, None, [6])
  assert steps_of(path) == [2, 4, 6]


@pytest.mark.parametrize(
  "damage", [b'{"step": 6, "lo', b'{"step": 6}', b"\0\0\0\n", b'{"loss": 1}\n', b"7\n"]
)
def test_damaged_line_is_removed_with_a_warning(path, damage, caplog):
  write(path, 0, [2, 4])
  with path.open("ab") as file:
    file.write(damage)
  with caplog.at_level(logging.WARNING, "mdt_jax"):
    write(path, 10, [12])
  assert steps_of(path) == [2, 4, 12]
  assert [json.loads(line)["step"] for line in path.open()] == [2, 4, 12]
  assert "1 damaged line removed" in caplog.text


def test_line_that_is_written_in_part_is_an_error(path):
  lines = MetricLines(path)

  class Full:
    def write(self, data):
      return len(data) - 1

  lines._file.close()
  lines._file = Full()
  with pytest.raises(OSError, match="bytes of a line were written"):
    lines.write_scalars(1, {"loss": 1.0})


def test_deleted_workdir_is_not_created_again(tmp_path):
  with pytest.raises(FileNotFoundError):
    MetricLines(tmp_path / "deleted" / "metrics.jsonl")
