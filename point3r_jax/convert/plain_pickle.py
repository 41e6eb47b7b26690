"""A pickle reader that builds data and never runs anything.

A pickle is a program for a small stack machine, and the standard machine lets
that program import and call whatever it names. The machine below has no such
instruction: it knows dicts, tuples, strings and numbers, and wherever a pickle
asks for anything else (a class, a call, an object's state) it puts an `Inert`
stand-in. What a caller knows how to make of a call, such as a tensor, it says
by two functions. Nothing is imported, called by name, or given attributes; an
unreadable configuration object therefore costs nothing and harms nothing.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Inert:
  """Stands for anything that is not plain data; hashed by identity.

  Attributes:
    name: What it stands for: the dotted name of a class or function, the name
      of the class of which it is an object, or a word such as `list`.
  """

  name: str


Construct = Callable[[str, tuple], Any]
PersistentLoad = Callable[[Any], Any]

# The instructions whose decoded argument is the value itself.
_VALUES = frozenset(
  {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
  }
)

_CONSTANTS = {
  "NONE": None,
  "NEWTRUE": True,
  "NEWFALSE": False,
  "EMPTY_TUPLE": (),
}

# Nothing of interest is kept in lists or sets, so that their items can be
# dropped: an unhashable item or a list that holds itself is then no problem.
# Extension codes and out-of-band buffers refer to the reading process.
_OPAQUE = {
  "EMPTY_LIST": "list",
  "EMPTY_SET": "set",
  "EXT1": "an extension code",
  "EXT2": "an extension code",
  "EXT4": "an extension code",
  "NEXT_BUFFER": "an out-of-band buffer",
}

_TUPLE_LENGTHS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(
  data: bytes, construct: Construct, persistent_load: PersistentLoad
) -> Any:
  """Reads a pickle as data.

  Args:
    data: The pickle, of any protocol.
    construct: Given the dotted name of a class or function and the arguments
      that the pickle passes to it, returns what the call stands for.
    persistent_load: Returns what a persistent id stands for.

  Returns:
    The pickled value: dicts, tuples, strings, bytes, numbers, booleans, None,
    what the two functions returned, and `Inert` for all else. Keys of dicts
    that are neither strings, numbers, bytes, booleans nor None become `Inert`.

  Raises:
    Exception: Of any class, if the pickle is malformed.
  """
  machine = _Machine(construct, persistent_load)
  for opcode, argument, _ in pickletools.genops(data):
    machine.run(opcode.name, argument)
  return machine.stack.pop()


class _Machine:
  """The stack, the marked stacks below it, and the memo."""

  def __init__(self, construct: Construct, persistent_load: PersistentLoad):
    self.stack: list[Any] = []
    self._marked: list[list[Any]] = []
    self._memo: dict[int, Any] = {}
    self._construct = construct
    self._persistent_load = persistent_load

  def run(self, opcode: str, argument: Any) -> None:
    """Carries out one instruction."""
    if opcode in _VALUES:
      self.stack.append(argument)
    elif opcode in _CONSTANTS:
      self.stack.append(_CONSTANTS[opcode])
    elif opcode in _OPAQUE:
      self.stack.append(Inert(_OPAQUE[opcode]))
    elif opcode in _TUPLE_LENGTHS:
      self._push_tuple(_TUPLE_LENGTHS[opcode])
    else:
      self._run_special(opcode, argument)

  def _run_special(self, opcode: str, argument: Any) -> None:
    stack = self.stack
    match opcode:
      case "PROTO" | "FRAME" | "STOP" | "READONLY_BUFFER":
        pass

      case "PUT" | "BINPUT" | "LONG_BINPUT":
        self._memo[argument] = stack[-1]
      case "MEMOIZE":
        self._memo[len(self._memo)] = stack[-1]
      case "GET" | "BINGET" | "LONG_BINGET":
        stack.append(self._memo[argument])

      case "MARK":
        self._marked.append(stack)
        self.stack = []
      case "POP" if not stack:
        self._pop_mark()
      case "POP":
        stack.pop()
      case "POP_MARK":
        self._pop_mark()
      case "DUP":
        stack.append(stack[-1])

      case "EMPTY_DICT":
        stack.append({})
      case "DICT":
        items = self._pop_mark()
        self.stack.append({})
        self._set_items(items)
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        self._set_items([key, value])
      case "SETITEMS":
        self._set_items(self._pop_mark())
      case "TUPLE":
        items = self._pop_mark()
        self.stack.append(tuple(items))
      case "LIST" | "FROZENSET":
        self._pop_mark()
        self.stack.append(Inert(opcode.lower()))
      case "APPEND":
        stack.pop()
      case "APPENDS" | "ADDITEMS":
        self._pop_mark()

      case "GLOBAL":
        stack.append(Inert(_dotted(*argument.split(" ", 1))))
      case "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        stack.append(Inert(_dotted(module, name)))
      case "REDUCE" | "NEWOBJ":
        arguments, function = stack.pop(), stack.pop()
        self._call(function, arguments)
      case "NEWOBJ_EX":
        _, arguments, function = stack.pop(), stack.pop(), stack.pop()
        self._call(function, arguments)
      case "OBJ":
        function, *arguments = self._pop_mark()
        self._call(function, tuple(arguments))
      case "INST":
        arguments = self._pop_mark()
        function = Inert(_dotted(*argument.split(" ", 1)))
        self._call(function, tuple(arguments))
      case "BUILD":
        stack.pop()  # The state; the object below it stays as it is.

      case "PERSID":
        stack.append(self._persistent_load(argument))
      case "BINPERSID":
        stack.append(self._persistent_load(stack.pop()))

      case _:
        raise ValueError(f"unknown instruction {opcode}")

  def _pop_mark(self) -> list[Any]:
    """Removes the last mark and returns the items that were above it."""
    items, self.stack = self.stack, self._marked.pop()
    return items

  def _push_tuple(self, length: int) -> None:
    """Replaces the upper items of the stack by a tuple of them."""
    if len(self.stack) < length:
      raise ValueError("the stack is too short for a tuple")
    items = tuple(self.stack[-length:])
    del self.stack[-length:]
    self.stack.append(items)

  def _set_items(self, items: list[Any]) -> None:
    """Puts alternating keys and values into the object on top of the stack."""
    target = self.stack[-1]
    if not isinstance(target, dict):
      return
    for key, value in zip(items[::2], items[1::2], strict=True):
      target[_key(key)] = value

  def _call(self, function: Any, arguments: Any) -> None:
    """Pushes what a call of `function` stands for; the only "call" there is."""
    if not isinstance(function, Inert):
      self.stack.append(Inert("an unknown object"))
    elif not isinstance(arguments, tuple):
      self.stack.append(Inert(function.name))
    else:
      self.stack.append(self._construct(function.name, arguments))


def _dotted(module: Any, name: Any) -> str:
  """Returns the full name of a global."""
  return f"{_text(module)}.{_text(name)}"


def _text(value: Any) -> str:
  # Never the text of anything nested: that recurses as deep as the file likes.
  return value if isinstance(value, str) else "?"


def _key(value: Any) -> Any:
  """Returns `value` as a key of a dict.

  Lists and dicts have no hash, and the hash of a tuple nested a million deep
  overflows the interpreter's stack; neither can be the name of a tensor.
  """
  if value is None or isinstance(value, str | int | float | bytes | Inert):
    return value
  return Inert(type(value).__name__)
