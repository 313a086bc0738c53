"""Let libFuzzer look for a topic or a payload that breaks what must hold: `make fuzz FOR=60`.

python -m tests.fuzz.fuzz topic|payload [libFuzzer's options] [folders of examples]
"""

import sys

import atheris

with atheris.instrument_imports(include=["bridge"]):
    from tests.fuzz.targets import check_payload, check_topic

TARGETS = {"topic": check_topic, "payload": check_payload}


def main() -> None:
    """Run the target that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit("usage: python -m tests.fuzz.fuzz topic|payload [options] [folders]")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
