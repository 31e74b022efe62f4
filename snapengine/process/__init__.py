"""How another process is attached to, described and stopped."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from snapengine.process.target import ProcessTarget as ProcessTarget

__all__ = ["ProcessTarget"]
_PLACES = {"ProcessTarget": "target"}  # each is imported when first asked for


if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        if name in _PLACES:
            return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
