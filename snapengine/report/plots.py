"""Pictures: their colours, and whether one can be drawn. They need matplotlib."""

from __future__ import annotations

from pathlib import Path

from snapengine.errors import UnsupportedError
from snapengine.options import DIRTY_LOGGING, WRITE_TRACKING

# Okabe and Ito's palette: told apart with any colour vision, and by the marker without colours.
STYLES = {WRITE_TRACKING: ("#0072B2", "o"), DIRTY_LOGGING: ("#D55E00", "s")}
GREY = "#555555"
MIB = 1 << 20


def check_plot(path: str) -> None:
    """Fail before the work, not after it, if no picture can be drawn. Raises UnsupportedError, OSError."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "--plot needs matplotlib, which is not installed: pip install 'snapengine[plot]'"
        ) from None
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(2, "no such directory", str(Path(path).absolute().parent))
