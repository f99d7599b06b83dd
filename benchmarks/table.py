"""The tables of README and docs, from saved results: `python benchmarks/table.py` writes them
between the markers in these pages, `<!-- results: cpu -->` (all of cpu.json) or `<!-- results: cpu
short -->` (its narrow table) to `<!-- end -->`; `step` and `step short` are of step.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGES = [HERE.parent / page for page in ("README.md", "docs/index.md", "docs/speed.md")]
SHORT = {"naive": "PyTorch", "compile": "torch.compile", "fastkd": "**fastkd**"}
MODELS = {  # of step.json
    "smollm2": "SmolLM2-135M, V = 49,152",
    "gemma3": "Gemma 3 270M, V = 262,144",
}


def load(name: str) -> dict | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def entries_of(result: dict) -> dict[str, list[dict]]:
    """What was measured, by table."""
    entries: dict[str, list[dict]] = {}
    for bench in result["benchmarks"]:
        info = bench["extra_info"] | {"median": bench["stats"]["median"]}
        entries.setdefault(info.get("table", "dense"), []).append(info)
    return entries


def short(result: dict) -> str:
    """Forward KL of dense logits over the largest vocabulary: a line a provider."""
    measured = [e for e in entries_of(result)["dense"] if e["divergence"] == "forward_kl"]
    groups = grouped(measured, "V", "distance")
    V = max(V for V, _ in groups)
    row = groups[V, 1]
    first = row["fastkd"]
    lines = [
        f"| forward KL, {first['rows']:,} tokens × {V:,} entries"
        " | loss and gradient | extra memory |",
        "|---|--:|--:|",
    ]
    for provider, name in SHORT.items():
        entry = row[provider]
        lines.append(
            f"| {name} | {entry['median'] * 1e3:,.0f} ms | {megabytes(entry['peak_bytes'])} |"
        )
    return "\n".join(lines)


def tables(result: dict) -> str:
    """Those of dense logits, of LM heads, of top-k teachers and of TRL's losses, as far as they
    were measured; the first line says on what. Times are medians of loss and gradient in one
    run."""
    entries = entries_of(result)
    machine = result["machine_info"]
    versions = ", ".join(
        f"{k} {machine[k]}" for k in ("torch", "triton", "liger-kernel", "trl") if machine.get(k)
    )
    parts = [
        render(entries[kind])
        for kind, render in (("dense", dense), ("head", heads), ("topk", topk), ("trl", trl))
        if kind in entries
    ]
    return f"{machine['device']}, {machine['threads']} threads, {versions}; " + "\n\n".join(parts)


def dense(entries: list[dict]) -> str:
    """One row per divergence and vocabulary."""
    lines = [
        f"{entries[0]['rows']} rows, {entries[0]['dtype'][6:]}, T = 2.",
        "",
        "| divergence | V | naive | torch.compile | Liger | fastkd | floor | × naive"
        " | extra memory, naive → fastkd |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, V, distance), row in grouped(entries, "divergence", "V", "distance").items():
        near = "" if distance == 1 else f", within {distance}"
        floor = next(iter(row.values()))["floor_seconds"]
        lines.append(
            f"| {name}{near} | {V:,} | {ms(row, 'naive')} | {ms(row, 'compile')}"
            f" | {ms(row, 'liger')} | {ms(row, 'fastkd')} | {milliseconds(floor)}"
            f" | {ratio(row, 'naive', 'fastkd')} | {memory(row)} |"
        )
    return "\n".join([*lines[:2], *filled(lines[2:])])


def heads(entries: list[dict]) -> str:
    """One row per shape, trained or frozen head, and divergence."""
    lines = [
        f"LM heads on both sides, from hidden states of widths H (student, teacher),"
        f" {entries[0]['dtype'][6:]}, T = 2; “gemms”:"
        " the four matrix products alone (three where the head is frozen), timed in"
        " turns with each provider, and shown beside fastkd; the ratios are of times over gemms.",
        "",
        "| rows × V | H | head | divergence | gemms | naive | torch.compile"
        " | Liger fused | Liger chunked | TRL | fastkd | fastkd / gemms | naive / fastkd"
        " | extra memory, naive → fastkd |",
        "|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    columns = ("naive", "compile", "liger_fused", "liger_chunked", "trl", "fastkd")
    keys = ("rows", "V", "widths", "frozen", "divergence")
    for (rows, V, widths, frozen, divergence), row in grouped(entries, *keys).items():
        ours = row.get("fastkd")
        lines.append(
            f"| {rows:,} × {V:,} | {widths[0]:,}, {widths[1]:,}"
            f" | {'frozen' if frozen else 'trained'} | {divergence}"
            f" | {milliseconds(ours and ours['floor_seconds'])} | "
            + " | ".join(ms(row, provider) for provider in columns)
            + f" | {over_floor(ours)} | {ratio(row, 'naive', 'fastkd', in_floors=True)}"
            f" | {memory(row)} |"
        )
    return "\n".join([*lines[:2], *filled(lines[2:])])


def topk(entries: list[dict]) -> str:
    """One row per student: dense logits, an LM head."""
    lines = [
        f"Top-k teacher, K = {entries[0]['K']} and a bucket for the rest, forward_kl,"
        f" {entries[0]['dtype'][6:]}, T = 2; the floor of an LM head is its three matrix products.",
        "",
        "| student | rows × V | naive | torch.compile | fastkd | floor | × naive"
        " | extra memory, naive → fastkd |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (student, rows, V), row in grouped(entries, "student", "rows", "V").items():
        first = row.get("fastkd") or next(iter(row.values()))
        floor = first["floor_seconds"]
        name = "dense logits" if student == "dense" else f"LM head, H = {first['width']:,}"
        lines.append(
            f"| {name} | {rows:,} × {V:,} | {ms(row, 'naive')} | {ms(row, 'compile')}"
            f" | {ms(row, 'fastkd')} | {milliseconds(floor)}"
            f" | {ratio(row, 'naive', 'fastkd', in_floors=True)} | {memory(row)} |"
        )
    return "\n".join([*lines[:2], *filled(lines[2:])])


def trl(entries: list[dict]) -> str:
    """One row per function of TRL's, vocabulary, beta and temperature."""
    lines = [
        f"TRL's two losses by TRL's own code, and under `fused()`, {entries[0]['dtype'][6:]}:"
        " `generalized_jsd_loss` (`GKDTrainer`) of whole logits, `_chunked_divergence_loss`"
        " (`DistillationTrainer`) of hidden states and LM heads.",
        "",
        "| loss | rows × V | beta | T | TRL | fastkd | floor | × TRL"
        " | extra memory, TRL → fastkd |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    keys = ("loss", "rows", "V", "beta", "temperature")
    for (loss, rows, V, beta, T), row in grouped(entries, *keys).items():
        first = row.get("fastkd") or next(iter(row.values()))
        lines.append(
            f"| `{loss}` | {rows:,} × {V:,} | {beta:g} | {T:g} | {ms(row, 'trl')}"
            f" | {ms(row, 'fastkd')} | {milliseconds(first['floor_seconds'])}"
            f" | {ratio(row, 'trl', 'fastkd')} | {memory(row, 'trl')} |"
        )
    return "\n".join(lines)


def steps(result: dict) -> str:
    """Whole training steps of real models: a line per model and number of tokens."""
    machine = result["machine_info"]
    lines = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; one sequence"
        " a step, fp32, a student of every third layer, AdamW, forward KL, T = 2, alpha = 0.7.",
        "",
        "| model | tokens | PyTorch | fastkd, whole logits | fastkd | × PyTorch | peak, PyTorch"
        " | whole logits | fastkd |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (model, tokens), row in grouped(result["steps"], "model", "tokens").items():
        lines.append(
            f"| {MODELS[model]} | {tokens:,} | {seconds(row, 'naive')} | {seconds(row, 'whole')}"
            f" | {seconds(row, 'fastkd')} | {ratio(row, 'naive', 'fastkd')}"
            f" | {peak(row, 'naive')} | {peak(row, 'whole')} | {peak(row, 'fastkd')} |"
        )
    return "\n".join(lines)


def steps_short(result: dict) -> str:
    """Each model's longest sequence; and the largest model's shortest, where least is won."""
    groups = grouped(result["steps"], "model", "tokens")
    lengths = {model: [n for m, n in groups if m == model] for model, _ in groups}
    last = list(lengths)[-1]
    chosen = {(model, max(n)) for model, n in lengths.items()} | {(last, min(lengths[last]))}
    lines = [
        "| a whole training step | tokens | PyTorch | fastkd | peak memory |",
        "|---|--:|--:|--:|--:|",
    ]
    for (model, tokens), row in groups.items():
        if (model, tokens) in chosen:
            lines.append(
                f"| {MODELS[model]} | {tokens:,} | {seconds(row, 'naive')}"
                f" | **{seconds(row, 'fastkd')}** | {peak(row, 'naive')} → {peak(row, 'fastkd')} |"
            )
    return "\n".join(lines)


def filled(lines: list[str]) -> list[str]:
    """A table's lines without the columns that were measured nowhere."""
    cells = [line.strip().strip("|").split("|") for line in lines]
    kept = [
        column for column in zip(*cells, strict=True) if {x.strip() for x in column[2:]} != {"–"}
    ]
    return [f"|{'|'.join(row)}|" for row in zip(*kept, strict=True)]


def grouped(entries: list[dict], *keys: str) -> dict[tuple, dict[str, dict]]:
    """Entries by provider, by the values of `keys`."""
    groups: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        values = (entry[key] for key in keys)
        key = tuple(tuple(x) if isinstance(x, list) else x for x in values)
        groups.setdefault(key, {})[entry["provider"]] = entry
    return groups


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:,.1f} ms"


def ms(row: dict[str, dict], provider: str) -> str:
    return milliseconds(row.get(provider, {}).get("median"))


def ratio(row: dict[str, dict], above: str, below: str, in_floors: bool = False) -> str:
    """Of two medians, each over its own floor where that was timed in turns with it."""
    if above not in row or below not in row:
        return "–"
    above, below = (
        row[x]["median"] / (row[x]["floor_seconds"] if in_floors else 1) for x in (above, below)
    )
    return f"{above / below:.1f}"


def over_floor(entry: dict | None) -> str:
    return "–" if entry is None else f"{entry['median'] / entry['floor_seconds']:.2f}"


def memory(row: dict[str, dict], above: str = "naive") -> str:
    theirs, ours = (megabytes(row.get(x, {}).get("peak_bytes")) for x in (above, "fastkd"))
    return f"{theirs} → {ours}"


def seconds(row: dict[str, dict], provider: str) -> str:
    return f"{row[provider]['median']:,.1f} s" if provider in row else "–"


def peak(row: dict[str, dict], provider: str) -> str:
    return f"{row[provider]['peak_mb'] / 1000:.1f} GB" if provider in row else "–"


def megabytes(peak: int | None) -> str:
    return "–" if peak is None else f"{max(peak, 0) / 2**20:,.0f} MB"


# By whether whole steps are asked for, and a narrow table.
RENDER = {
    (False, False): tables,
    (False, True): short,
    (True, False): steps,
    (True, True): steps_short,
}


def rendered(text: str) -> str:
    """A page's text with every table whose results exist brought up to date."""

    def fill(match: re.Match) -> str:
        result = load(match[2])
        render = RENDER[match[2] == "step", bool(match[3])]
        body = render(result) if result else "Not measured yet."
        return f"{match[1]}\n\n{body}\n\n<!-- end -->"

    marker = r"(<!-- results: (\w+)( short)? -->).*?<!-- end -->"
    return re.sub(marker, fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
