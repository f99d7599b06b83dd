"""The picture of README and docs, from saved results: time and memory of every divergence, naive
and fused. `make tables` draws it.

Two files, one for light and one for dark pages. Text stays text, in the reader's own font.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import table

ASSETS = table.HERE.parent / "docs" / "assets"
INK = {
    "light": dict(text="#1f2328", faint="#59636e", naive="#d1d9e0", ours="#0969da"),
    "dark": dict(text="#f0f6fc", faint="#9198a1", naive="#48515c", ours="#4493f8"),
}
WIDTH, NAMES, PITCH, TOP, BAR = 830, 118, 22, 74, 15
PANELS = ((NAMES, 285), (492, 245))  # left edge, and length of the longest bar
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def draw(result: dict, scheme: str) -> str:
    """SVG: a row for each divergence over the largest vocabulary that was measured with both."""
    ink = INK[scheme]
    dense = table.entries_of(result)["dense"]
    V = max(entry["V"] for entry in dense)
    groups = table.grouped(dense, "divergence", "V", "distance")
    rows = {
        name: (row["naive"], row["fastkd"])
        for (name, size, distance), row in groups.items()
        if size == V and distance == 1
    }
    first = next(iter(rows.values()))[1]
    machine = result["machine_info"]
    height = TOP + PITCH * len(rows) + 8
    title = f"Loss and gradient of {first['rows']} tokens × {V:,} entries"
    about = f"{machine['device']}, {machine['threads']} threads, {first['dtype'][6:]}"
    times = [[1e3 * entry["median"] for entry in pair] for pair in rows.values()]
    sizes = [[max(entry["peak_bytes"], 0) / 2**20 for entry in pair] for pair in rows.values()]

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" role="img" font-family="{FONT}" font-size="12">',
        f"<title>{escape(title)}: naive PyTorch and fastkd</title>",
        text(0, 16, title, ink["text"], size=15, weight=600),
        text(0, 35, about, ink["faint"]),
        square(WIDTH - 190, 8, ink["naive"]),
        text(WIDTH - 173, 18, "PyTorch", ink["text"]),
        square(WIDTH - 100, 8, ink["ours"]),
        text(WIDTH - 83, 18, "fastkd", ink["text"]),
    ]
    for (left, _), name in zip(PANELS, ("time", "extra memory"), strict=True):
        parts.append(text(left, TOP - 10, name, ink["faint"], weight=600))
    for i, name in enumerate(rows):
        y = TOP + PITCH * i
        parts.append(text(NAMES - 10, y + 12, name, ink["text"], anchor="end"))
        for (left, length), values, unit in zip(PANELS, (times, sizes), ("ms", "MB"), strict=True):
            scale = length / max(naive for naive, _ in values)
            naive, ours = values[i]
            parts += [
                bar(left, y, naive * scale, ink["naive"]),
                bar(left, y, max(ours * scale, 1.5), ink["ours"]),
                text(left + ours * scale + 5, y + 12, f"{ours:,.0f}", ink["text"], size=11),
                text(
                    left + naive * scale + 5, y + 12, f"{naive:,.0f} {unit}", ink["faint"], size=11
                ),
            ]
    return "\n".join([*parts, "</svg>", ""])


def text(
    x: float, y: float, words: str, fill: str, *, size: int = 12, weight: int = 400,
    anchor: str = "start",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" font-size="{size}" font-weight="{weight}"'
        f' text-anchor="{anchor}">{escape(words)}</text>'
    )


def bar(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{fill}"/>'


def square(x: float, y: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="11" height="11" rx="2" fill="{fill}"/>'


def path_of(scheme: str) -> Path:
    return ASSETS / f"speed-{scheme}.svg"


def write() -> None:
    ASSETS.mkdir(parents=True, exist_ok=True)
    for scheme in INK:
        path_of(scheme).write_text(draw(table.load("cpu"), scheme), encoding="utf-8")


if __name__ == "__main__":
    write()
