"""A sink with limited rate for programs that write into a pipe.

``throttle.py BYTES_PER_SECOND`` copies stdin to stdout, and is at most READ_BYTES ahead of the rate.
"""

import sys
import time

READ_BYTES = 1 << 20


def main(rate: int) -> None:
    begin, copied = time.monotonic(), 0
    while data := sys.stdin.buffer.read1(READ_BYTES):
        copied += sys.stdout.buffer.write(data)
        early = begin + copied / rate - time.monotonic()
        if early > 0:
            sys.stdout.buffer.flush()
            time.sleep(early)


if __name__ == "__main__":
    main(int(sys.argv[1]))
