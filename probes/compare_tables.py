"""What `probes compare` prints: tables of text from the plain values of `probes.compare.compare`."""

from collections.abc import Callable
from typing import Any

from probes.paired import LOSSES
from probes.price import price_lines, price_table
from probes.regression import NUMBER_METRICS
from probes.report import Table, with_interval

NUMBERS = {*NUMBER_METRICS["regression"], *NUMBER_METRICS["ordinal"]}


def p_text(value: float | None) -> str:
    """`0.031`, `<0.001`, or a dash where there was no test."""
    if value is None or value != value:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _signed(entry: dict[str, Any]) -> str:
    value = entry["value"]
    text = with_interval(value, entry)
    return text if value != value or value < 0 else f"+{text}"


def _cells(entry: dict[str, Any], ways: list[str], margin: float | None) -> list[str]:
    cells = [with_interval(entry["a"]["value"], entry["a"]), with_interval(entry["b"]["value"], entry["b"])]
    cells += [_signed(entry["delta"]), *(p_text(entry["p"][way]) for way in ways)]
    if margin is not None:
        for name in ("noninferiority", "equivalence"):
            item = entry[name]
            way = ways[-1]
            cells.append(f"{p_text(item['p'][way])} {'yes' if item['holds'][way] else 'no'}")
    return cells


def _headings(result: dict[str, Any]) -> list[str]:
    percent = f"{100 * result['level']:g}%"
    ways = list(result["macro"]["p"])
    margin = result["margin"]
    asked = [] if margin is None else [f"A not worse by {margin:g}: p", f"within {margin:g}: p"]
    return [f"A [{percent}]", f"B [{percent}]", f"A - B [{percent}]", *(f"p {way}" for way in ways), *asked]


def result_table(found: dict[str, Any]) -> Table:
    """Macro, then one row a label."""
    result = found["result"]
    ways, margin = list(result["macro"]["p"]), result["margin"]
    title = (
        f"{result['metric']} · {found['shared']['samples']} samples of {found['shared']['patients']} patients, "
        f"{result['num_resamples']} resamples by patient"
    )
    counts = [name for name in ("positives", "n") if all(name in entry for entry in result["per_label"])]
    rows = [["macro", *("" for _ in counts), *_cells(result["macro"], ways, margin), "", ""]]
    for entry in result["per_label"]:
        adjusted = [p_text(entry[name][ways[-1]]) for name in ("p_holm", "p_bh")]
        rows.append([entry["label"], *(str(entry[name]) for name in counts), *_cells(entry, ways, margin), *adjusted])
    return title, ["label", *counts, *_headings(result), "p Holm", "p BH"], rows


def curve_table(found: dict[str, Any]) -> list[Table]:
    """The macro of two curves, one row a budget, then every label."""
    percent = f"[{100 * found['level']:g}%]"
    columns = ["budget", "A", "B", f"A - B {percent}", "standard error", "A better"]
    title = f"{found['metric']} · mean over {found['shared']['repeats']} draws of shots, the same for both"

    def row(name: str, entry: dict[str, Any]) -> list[str]:
        error = entry["delta"].get("standard_error")
        share = "-" if entry["better"] != entry["better"] else f"{100 * entry['better']:.0f} %"
        plain = [with_interval(entry[side], None) for side in "ab"]
        return [name, *plain, _signed(entry["delta"]), "-" if error is None else f"{error:.4f}", share]

    made: list[Table] = [(f"{title} · macro", columns, [row(item["name"], item["macro"]) for item in found["curve"]])]
    for label in found["shared"]["labels"]:
        rows = [
            row(item["name"], entry)
            for item in found["curve"]
            for entry in item["per_label"]
            if entry["label"] == label
        ]
        made.append((label, columns, rows))
    return made


def seed_lines(result: dict[str, Any]) -> list[str]:
    """How far seeds lie apart, and the interval that holds them too."""
    spread = result["macro"].get("seeds")
    if spread is None:
        return []
    lines = []
    for side in "ab":
        values = spread[side]
        sd = spread[f"sd_{side}"]
        told = f"sd {sd:.3f}, {min(values):.3f} to {max(values):.3f}" if sd is not None else "its spread is not known"
        lines.append(f"{side.upper()}: {len(values)} seed{'s' if len(values) > 1 else ''}, {told}")
    delta = spread["delta"]
    how = "seed by seed" if spread["paired"] else "over both sides' seeds"
    lines.append(
        f"A - B of the means over seeds; with the chance of the seeds ({how}) as well: {_signed(delta)}, "
        f"standard error {delta['standard_error']:.4f}; the table's intervals and p-values hold that of the patients"
    )
    return lines


def subgroup_table(found: dict[str, Any]) -> Table:
    """One row a subgroup: macro over the labels that have both classes in it."""
    rows = []
    for part in found["subgroups"]:
        ways = list(part["macro"]["p"])
        n = max((entry["n"] for entry in part["per_label"]), default=0)
        cells = _cells(part["macro"], ways, part["margin"])
        rows.append([part["column"], part["value"], str(n), str(part["num_groups"]), str(part["num_labels"]), *cells])
    headings = ["column", "value", "n", "patients", "labels", *_headings(found["result"])]
    return f"subgroups · macro {found['result']['metric']}", headings, rows


def lines_before(found: dict[str, Any]) -> list[str]:
    """Who A and B are, and what differs between them."""
    lines = [f"{side.upper()}  {found[side]['name']}" for side in ("a", "b")]
    for name, (a, b) in found["differs"].items():
        mark = "protocol " if name in found["protocol_differs"] else ""
        lines.append(f"{mark}differs in {name}: A {a}, B {b}")
    if found["differs"] and found["protocol_differs"]:
        lines.append("the protocols differ: what follows compares them as well as the features")
    elif found["protocol_differs"]:
        lines += found["protocol_differs"]
    elif not found["differs"]:
        lines.append("A and B do not differ in set, features, task or options")
    return lines


def lines_after(found: dict[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    result = found["result"]
    lines = list(found["notes"])
    left = len(result["per_label"]) - result["num_labels"]
    if left:
        what = "targets have one value" if result["metric"] in NUMBERS else "labels have one class"
        lines.append(f"{left} {what} among these samples; the macro and the family leave them out")
    if result["metric"] in LOSSES:
        lines.append(f"of {result['metric']} less is better: A is the better one where A - B is below 0")
    if result["metric"] not in ("auroc", "auprc") and found["thresholds"]["a"] is not None:
        lines.append(f"decided at thresholds: {found['thresholds']['how']}")
    if result["margin"] is not None:
        lines.append(
            f"not worse: one-sided at {(1 - result['level']) / 2:g}; within: two one-sided tests at "
            f"{1 - result['level']:g} each; both by {list(result['macro']['p'])[-1]}"
        )
    if result["macro"]["delta"]["skipped"]:
        lines.append(
            f"{result['macro']['delta']['skipped']} resamples lack a class of some label and count for no macro"
        )
    lines.append(f"p Holm and p BH are those by {list(result['macro']['p'])[-1]}, over the family of these labels")
    for name, spread in found["seeds"].items():
        if spread:
            lines.append(
                f"{name.upper()}: {len(spread['seeds'])} seeds, {spread['metric']} {spread['mean']:.3f} "
                f"(sd {spread['sd']:.3f}, {spread['min']:.3f} to {spread['max']:.3f}), "
                "which the interval of one seed lacks"
            )
    lines += seed_lines(result)
    lines += [f"warning: {text}" for text in result["few"]]
    for part in found["subgroups"]:
        if part["few"]:
            more = f", and {len(part['few']) - 1} more like it" if len(part["few"]) > 1 else ""
            lines.append(f"warning: {part['column']} {part['value']}: {part['few'][0]}{more}")
    return lines


def print_comparison(found: dict[str, Any], show: Callable[..., None]) -> None:
    """Print everything through `show(title, columns, rows, right=...)`."""
    for line in lines_before(found):
        print(line)
    if "curve" in found:
        for table in curve_table(found):
            show(*table, right=("A better", "standard error"))
        for line in found["notes"]:
            print(f"  {line}")
        return
    show(*result_table(found), right=("positives", "n"))
    if found["subgroups"]:
        show(*subgroup_table(found), right=("n", "patients", "labels"))
    for line in lines_after(found):
        print(f"  {line}")
    if found["price"]:
        show(*price_table(found["price"]))
        for line in price_lines(found["price"]):
            print(f"  {line}")
