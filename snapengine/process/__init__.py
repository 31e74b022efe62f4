"""How another process is attached to, described and stopped."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from snapengine.process.target import ProcessTarget as ProcessTarget

__all__ = ["ProcessTarget"]
_PLACES = {"ProcessTarget": "target"}  # each is imported when first asked for

if not TYPE_CHECKING:  # or every misspelled name would have a type
    from snapengine.base.lazy import exports

    __getattr__, __dir__ = exports(__name__, _PLACES)
