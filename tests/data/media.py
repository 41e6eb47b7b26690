"""Images and videos that tests make on the fly."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

FASTSTART = {"movflags": "faststart"}


def save_image(path, size=(64, 48), grey=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", size, (grey, grey, grey)).save(path)
  return path


def save_video(
  path,
  count=30,
  codec="mpeg4",
  size=(64, 48),
  times=None,
  options=None,
  codec_options=None,
):
  """Frame i is grey with value 8 i, under noise; times are milliseconds."""
  rng = np.random.default_rng(0)
  time_base = Fraction(1, 1000 if times else 30)
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream(codec, rate=30, options=codec_options or {})
    stream.width, stream.height = size
    stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    stream.codec_context.time_base = time_base
    for i in range(count):
      pixels = rng.integers(0, 8, (size[1], size[0], 3)) + 8 * (i % 31)
      frame = av.VideoFrame.from_ndarray(pixels.astype(np.uint8), "rgb24")
      frame.pts = times[i] if times else i
      frame.time_base = time_base
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def cut(path, fraction=0.6):
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * fraction)])
  return path


def indices(source):
  return [frame.index for frame in source]


def greys(source):
  return [round(float(frame.image.mean()) / 8) for frame in source]
