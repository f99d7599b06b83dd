"""The README's tables, from saved results: `python benchmarks/table.py` writes them between the
markers in README.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def load(name: str) -> dict | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(result: dict) -> str:
    """One row per divergence and vocabulary; times are medians of loss and gradient in one run."""
    cells: dict[tuple, dict[str, dict]] = {}
    for bench in result["benchmarks"]:
        info = bench["extra_info"]
        key = (info["divergence"], info["V"], info["distance"])
        cells.setdefault(key, {})[info["provider"]] = info | {"median": bench["stats"]["median"]}
    info = next(iter(next(iter(cells.values())).values()))
    machine = result["machine_info"]
    versions = ", ".join(
        f"{k} {machine[k]}" for k in ("torch", "triton", "liger-kernel") if machine.get(k)
    )
    lines = [
        f"{machine['device']}, {machine['threads']} threads, {versions};"
        f" {info['rows']} rows, {info['dtype'][6:]}, T = 2.",
        "",
        "| divergence | V | naive | torch.compile | Liger | fastkd | floor | × naive"
        " | extra memory, naive → fastkd |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (divergence, V, distance), row in cells.items():
        name = (
            divergence
            if distance == 1
            else f"{divergence}, student within {distance} of the teacher"
        )

        def ms(provider, row=row):
            return f"{row[provider]['median'] * 1e3:,.1f} ms" if provider in row else "–"

        def mb(provider, row=row):
            peak = row.get(provider, {}).get("peak_bytes")
            return "–" if peak is None else f"{max(peak, 0) / 2**20:,.0f} MB"

        floor = next(iter(row.values()))["floor_seconds"] * 1e3
        both = "naive" in row and "fastkd" in row
        times = f"{row['naive']['median'] / row['fastkd']['median']:.1f}" if both else "–"
        lines.append(
            f"| {name} | {V:,} | {ms('naive')} | {ms('compile')} | {ms('liger')} | {ms('fastkd')}"
            f" | {floor:,.1f} ms | {times} | {mb('naive')} → {mb('fastkd')} |"
        )
    return "\n".join(lines)


def rendered(text: str) -> str:
    """README text with every table whose results exist brought up to date."""

    def fill(match: re.Match) -> str:
        result = load(match[1])
        body = table(result) if result else "Not measured yet."
        return f"<!-- results: {match[1]} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
