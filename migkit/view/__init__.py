"""What a run looks like. Figures are matplotlib's; nothing here is loaded before it is used."""

PLOTS = (
    "timeline", "fault_latency", "fault_stages", "blocktime", "requests", "transfer", "working_set",
    "downtime",
)  # fmt: skip
"""The plots there are, by name, in the order in which a report shows them."""
