"""How a peer hands over its memory: messages, connection, listener, and checks of the offered mappings."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from snapengine.handover.peer import PeerTarget as PeerTarget

__all__ = ["PeerTarget"]
_PLACES = {"PeerTarget": "peer"}  # each is imported when first asked for

if not TYPE_CHECKING:  # or every misspelled name would have a type
    from snapengine.base.lazy import exports

    __getattr__, __dir__ = exports(__name__, _PLACES)
