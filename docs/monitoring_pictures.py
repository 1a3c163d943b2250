"""Copies the pictures of docs/monitoring.md: python docs/monitoring_pictures.py RUN

RUN is the folder of a run on the digits, such as runs/digits. The last picture of each
kind in the event files of RUN becomes docs/monitoring/KIND.png.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

KINDS = ("samples", "strips", "loss_by_time_chart")


def main() -> None:
  events = EventAccumulator(str(Path(sys.argv[1]) / "tensorboard"), {"tensors": 0})
  events.Reload()
  folder = Path(__file__).with_name("monitoring")
  folder.mkdir(exist_ok=True)
  for kind in KINDS:
    _, _, png = make_ndarray(events.Tensors(kind)[-1].tensor_proto)
    picture = Image.open(io.BytesIO(png))
    picture = picture.quantize(64, dither=Image.Dither.NONE)  # of few colours
    picture.save(folder / f"{kind}.png", optimize=True)


if __name__ == "__main__":
  main()
