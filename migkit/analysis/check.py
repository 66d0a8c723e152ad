"""The rules that every good run keeps, and the frame of those that a run breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migkit.analysis import conservation, order, schema, timing
from migkit.analysis.rule import Finding, NotApplicableError, Rule
from migkit.errors import MissingEventError

if TYPE_CHECKING:
    import pandas as pd

    from migkit.analysis.analyses import Analyses

RULES = (
    Rule("legal-states", "each side's states follow the table of states", order.legal_states),
    Rule("one-guest", "the guest runs at one side at a time", order.one_guest),
    Rule("switchover-order", "the destination switches over in QEMU's order", order.switchover),
    Rule("discards-first", "nothing is discarded once the guest runs", order.discards_before_run),
    Rule("source-end-order", "the source completes in QEMU's order, without an error",
         order.end_of_source),
    Rule("destination-end-order", "the destination ends post-copy in QEMU's order",
         order.end_of_destination),
    Rule("placed-once", "no page is placed twice in post-copy", conservation.placed_once),
    Rule("placed-was-sent", "every placed page was pushed or requested",
         conservation.placed_was_sent),
    Rule("requests-answered", "every request is answered", conservation.requests_answered),
    Rule("records-kept", "no trace lost records", conservation.records_kept),
    Rule("stages-in-order", "the stages of every answered fault are in order",
         timing.stages_in_order),
    Rule("limiter-waits", "the rate limiter waits and does not spin", timing.limiter_waits),
    Rule("limiter-starves-nobody", "no request waits for the rate limiter",
         timing.limiter_starves_nobody),
    Rule("blocktime-adds-up", "QEMU's figures of blocktime fit each other",
         timing.blocktime_adds_up),
)  # fmt: skip
"""All rules, in the order in which they are checked."""


def check_frame(run: Analyses) -> pd.DataFrame:
    """Return the rules that a run breaks; ``schema.describe("violations")``.

    ``attrs["kept"]`` names the rules that the run keeps, ``attrs["not_checked"]`` those that
    cannot be judged, with the reason (a dict).
    """
    found: list[tuple[Rule, Finding]] = []
    kept: list[str] = []
    not_checked: dict[str, str] = {}
    for rule in RULES:
        try:
            findings = list(rule.find(run))
        except (MissingEventError, NotApplicableError) as reason:
            not_checked[rule.name] = str(reason)
            continue
        found += [(rule, finding) for finding in findings]
        if not findings:
            kept.append(rule.name)
    stamps = [finding.ts_ns for _, finding in found]
    frame = schema.frame(
        "violations",
        {
            "rule": [rule.name for rule, _ in found],
            "side": [finding.side for _, finding in found],
            "ts_ns": stamps,
            "time_s": [None if ts is None else (ts - run.origin_ns) / 1e9 for ts in stamps],
            "count": [finding.count for _, finding in found],
            "message": [finding.message for _, finding in found],
        },
    )
    frame.attrs = {"kept": kept, "not_checked": not_checked}
    return frame
