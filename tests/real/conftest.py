"""Report the results of the programs of tests/real at the end of the run."""


def pytest_terminal_summary(terminalreporter):
    import realkit

    for line in realkit.summary:
        terminalreporter.line(line)
