"""What a ledger says must be true, for people and for programs: `truth` is a command for a typer application."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from simulator.ledger import LedgerError

NAMED = 10
"""Of the faulty chargers, so many are named to people."""


def truth(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="The file that `simulate --ledger` wrote.")],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as one JSON object: by vehicle, by meter, by charging session.")
    ] = False,
) -> None:
    """Print what a ledger says must be true, without any database: for a bridge that verify cannot read.

    Books, dead letters by reason, energies, faulty chargers; with --json the answers to the analytics one by one.
    What was never acknowledged (in doubt) counts as if it had arrived. Needs the extra verify (numpy).

    Exit codes: 0 fine; 1 the ledger cannot be read; 2 wrong usage.
    """
    try:
        found = _read(ledger)
    except LedgerError as error:
        _complain(str(error))
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        _complain("truth needs numpy: pip install numpy")
    else:
        sys.stdout.write((json.dumps(found) if as_json else _text(found)) + "\n")


def _read(path: Path) -> dict[str, Any]:
    from simulator.answers import answers, plain  # noqa: PLC0415 - needs numpy, which `simulate` does without
    from simulator.truth import read  # noqa: PLC0415

    ledger = read(path)
    return {
        "ledger": str(path),
        "complete": ledger.complete,
        "header": ledger.header,
        "books": ledger.books._asdict(),
        "dead_letters": dict(Counter(letter.reason for letter in ledger.letters).most_common()),
        **plain(answers(ledger.meter_rows, ledger.vehicle_rows), ledger.ids),
    }


def _text(found: dict[str, Any]) -> str:
    header, vehicles, meters = found["header"], found["vehicles"], found["meters"]
    ac = sum(meter["ac_kwh"] for meter in meters)
    dc = sum(vehicle["dc_kwh"] for vehicle in vehicles)
    matched_ac = sum(vehicle["matched_ac_kwh"] for vehicle in vehicles)
    matched_dc = sum(vehicle["matched_dc_kwh"] for vehicle in vehicles)
    efficiency = f", efficiency {matched_dc / matched_ac:.4f}" if matched_ac else ""
    lines = [
        f"ledger            {found['ledger']}" + ("" if found["complete"] else "; not every message was acknowledged"),
        f"fleet             {len(header['meter_ids']):,} meters, {len(header['vehicle_ids']):,} vehicles",
        "books             " + ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in found["books"].items()),
        "dead letters      " + (", ".join(f"{n:,} {reason}" for reason, n in found["dead_letters"].items()) or "none"),
        f"energy            AC {ac:,.4f} kWh, DC {dc:,.4f} kWh",
        f"matched minutes   AC {matched_ac:,.4f} kWh, DC {matched_dc:,.4f} kWh{efficiency}",
        f"charging sessions {len(found['sessions']):,}",
        f"faulty chargers   {_listed(header.get('faulty', []))}",
    ]
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    """Return the first names, and how many others there are."""
    more = f" and {len(names) - NAMED:,} more (--json names them)" if len(names) > NAMED else ""
    return (", ".join(names[:NAMED]) or "none") + more


def _complain(text: str) -> None:
    sys.stderr.write(f"truth: {text}\n")
    raise typer.Exit(1)
