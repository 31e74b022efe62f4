"""The figures of a capture as a file for Prometheus: the textfile collector of node_exporter reads it."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec

from snapengine.result import Result

PREFIX = "snapengine_"


def metrics_file(path: str) -> str:
    """Check the argument of --metrics. Raises ValueError if the file cannot be written."""
    folder = os.path.dirname(path) or "."
    if find_spec("prometheus_client") is None:
        raise ValueError("needs prometheus-client: pip install 'snapengine[metrics]'")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: there is no directory {folder} to write to")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a directory")
    return path


def write_metrics(path: str, result: Result) -> None:
    """Write the figures of a capture that has ended; the file is replaced as a whole. Raises OSError.

    A capture that fails leaves the file as it was: its age is what to watch.
    """
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    for name, text, value in (
        ("end_timestamp_seconds", "When the last capture ended", time.time()),
        ("instant_timestamp_seconds", "The instant of the image; 0: unknown", result.t_unix_ns / 1e9),
        ("completed", "1: there is an image; 0: it did not converge", result.status == "completed"),
        ("duration_seconds", "Time that the capture took", result.duration_ns / 1e9),
        ("stop_seconds", "Time that the target stood still", result.stop_ns / 1e9),
        ("image_bytes", "Size of the image", result.image_bytes),
        ("memory_bytes", "Size of the memory", result.region_bytes),
        ("nonzero_bytes", "Memory that is not zero", result.nonzero_bytes),
        ("saved_pages", "Pages that were saved", result.pages_saved),
        ("lost_pages", "Pages that the target discarded before they were saved", result.lost_pages),
        ("faults", "Writes that waited until their page was saved", result.faults),
        ("rounds", "Rounds of dirty logging", result.rounds),
        ("peak_buffer_bytes", "Most memory in use between the target and the sink", result.peak_buffer_bytes),
        ("spilled_bytes", "Bytes that went through the spill file", result.spilled_bytes),
        ("warnings", "Number of warnings", len(result.warnings)),
    ):
        Gauge(PREFIX + name, text, registry=registry).set(float(value))
    waits = Gauge(PREFIX + "fault_wait_seconds", "How long they waited", ["quantile"], registry=registry)
    for quantile, name in (("0.5", "p50"), ("0.99", "p99"), ("1", "max")):
        waits.labels(quantile).set(result.fault_ns[name] / 1e9)
    write_to_textfile(path, registry)
