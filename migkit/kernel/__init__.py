"""Linux, typed: userfaultfd, PAGEMAP_SCAN, memfd RAM, eventfds and what this kernel can do.

Nothing here knows of migration. Names are the kernel's; each module begins with what a
newcomer must know of its subject.
"""
