"""A sink of limited speed for programs that write into a pipe: copies input to output at BYTES_PER_SECOND.

``throttle.py BYTES_PER_SECOND``. It never gets ahead of the rate by more than one piece.
"""

import sys
import time

PIECE = 1 << 20


def main(rate: int) -> None:
    begin, copied = time.monotonic(), 0
    while piece := sys.stdin.buffer.read1(PIECE):
        copied += sys.stdout.buffer.write(piece)
        early = begin + copied / rate - time.monotonic()
        if early > 0:
            sys.stdout.buffer.flush()
            time.sleep(early)


if __name__ == "__main__":
    main(int(sys.argv[1]))
