"""What a run does on its machine, one file a kind: pure state, told what happened, asking for what
it wants through a `Conductor`. They know no actor and no machine, so a fake one tests them.
"""
