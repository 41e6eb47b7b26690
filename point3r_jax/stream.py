"""Live streams on the host: hold the memory, make room ahead of need."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from point3r_jax.config import ModelConfig
from point3r_jax.memory import (
  PointerMemory,
  check_mask,
  default_capacity,
  next_capacity,
  reset,
)
from point3r_jax.params import check_params, prepare_params
from point3r_jax.stream_programs import Step, StreamPrograms
from point3r_jax.streaming import (
  Prediction,
  StepOptions,
  step_options,
  take_images,
)

# Images that are encoded at once, on accelerators.
_LOOK_AHEAD = 8
# Frames that should be under way while the next one is called: so the device
# never waits for the host.
_UNDER_WAY = 1


class _Counts:
  """Pointer counts as the host knows them: some frames behind the device."""

  def __init__(self, tokens: int, known: int = 0, overflow: int = 0):
    # Of the fullest memory, after the last finished frame that was read.
    self.known = known
    self.overflow = overflow
    self._tokens = tokens
    self._pending = collections.deque()

  @property
  def bound(self) -> int:
    """The most pointers that the next frame can lead to."""
    return self.known + self._tokens * (len(self._pending) + 1)

  def add(self, prediction: Prediction) -> None:
    """Takes note of a frame under way."""
    counts = (prediction.pointer_count, prediction.overflow)
    for count in counts:
      count.copy_to_host_async()
    self._pending.append(counts)

  def read(self, limit: int | None = None, under_way: int = 0) -> None:
    """Reads what is finished; waits until `bound` is within the limit.

    It waits for as few frames as it must, oldest first, and leaves so many
    under way; without a limit it waits for none.
    """
    while self._pending and (
      self._pending[0][0].is_ready()
      or (
        limit is not None
        and self.bound > limit
        and len(self._pending) > under_way
      )
    ):
      # Not count[0]: on the device that would queue behind later frames.
      count, overflow = (np.asarray(x) for x in self._pending.popleft())
      self.known, self.overflow = int(count.max()), int(overflow.sum())


def _chunks(images: Iterable, size: int) -> Iterator[list]:
  """Yields lists of so many images, the last one shorter.

  An error of the images' is raised after the images before it.
  """
  images, error, full = iter(images), None, True
  while full and error is None:
    chunk = []
    try:
      for image in itertools.islice(images, size):
        chunk.append(image)
    except Exception as raised:
      error = raised
    full = len(chunk) == size
    if chunk:
      yield chunk
  if error is not None:
    raise error


class Stream:
  """Feeds one image after the other to a model, or to several side by side.

  The encoder is compiled once and the step once per capacity. Before a frame
  could overflow the memory it grows, see `memory.next_capacity`, without losing
  a pointer; the larger step has by then been compiled in the background. Calls
  return as soon as the device has the work: reading a prediction waits for it.
  Only where frames under way might fill the memory does a call wait, for their
  counts.

    stream = Stream(config, params, image_size=(384, 512))
    for image in images:
      prediction = stream(image)

  Images that need not be waited for, such as a video's, are faster through
  `extend`: it encodes several at once.

  With a `batch_size` of B it is B streams that have nothing to do with each
  other but take their frames at the same time; each may start anew at any of
  them. They share one capacity, the largest that one of them needs.

  Run all streams of a process by one thread. Two of six times XLA crashed on a
  GPU where three threads ran one each.

  Attributes:
    config: the model's sizes.
    options: the step's options.
    image_size: (H, W) of the images.
    batch_size: B, streams side by side.
    look_ahead: images that `extend` encodes at once.
    frames: frames seen since all streams were reset.
  """

  config: ModelConfig
  options: StepOptions
  image_size: tuple[int, int]
  batch_size: int
  look_ahead: int
  frames: int

  def __init__(
    self,
    config: ModelConfig,
    params: dict,
    image_size: tuple[int, int],
    *,
    batch_size: int = 1,
    devices: Sequence[jax.Device] | None = None,
    capacity: int | None = None,
    max_capacity: int | None = None,
    look_ahead: int | None = None,
    compile_ahead: float = 0.5,
    **options,
  ):
    """Prepares a stream; compiles at the first image.

    Args:
      config: the model's sizes.
      params: nested dictionary, see `load_checkpoint`.
      image_size: (H, W), multiples of the patch size.
      batch_size: B, streams side by side.
      devices: to divide the streams among, equally many each; None: the default
        device.
      capacity: pointers to start with room for; None: four frames' tokens, or
        as many as there may be.
      max_capacity: where growth stops; pointers beyond are merged into their
        nearest, counted in `overflow` and, at a later frame, warned about.
        None: no limit.
      look_ahead: images that `extend` encodes at once; None: 8, but 1 on a CPU,
        which gains nothing by more. There is always room for so many, at
        512×384 3 MB each and stream.
      compile_ahead: how full the memory is when the next capacity is compiled
        in the background; 1: not before it is needed.
      **options: fields of `StepOptions`.

    Raises:
      ValueError: for sizes that do not suit, parameters of another model or
        rounded to more than the precision does, or unknown options.
    """
    check_params(config, params)
    self.config = config
    self.options = step_options(**options)
    self.image_size = tuple(image_size)
    self.batch_size = batch_size
    if batch_size < 1 or (devices and batch_size % len(devices)):
      raise ValueError(
        f"{batch_size} streams cannot be divided equally among "
        f"{len(devices or [None])} devices"
      )
    if look_ahead is None:
      look_ahead = 1 if jax.default_backend() == "cpu" else _LOOK_AHEAD
    if look_ahead < 1:
      raise ValueError(f"look_ahead must be at least 1, got {look_ahead}")
    self.look_ahead = look_ahead
    self._programs = StreamPrograms(
      config, self.options, self.image_size, batch_size, look_ahead, devices
    )
    if capacity is None and max_capacity is not None:
      capacity = min(default_capacity(config, self.image_size), max_capacity)
    self._start(capacity)
    if max_capacity is not None and max_capacity < self.capacity:
      raise ValueError(
        f"max_capacity {max_capacity} is below the first capacity "
        f"{self.capacity}"
      )
    self._max_capacity = max_capacity
    self._compile_ahead = compile_ahead
    self._params = self._programs.put(
      prepare_params(params, self.options.precision)
    )
    self._clear = jax.jit(
      reset, donate_argnums=0, out_shardings=self._programs.split
    )

  @property
  def memory(self) -> PointerMemory:
    """The memory after the last frame.

    The next frame takes over its buffers: copy what you want to keep. A memory
    that was kept can be given back, to go on where it was.
    """
    return self._memory

  @memory.setter
  def memory(self, memory: PointerMemory) -> None:
    if memory.capacity > (self._max_capacity or memory.capacity):
      raise ValueError(
        f"the memory's capacity {memory.capacity} is above max_capacity "
        f"{self._max_capacity}"
      )
    wanted = self._programs.memory_shapes(memory.capacity)
    for (path, want), got in zip(
      jax.tree.leaves_with_path(wanted), jax.tree.leaves(memory), strict=True
    ):
      if (want.shape, want.dtype) != (got.shape, got.dtype):
        raise ValueError(
          f"this stream's memory has {jax.tree_util.keystr(path)[1:]} of "
          f"{want.shape} {want.dtype}, not {got.shape} {got.dtype}"
        )
    # A copy: the next frame takes over its buffers.
    self._memory = jax.device_put(
      jax.tree.map(jnp.copy, memory), self._memory.position.sharding
    )
    self._recount()
    self.frames = int(np.asarray(memory.frame).max())

  @property
  def capacity(self) -> int:
    """Pointers there is room for now."""
    return self._memory.capacity

  @property
  def compile_seconds(self) -> dict[int | str, float]:
    """Seconds to compile the step, by capacity, and the "encoder"."""
    return self._programs.seconds

  @property
  def pointer_count(self) -> int:
    """Pointers in memory, the fullest one's; waits for the last frame."""
    return int(np.asarray(self._memory.count).max())

  @property
  def overflow(self) -> int:
    """Pointers merged for lack of room since reset; waits for the frame."""
    return int(np.asarray(self._memory.overflow).sum())

  def reset(self, which: np.ndarray | None = None) -> None:
    """Forgets everything: the next image is a first frame again.

    Args:
      which: (B,) bool, the streams that forget; None: all.

    Raises:
      ValueError: if `which` is not of that shape and type.
    """
    if which is not None:
      which = np.asarray(which)
      check_mask("which", which, (self.batch_size,))
      if not which.all():
        self._memory = self._clear(self._memory, which)
        return
    self._start(self.capacity)

  def wait_for_compiles(self) -> None:
    """Returns once no step is being compiled in the background."""
    self._programs.wait()

  def __call__(self, image: ArrayLike) -> Prediction:
    """Takes the next image of each stream.

    Args:
      image: (B, H, W, 3), uint8, or float32 in [-1, 1]; RGB. A single stream
        also takes (H, W, 3). It may be overwritten once this returns.

    Returns:
      The prediction, with a leading axis of B.

    Raises:
      ValueError: if the image does not have the stream's size or a known type,
        or holds values that are not finite.
    """
    self._encode([self._check(image)], 1)
    return self._take()

  def extend(self, images: Iterable[ArrayLike]) -> Iterator[Prediction]:
    """Takes images in turn, and encodes `look_ahead` of them at once.

    What comes out is what calls with one image after the other give. So many
    images are read before their first prediction; so it is for images that come
    faster than predictions are needed. An error of the images' is raised after
    the predictions for the images before it. Other images may be taken in
    between, but then what was encoded is encoded again.

    Args:
      images: each as in a call, all of one type.

    Yields:
      The prediction for each image.

    Raises:
      ValueError: as calls do; or if images differ in type, before any is taken
        of those that were read together.
    """
    for chunk in _chunks(map(self._check, images), self.look_ahead):
      dtype, *others = {np.dtype(image.dtype) for image in chunk}
      if others:
        raise ValueError(
          f"images must be of one type, got {dtype}, {others[0]}"
        )
      taken = 0
      while taken < len(chunk):
        encoded = self._encode(chunk[taken:], self.look_ahead)
        # A call in between, or another `extend`, encodes other images; a reset
        # forgets them.
        while taken < len(chunk) and self._encoded is encoded:
          taken += 1
          yield self._take()

  def _start(self, capacity: int | None) -> None:
    """Makes all of a new stream: an interrupted frame may have taken any."""
    self._memory = self._programs.init_memory(capacity)
    self._last = self._programs.init_prediction()
    self._frames = self._programs.init_frames()
    self._encoded = None
    self._tokens = self._memory.image_position.shape[1]
    self._counts = _Counts(self._tokens)
    self._interrupted = False
    self._warned = False
    self.frames = 0

  def _recount(self) -> None:
    """Asks the device how full the memory is; waits for the last frame."""
    self._counts = _Counts(self._tokens, self.pointer_count, self.overflow)
    self._interrupted = False

  def _check(self, image: ArrayLike) -> np.ndarray | jax.Array:
    """Returns an image of each stream; raises ValueError for others."""
    image = take_images(image)
    image = image[None] if image.ndim == 3 else image
    shape = (self.batch_size, *self.image_size, 3)
    if image.shape != shape:
      raise ValueError(
        f"this stream takes images of shape {shape}, got {tuple(image.shape)}"
      )
    if isinstance(image, jax.Array):  # It may live on another device.
      image = jax.device_put(image, self._memory.position.sharding)
    return image

  def _encode(self, images: list[np.ndarray | jax.Array], count: int) -> object:
    """Encodes so many images at once, to be taken in turn.

    Of fewer images the last is repeated: nothing is compiled. What was encoded
    before and not taken is gone.

    Returns:
      What `_encoded` is as long as they are there.
    """
    program = self._programs.encoder(
      self._params.encoder, count, images[0].dtype
    )
    if not program.done():  # Compile beside it what will be needed next.
      self._make_room()
      self._step(self.capacity)
    encode = program.result()
    if count > 1:
      missing = count - len(images)
      images = [np.stack(images + images[-1:] * missing, axis=1)]
    self._encoded = object()
    self._frames = encode(self._params.encoder, self._frames, *images)
    return self._encoded

  def _take(self) -> Prediction:
    """Takes the next of the encoded images."""
    self._make_room()
    step = self._step(self.capacity).result()
    self._interrupted = True
    self._memory, self._last, self._frames = step(
      self._params.others, self._memory, self._last, self._frames
    )
    self.frames += 1
    prediction = self._programs.copy(self._last)
    self._counts.add(prediction)
    self._interrupted = False
    return prediction

  def _step(
    self, capacity: int, ahead: bool = False
  ) -> concurrent.futures.Future[Step]:
    """Returns the step for a capacity, compiled or being compiled."""
    # A memory that can grow has room for a frame before each frame.
    grows = capacity != self._max_capacity and capacity >= 2 * self._tokens
    unread = self._tokens if grows else 0
    params = self._params.others
    return self._programs.step(params, capacity, unread, ahead)

  def _next_capacity(self) -> int:
    """Returns the capacity to grow to, within limits."""
    larger = next_capacity(self.capacity, self._tokens)
    return min(larger, self._max_capacity or larger)

  def _make_room(self) -> None:
    """Grows the memory if the next frame might not fit."""
    if self._interrupted:  # A frame may be in memory that was not noted down.
      self._recount()
    counts, larger = self._counts, self._next_capacity()
    counts.read()
    if larger == self.capacity:
      self._warn_once()
      return
    counts.read(limit=self.capacity, under_way=_UNDER_WAY)
    crowded = counts.bound > self.capacity
    if not crowded and counts.known <= self._compile_ahead * self.capacity:
      return
    step = self._step(larger, ahead=True)
    enlarge = self._programs.enlarge(self.capacity, larger)
    if crowded and not (step.done() and enlarge.done()):
      counts.read(limit=self.capacity)  # The frame may fit when all are done.
    if counts.bound > self.capacity:
      self._memory = enlarge.result()(self._memory)

  def _warn_once(self) -> None:
    """Says that pointers find no room, as soon as the host knows."""
    if self._counts.overflow and not self._warned:
      self._warned = True
      logging.getLogger(__name__).warning(
        "the pointer memory is full at its maximal capacity of %d: new "
        "pointers are merged into their nearest (%d so far)",
        self.capacity,
        self._counts.overflow,
      )
