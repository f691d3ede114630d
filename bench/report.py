"""Measurements in, a page of Markdown out. A cell with a failed request has no number; drops are counted."""
import statistics
import time


class Results:
    """All measurements: cell -> gateway -> one entry a round."""

    def __init__(self, others_limit):
        self.others_limit = others_limit
        self.cells, self.work, self.absent = {}, {}, {}

    def add(self, cell, gateway, value, failed, others):
        entry = {"value": value, "failed": failed, "dropped": others > self.others_limit}
        self.cells.setdefault(cell, {}).setdefault(gateway, []).append(entry)

    def entries(self, cell, gateway):
        return self.cells.get(cell, {}).get(gateway, [])

    def failed(self, cell, gateway):
        return sum(entry["failed"] for entry in self.entries(cell, gateway))

    def kept(self, cell, gateway):
        """{round: value} of the rounds that count."""
        return {number: entry["value"] for number, entry in enumerate(self.entries(cell, gateway))
                if not entry["dropped"] and entry["value"] is not None}

    def drops(self):
        entries = [entry for gateways in self.cells.values() for rounds in gateways.values() for entry in rounds]
        return sum(entry["dropped"] for entry in entries), len(entries)

    # --- cells of a table ------------------------------------------------------------------

    def number(self, cell, gateway, digits=1):
        """Median and range."""
        return self._cell(cell, gateway, list(self.kept(cell, gateway).values()), digits)

    def ratio(self, cell, gateway, baseline):
        """Median of the ratios to the baseline, each within its round."""
        if gateway == baseline or self.failed(cell, baseline) or not self.entries(cell, baseline):
            return "-"
        mine, theirs = self.kept(cell, gateway), self.kept(cell, baseline)
        return self._cell(cell, gateway, [mine[at] / theirs[at] for at in mine if theirs.get(at)], 2)

    def added(self, cell, gateway):
        """Median of the differences to the direct way, each within its round."""
        if self.failed(cell, "direct"):
            return "-"
        mine, direct = self.kept(cell, gateway), self.kept(cell, "direct")
        return self._cell(cell, gateway, [mine[at] - direct[at] for at in mine if at in direct], 0)

    def _cell(self, cell, gateway, values, digits):
        if failed := self.failed(cell, gateway):
            return f"{failed} failed"
        entries = self.entries(cell, gateway)
        if not entries:
            return "-"
        if not values:
            return f"all {len(entries)} dropped"
        middle, low, high = statistics.median(values), min(values), max(values)
        text = f"{middle:.{digits}f}"
        return text if len(values) == 1 else f"{text} ({low:.{digits}f}-{high:.{digits}f})"


def page(results, machine, versions, options):
    """One run's section of RESULTS.md."""
    dropped, total = results.drops()
    lines = [
        f"## {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {machine['commit']}",
        "",
        f"{machine['machine']}; {machine['kernel']}. " + "; ".join(versions.values()) + ".",
        f"{options.rounds} rounds of {options.seconds:g} s, order rotated; gateway alone on one core with one worker, load and backend on the rest.",
        f"Median (range). {dropped} of {total} measurements dropped, by the rule that others took more than {results.others_limit:.0%} of the gateway's core.",
    ]
    lines += [f"Not here: {name}: {why}." for name, why in results.absent.items()]

    def cpu(title, cells, unit="CPU µs"):
        present = [(cell, label) for cell, label in cells if cell in results.cells]
        if present:
            heads = [f"{label}, {unit}" for _, label in present]
            rows = {name: [results.number(cell, name) for cell, _ in present]
                    + [results.ratio(present[len(present) // 2][0], name, base) for base in ("nginx", "bare-pingora")]
                    for name in results.work if name != "direct"}
            middle = present[len(present) // 2][1]
            table(title, [*heads, f"{middle}, to nginx", f"{middle}, to bare Pingora"], rows)

    def table(title, heads, rows):
        lines.extend(["", f"### {title}", "", "| gateway | its work | " + " | ".join(heads) + " |",
                      "|---|---|" + "---|" * len(heads)])
        for name, cells in rows.items():
            if any(cell != "-" for cell in cells):
                lines.append(f"| {name} | {results.work[name]} | " + " | ".join(cells) + " |")

    cpu("Small request (W1), CPU of the gateway for each", [(f"small c={c}", f"c={c}") for c in options.connections])
    if any(cell.startswith("rps") for cell in results.cells):
        table("The same, requests a second (moves with the load's core; the CPU above does not)",
              [f"c={c}" for c in options.connections],
              {name: [results.number(f"rps c={c}", name, 0) for c in options.connections] for name in results.work})
    if any(cell.startswith("p50") for cell in results.cells):
        wanted = [(part, rate) for rate in options.rates for part in ("p50", "p99")]
        table("Small request (W1), open loop: added to the direct way, µs (the row of direct: its own)",
              [f"{part} at {rate}/s" for part, rate in wanted],
              {name: [results.number(f"{part} {rate}/s", name, 0) if name == "direct" else results.added(f"{part} {rate}/s", name)
                      for part, rate in wanted] for name in results.work})
    if "watched p50 0" in results.cells:
        heads = ["p50, nobody watches", "p50, ten watch", "p99, nobody", "p99, ten", "CPU µs, nobody", "CPU µs, ten"]
        table("Small request (W1) at 1000/s, watched by ten over the operator's feed, µs from the client", heads,
              {name: [results.number(f"watched {part} {watchers}", name, 0) for part in ("p50", "p99", "cpu") for watchers in (0, 10)]
               for name in results.work})
    cpu("A token never seen before (W7, 8 connections), CPU for each request", [("cold", "cold")])
    cpu("Body of 5 MB (W4), CPU of the gateway for each", [(f"large c={c}", f"c={c}") for c in (1, 4)])
    if "large p50 c=1" in results.cells:
        table("The same, added to the direct way, p50 in µs", ["c=1", "c=4"],
              {name: [results.added(f"large p50 c={c}", name) for c in (1, 4)] for name in results.work if name != "direct"})
    for name, title in (("ndjson", "NDJSON (W2)"), ("sse", "SSE (W3)")):
        cpu(f"Streams of 200 tokens at 50 a second, {title}, CPU of the gateway for each record",
            [(f"{name} n={n}", f"n={n}") for n in options.streams])
        if any(cell.startswith(f"{name} age") for cell in results.cells):
            wanted = [(part, n) for n in options.streams for part in ("p50", "p99")]
            table("The same, age of a record on arrival, added to the direct way, µs (the row of direct: its own)",
                  [f"{part}, n={n}" for part, n in wanted],
                  {gateway: [results.number(f"{name} age {part} n={n}", gateway, 0) if gateway == "direct"
                             else results.added(f"{name} age {part} n={n}", gateway) for part, n in wanted]
                   for gateway in results.work})
    if "silent KiB" in results.cells:
        table(f"{options.silent_streams} silent streams (W5), resident memory",
              ["KiB a stream", "MiB before"],
              {name: [results.number("silent KiB", name), results.number("idle MiB", name)] for name in results.work})
    return "\n".join(lines) + "\n\n"
