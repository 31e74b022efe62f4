CATEGORIES: dict[str, int]
WP_MATCHING: int
CHECK_WPASYNC: int

def has_pagemap_scan() -> bool: ...
def scan(
    fd: int, start: int, end: int, *, flags: int = 0, mask: int = 0, anyof: int = 0, returned: int = 0
) -> list[tuple[int, int, int]]: ...
