"""A static program, and one with the address sanitizer: their writes are in a known order."""

from pathlib import Path

import pytest
from orderkit import OrderTarget, check_order
from realkit import MODES, check_core, save_under_load

pytestmark = [pytest.mark.usefixtures("requires_uffd", "programs"), pytest.mark.timeout(1800)]

FLAGS = {
    "static": ("-static",),
    "asan": ("-fsanitize=address", "-fno-omit-frame-pointer"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", FLAGS)
def test_its_writes_are_a_prefix(tmp_path, how, mode):
    with OrderTarget("heap", 2, 40503, flags=FLAGS[how]) as target:

        def check(path, take):
            low = target.last_write()
            result = take()
            check_order(path, target, low, target.last_write())
            return result

        save_under_load(target.pid, mode, tmp_path, check=check, busy=lambda: target.check_running(2))
        if mode == "stop" and how == "static":  # a core of the other one would have 20 TiB
            check_core(tmp_path / "image", Path(f"/proc/{target.pid}/exe").resolve(), tmp_path)
        target.check_running(2)
