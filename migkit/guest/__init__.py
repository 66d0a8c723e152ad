"""What is migrated: the guest process, its RAM, its CPU state and the workloads it runs.

A guest is a process of its own (``python -m migkit.guest``) that steps a deterministic workload
over a memfd. It is steered through a shared page (:mod:`migkit.guest.vcpu`), never by messages:
a guest that waits for a page cannot answer.
"""
