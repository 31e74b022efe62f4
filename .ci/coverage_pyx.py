"""Lines of .pyx files for coverage.py: gcov counts them, of a build by .ci/coverage.

As a program (coverage_pyx.py OBJECTS): report them, as the files below OBJECTS say it, and those of Python.
As a plugin of coverage.py: tell which lines of a .pyx count.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from coverage import Coverage, CoveragePlugin, FileReporter

ROOT = Path(__file__).parent.parent
LINES = ROOT / "build" / "coverage" / "lines.json"
# The head of a function or a class is also where Cython puts wrappers and clean-up: its body is what counts.
HEAD = re.compile(r"^\S|^\s*(@|def |class |cpdef |cdef [^=]*:\s*$|cdef [^=]*\($|\"\"\"|#|$)")


class Plugin(CoveragePlugin):
    def file_reporter(self, filename):
        return PyxReporter(filename)


class PyxReporter(FileReporter):
    def lines(self):
        return set(json.loads(LINES.read_text())[self.filename])


def coverage_init(registry, options):
    registry.add_file_tracer(Plugin())


def counts(objects):
    """{.pyx: {line: how often it ran}}"""
    found = {}
    for notes in sorted(Path(objects).rglob("*.gcno")):
        command = ["gcov", "--stdout", "--json-format", str(notes)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        for file in json.loads(done.stdout)["files"]:
            path = ROOT / file["file"]
            if path.suffix != ".pyx" or not path.exists():
                continue
            text = path.read_text().splitlines()
            lines = found.setdefault(str(path), {})
            for line in file["lines"]:
                number = line["line_number"]
                if number <= len(text) and not HEAD.match(text[number - 1]):
                    lines[number] = max(lines.get(number, 0), line["count"])
    return found


def report(objects):
    """Combine what Python and gcov have counted, write build/coverage/html, print a table; the percentage."""
    lines = counts(objects)
    LINES.write_text(json.dumps({path: sorted(of) for path, of in lines.items()}))
    coverage = Coverage()
    coverage.set_option("run:plugins", ["coverage_pyx"])  # here only: what runs the tests needs none
    coverage.combine()
    data = coverage.get_data()
    data.add_lines({path: [line for line, count in of.items() if count] for path, of in lines.items()})
    data.add_file_tracers({path: "coverage_pyx.Plugin" for path in lines})
    coverage.save()
    coverage.html_report()
    return coverage.report(), coverage.get_option("report:fail_under")


def main(objects):
    total, least = report(objects)
    if total < least:
        print(f"coverage: {total:.1f} % of the lines were reached, fewer than {least:g} %", file=sys.stderr)
    return int(total < least)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
