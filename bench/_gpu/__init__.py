"""The parts of `bench/gpu.py`.

    tree           fastapd from a bare checkout, the commit, the build
    card           the device: timers, streams, graphs, memory; and the stand-ins of a rehearsal
    items          what there is to do, in order, each with the seconds it is expected to take
    parent         the deadline, the processes that work, what is printed and kept
    child          one of these processes
    constants      what the card can do at best, and floors from it
    checks         equivalence: every op and backend against the reference in float64
    repeats        determinism, streams, a second device
    graphs         capture of ops and of the training step; that a step does not wait
    contest        contenders that are checked, then timed in turns
    contenders     what all problems share: sizes, agreement, who is withheld and who does not fit
    problems_ops   who competes, and at which sizes: single operations
    problems_step  and whole steps with their attributions
    goals          what has to be reached
    report         the file of results and the tables that are printed

Only `parent`, `items`, `goals`, `report` and `tree` are imported by the command itself, which needs no torch.
"""
