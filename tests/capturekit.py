"""Helpers for tests that capture memory of this process."""

import mmap

import snapengine
from snapengine.image import open_image


def anonymous(size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
    return mmap.mmap(-1, size, flags=flags)


def snap(buffer, path, inside=None, **options):
    with snapengine.snapshot(buffer, path, **options) as capture:
        if inside:
            inside()
    return capture.result


def saved(path, name="buffer"):
    with open_image(path) as image:
        image.verify()
        (region,) = [region for region in image.regions if region.name == name]
        return image.read(region, 0, region.length)
