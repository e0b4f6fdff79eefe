"""The conversations kept on this machine.

What it is: `History`, one SQLite file under M1_HOME, and what it answers. What it is not: the
conversation that the model sees (m1local.chat), or anything that leaves this machine.
"""

from m1local_app.history.records import Hit, StoredConversation, StoredMessage
from m1local_app.history.store import ContinuedError, History

__all__ = ["ContinuedError", "History", "Hit", "StoredConversation", "StoredMessage"]
