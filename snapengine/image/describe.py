"""Description of an image in JSON types, for files and pipes."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from snapengine.base.names import escape
from snapengine.image.headers import FileHeader
from snapengine.image.sections import ImageRegion


class SizedBlobs(Mapping[str, bytes]):
    """Named blobs. Their sizes are known without reading them."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of each blob, by name."""


class HasBlobs(Protocol):
    """An image file, or an image that was read from a pipe to the end."""

    @property
    def name(self) -> str: ...

    @property
    def vmstate(self) -> SizedBlobs: ...


def describe(
    header: FileHeader, regions: Sequence[ImageRegion], blobs: Mapping[str, int]
) -> dict[str, Any]:
    """Format, ids, regions, and the sizes of the named blobs."""
    return {
        "format": ".".join(map(str, header.version)),
        "id": str(uuid.UUID(bytes=header.image_id)),
        "parent": str(uuid.UUID(bytes=header.parent_id)) if any(header.parent_id) else None,
        "regions": [region_info(region) for region in regions],
        "vmstate": {escape(name): size for name, size in blobs.items()},
    }


def region_info(region: ImageRegion) -> dict[str, Any]:
    """A region in JSON types."""
    return {
        "name": escape(region.name),
        "addr": region.addr,
        "length": region.length,
        "page_size": region.page_size,
        "kind": region.kind,
    }
