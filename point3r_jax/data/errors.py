"""The one exception that says: what the user handed in cannot be used."""


class InputError(ValueError):
  """An input that is missing, unreadable or contradictory.

  The message is one line that names the input, fit to be shown to the user
  as it is, without a traceback.
  """


def one_line(error: BaseException) -> str:
  """Returns what an exception says, on one line."""
  return " ".join(str(error).split()) or type(error).__name__
