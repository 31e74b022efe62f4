"""How a peer hands over its memory: messages, connection, listener, and checks of the offered mappings."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from snapengine.handover.peer import PeerTarget as PeerTarget

__all__ = ["PeerTarget"]
_PLACES = {"PeerTarget": "peer"}  # each is imported when first asked for


if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        if name in _PLACES:
            return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
