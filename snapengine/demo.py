"""`snapengine demo`: the main job. Both methods on the same guest at several write rates."""

DEFAULT_RATES = "0,2000,10000,40000,max"


def parse_rates(text: str) -> tuple[int | None, ...]:
    raise ValueError
