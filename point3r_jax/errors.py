"""Errors that the user can mend, as opposed to those of the program."""


class UserError(ValueError):
  """What the user asked for cannot be done.

  The message is one line that says what is wrong and what to do, fit to be
  shown as it is, without a traceback.
  """


class InputError(UserError):
  """An input that is missing, unreadable or contradictory."""


def one_line(error: BaseException) -> str:
  """Returns what an exception says, on one line."""
  return " ".join(str(error).split()) or type(error).__name__
