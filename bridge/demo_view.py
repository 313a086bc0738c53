"""What `wattbridge demo` shows: a live screen, or a line now and then where there is no terminal."""

from collections.abc import Iterable
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bridge.demo_figures import ENOUGH_KWH, WINDOW, Figures, Findings

WORST = 5
BARS = "▁▂▃▄▅▆▇█"
# Two borders and two spaces of each of the two panels that stand side by side.
FRAMES = 8


def line(figures: Figures, clock: str) -> str:
    """The figures on one line."""
    bridge, found = figures.bridge, figures.findings
    if bridge is None:
        return f"{clock}  nothing yet"
    fleet = efficiency(found.ac, found.dc) if isinstance(found, Findings) else "—"
    return (
        f"{clock}  {figures.rate:,.0f} msg/s  published {figures.published:,}  stored {bridge.stored:,}  "
        f"duplicate {bridge.duplicate:,}  dead-lettered {bridge.dead_lettered:,}  backlog {figures.backlog:,}  "
        f"slowest commit {bridge.slowest_commit_ms:.0f} ms  efficiency {fleet}"
    )


def invitation(address: str) -> str:
    """Where the page is."""
    return f"Open {address} in a browser"


def screen(figures: Figures, clock: str, address: str, width: int) -> RenderableType:
    """The figures and where there is more, on 19 lines, from 80 columns on."""
    title = Table.grid(expand=True)
    title.add_column()
    title.add_column(justify="right")
    fleet_time = f"fleet time {figures.fleet_time:%Y-%m-%d %H:%M} UTC" if figures.fleet_time else ""
    title.add_row("[bold]wattbridge demo[/]", f"{fleet_time}   [bold]{clock}[/]")
    panels = Table.grid(expand=True)
    panels.add_column(ratio=1)
    panels.add_column(ratio=1)
    panels.add_row(_messages(figures, (width - FRAMES) // 2), _database(figures))
    # The cursor rests on the empty line, where the ^C that the terminal echoes does no harm.
    return Group(title, panels, _fleet(figures), Text(invitation(address), style="bold green"), Text())


def efficiency(ac: float, dc: float) -> str:
    """DC / AC in percent, or a dash and why there is none; never a clamped number."""
    if ac < ENOUGH_KWH:
        return "— (too little energy yet)"
    if dc > ac:
        return "— (more DC than AC)"
    return f"{dc / ac:.1%}"


def duration(seconds: float) -> str:
    """Hours where there are any, minutes and seconds: 00:20."""
    text = str(timedelta(seconds=int(seconds)))
    return text.removeprefix("0:")


def sparkline(values: Iterable[float], width: int) -> str:
    """The last `width` values as bars, from zero up to the largest of them."""
    shown = list(values)[-width:]
    top = max(shown, default=0.0) or 1.0
    return "".join(BARS[int(value / top * (len(BARS) - 1))] for value in shown)


def _messages(figures: Figures, width: int) -> Panel:
    outstanding = figures.bridge.outstanding if figures.bridge else 0
    table = _names_and_figures()
    table.add_row("received now", f"[bold]{figures.rate:,.0f}[/] msg/s")
    table.add_row("published", f"{figures.published:,}")
    table.add_row("backlog: at the broker", f"{figures.backlog:,}")
    table.add_row("in the bridge", f"{outstanding:,}")
    return Panel(Group(table, Text(sparkline(figures.rates, width), style="green")), title="Messages", height=7)


def _database(figures: Figures) -> Panel:
    bridge, found = figures.bridge, figures.findings
    table = _names_and_figures()
    if bridge:
        table.add_row("stored: history rows", f"[bold]{bridge.stored:,}[/]")
        table.add_row("duplicates", f"{bridge.duplicate:,}")
        table.add_row("dead letters", f"{bridge.dead_lettered:,}", style="yellow" if bridge.dead_lettered else "")
        table.add_row("slowest commit", f"{bridge.slowest_commit_ms:,.0f} ms")
    content: RenderableType = table
    if isinstance(found, Findings) and found.dead_letters:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.dead_letters.items())
        content = Group(table, Text(reasons, style="yellow", no_wrap=True, overflow="ellipsis"))
    elif isinstance(found, Findings):
        table.add_row("size", f"{found.database_bytes / 2**20:,.0f} MB")
    return Panel(content, title="Database", height=7)


def _fleet(figures: Figures) -> Panel:
    found = figures.findings
    title = f"Efficiency, last {WINDOW // timedelta(minutes=1)} minutes of fleet time"
    if not isinstance(found, Findings):
        return Panel(Text(found or "comes in a moment", style="dim"), title=title, height=WORST + 4)
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
    table.add_column("worst vehicles")
    for name in ("DC / AC", "AC kWh", "DC kWh", "meter"):
        table.add_column(name, justify="right")
    for vehicle in found.worst:
        ratio = efficiency(vehicle.ac, vehicle.dc)
        table.add_row(
            vehicle.vehicle_id, f"[red]{ratio}[/]", f"{vehicle.ac:,.2f}", f"{vehicle.dc:,.2f}", vehicle.meter_id
        )
    if not found.worst:
        table.add_row(f"— (none has charged {ENOUGH_KWH:g} kWh yet)")
    fleet = f"fleet [bold]{efficiency(found.ac, found.dc)}[/]   {found.dc:,.1f} kWh DC of {found.ac:,.1f} kWh AC"
    cost = f"[dim]{found.minutes:,} matched minutes, a query of {found.took_s * 1_000:,.0f} ms[/]"
    return Panel(Group(Text.from_markup(fleet), table), title=title, subtitle=cost, height=WORST + 4)


def _names_and_figures() -> Table:
    table = Table.grid(expand=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    return table
